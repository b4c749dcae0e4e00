"""`apertus-nemo data build` and `apertus-nemo data verify`; see docs/data.md."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apertus_nemo.cli.arguments import explained

BUILD_CODES = {
    0: "built",
    2: "wrong input: the line names file, line or byte, and what to do; nothing is left behind",
    3: "the disk is full or cannot be written, an URL cannot be reached, or a package is missing",
}
VERIFY_CODES = {
    0: "all is as built",
    1: "the first file that is missing, too much, or has other bytes is named",
    2: "not a built corpus",
}


def main(arguments: Sequence[str]) -> int:
    """Run the verb; 0 when done. Errors leave as `apertus_nemo.errors.ApertusError`, wrong usage as SystemExit(2)."""
    options = parser().parse_args(arguments)
    return _build(options) if options.verb == "build" else _verify(options)


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="apertus-nemo data",
        **explained(
            "Build training data from text, and verify it.",
            examples={
                "apertus-nemo data build --input 'texts/*.jsonl' --train-bpe 8000 --output corpus": "",
                "apertus-nemo data verify corpus": "",
            },
            exit_codes={
                0: "done",
                1: "verify: the first file that is not as built is named",
                2: "wrong input: what, where, and what to do",
                3: "build: the disk, an URL or a package is missing or refuses",
            },
        ),
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{build,verify}")

    build = verbs.add_parser(
        "build",
        help="text files or JSONL into a corpus",
        **explained(
            "Tokenize text for training, into a folder that one digest names.",
            examples={
                "apertus-nemo data build --input 'texts/*.jsonl' --train-bpe 8000 --output corpus": "a tokenizer too",
                "apertus-nemo data build --input s3://bucket/a.jsonl.gz --tokenizer Apertus-8B --output corpus": "",
                "apertus-nemo data build --format chat --input a.jsonl --tokenizer T --output talks": "to tune on",
            },
            exit_codes=BUILD_CODES,
        ),
    )
    build.add_argument(
        "--input", action="append", required=True, metavar="PATH", help="file, glob or fsspec URL; may be given again"
    )
    build.add_argument(
        "--format",
        choices=("text", "jsonl", "chat"),
        help="chat: conversations, as JSONL; default: text or JSONL by each file's name",
    )
    build.add_argument(
        "--text-key", metavar="KEY", help="key of a JSONL record's text (default: text), or of its messages (messages)"
    )
    kind = build.add_mutually_exclusive_group(required=True)
    kind.add_argument("--tokenizer", type=Path, metavar="PATH", help="Hugging Face folder, or its tokenizer.json")
    kind.add_argument("--train-bpe", type=int, metavar="VOCAB_SIZE", help="train a byte-level BPE on the text")
    build.add_argument("--bos", metavar="TOKEN", help="first token of a document (default: the tokenizer's)")
    build.add_argument("--eos", metavar="TOKEN", help="last token of a document (default: the tokenizer's)")
    build.add_argument(
        "--special-tokens",
        choices=("text", "parse"),
        default="text",
        help="what `</s>` in a document becomes: text (default), or the token",
    )
    build.add_argument("--date", metavar="YYYY-MM-DD", help="chat: of the default system turn")
    build.add_argument("--max-tokens", type=int, metavar="N", help="chat: refuse conversations of more tokens")
    build.add_argument("--drop-longer", action="store_true", help="chat: leave them out instead, and count them")
    build.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    build.add_argument("--force", action="store_true", help="replace DIR if it is a built corpus")
    build.add_argument("--json", action="store_true", help="print the result as JSON")

    verify = verbs.add_parser(
        "verify",
        help="check every byte of a corpus",
        **explained(
            "Read every byte of a corpus and hold it against its manifest.",
            examples={"apertus-nemo data verify corpus": ""},
            exit_codes=VERIFY_CODES,
        ),
    )
    verify.add_argument("folder", type=Path, metavar="DIR", help="what `data build` made")
    verify.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _build(options: argparse.Namespace) -> int:
    from apertus_nemo.data import sources
    from apertus_nemo.data.build import build
    from apertus_nemo.errors import InputError, UnfitEnvironment

    if options.train_bpe is not None and (options.bos or options.eos):
        raise InputError("--bos and --eos choose tokens of --tokenizer; a trained one has <s> and </s>")
    chat = _chat_options(options)
    found = sources.find(options.input, format=options.format if chat is None else "jsonl")
    sizes = [source.size_bytes for source in found]
    bar = _Bar(sum(size for size in sizes if size is not None) if None not in sizes else None)
    former = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # clean up as after Ctrl-C
    try:
        manifest = build(
            found,
            options.output,
            tokenizer=options.tokenizer,
            train_bpe=options.train_bpe,
            text_key=options.text_key or ("text" if chat is None else "messages"),
            chat=chat,
            special_tokens=options.special_tokens,
            bos=options.bos,
            eos=options.eos,
            force=options.force,
            progress=bar.show,
        )
    except ModuleNotFoundError as error:
        raise UnfitEnvironment(f"the package {error.name} is missing: install the locked requirements") from None
    finally:
        signal.signal(signal.SIGTERM, former)
        bar.close()
    _print(options, manifest, "built")
    return 0


def _chat_options(options: argparse.Namespace) -> Any:
    """`build.ChatOptions`, or None for documents of text."""
    from apertus_nemo.data.build import ChatOptions
    from apertus_nemo.errors import InputError

    if options.format != "chat":
        for name in ("date", "max_tokens", "drop_longer"):
            if getattr(options, name) not in (None, False):
                raise InputError(f"--{name.replace('_', '-')} belongs to --format chat")
        return None
    if options.special_tokens != "text":
        raise InputError("--special-tokens parse: what a turn says is text; leave it out with --format chat")
    if options.max_tokens is not None and options.max_tokens < 1:
        raise InputError(f"--max-tokens is {options.max_tokens}: it must be at least 1")
    if options.drop_longer and options.max_tokens is None:
        raise InputError("--drop-longer needs --max-tokens: longer than what?")
    return ChatOptions(options.date, options.max_tokens, options.drop_longer)


def _verify(options: argparse.Namespace) -> int:
    from apertus_nemo.data.manifest import verify

    _print(options, verify(options.folder), "verified")
    return 0


def _print(options: argparse.Namespace, manifest: Any, done: str) -> None:
    from apertus_nemo.data.manifest import digest

    folder = options.output if done == "built" else options.folder
    if options.json:
        result = {
            "folder": str(folder),
            "manifest_digest": f"sha256:{digest(manifest)}",
            "documents": manifest.documents,
            "empty_documents": manifest.empty_documents,
            "tokens": manifest.tokens,
            "chat": None if manifest.chat is None else vars(manifest.chat),
            "vocab_size": manifest.tokenizer.vocab_size,
            "files": {entry.path: f"sha256:{entry.sha256}" for entry in manifest.files},
        }
        print(json.dumps(result, indent=2, sort_keys=True))
        return
    skipped = f", {manifest.empty_documents:,} empty ones left out" if manifest.empty_documents else ""
    print(f"{done} {folder}: {len(manifest.files)} files")
    kind = "documents" if manifest.chat is None else "conversations"
    print(f"  {manifest.documents:,} {kind}{skipped}, {manifest.tokens:,} tokens")
    if manifest.chat is not None:
        chat = manifest.chat
        dropped = f", {chat.dropped:,} longer than {chat.max_tokens:,} left out" if chat.dropped else ""
        print(
            f"  {chat.trained_tokens:,} of them trained; the longest conversation has {chat.longest_tokens:,}{dropped}"
        )
    print(f"  vocabulary {manifest.tokenizer.vocab_size:,} ({manifest.tokenizer.kind} tokenizer)")
    print(f"  manifest digest sha256:{digest(manifest)}")


class _Bar:
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._what = ""
        self._bar: Any = None
        self._shown = sys.stderr.isatty()

    def show(self, what: str, size: int) -> None:
        """Move the bar to `size` bytes of the pass `what`."""
        if not self._shown:
            return
        if what != self._what:
            from tqdm import tqdm

            self.close()
            self._what = what
            self._bar = tqdm(total=self._total, unit="B", unit_scale=True, desc=what, file=sys.stderr)
        self._bar.update(size - self._bar.n)

    def close(self) -> None:
        """End the line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

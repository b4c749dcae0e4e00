"""The tokenizer of a corpus: an existing Hugging Face one, or a byte-level BPE trained on the text.

Both are read and run by the `tokenizers` library alone; nothing that a tokenizer's folder may name is
executed. A trained one has fixed ids: <unk> 0, <s> 1, </s> 2, <pad> 3, as the Apertus tokenizer has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apertus_nemo.data.manifest import TokenizerInfo
from apertus_nemo.errors import InputError

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")  # ids 0 to 3
UNK, BOS, EOS, PAD = SPECIAL_TOKENS
MINIMUM_BPE = len(SPECIAL_TOKENS) + 256  # the special tokens and one for each byte
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class CorpusTokenizer:
    """A tokenizer, ready to encode documents, and the files that go into the corpus."""

    engine: Any  # tokenizers.Tokenizer
    info: TokenizerInfo
    files: dict[str, bytes]  # name inside the tokenizer's folder: content

    def encode(self, documents: list[str]) -> list[list[int]]:
        """Ids of each document, BOS first and EOS last."""
        first, last = self.info.bos_id, self.info.eos_id
        encodings = self.engine.encode_batch_fast(documents, add_special_tokens=False)
        return [[first, *encoding.ids, last] for encoding in encodings]


def train(documents: Iterator[str], vocab_size: int, *, special_tokens: str = "text") -> CorpusTokenizer:
    """Train a byte-level BPE with exactly `vocab_size` ids; the same text gives the same tokenizer.

    Raises:
        InputError: the size is below 260, or the text has too few distinct pairs for it.
    """
    check_vocab_size(vocab_size)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    engine.train_from_iterator(documents, trainer)
    if engine.get_vocab_size() != vocab_size:
        raise InputError(
            f"the text is too small for a vocabulary of {vocab_size}: it gives {engine.get_vocab_size()}; "
            "add text or give a smaller --train-bpe"
        )
    # What a user of the tokenizer gets: <s> in front, as with the published one. Documents get both from `encode`.
    engine.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNK,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # else token_type_ids too, which Apertus does not take
    }
    files = {
        "tokenizer.json": engine.to_str(pretty=True).encode() + b"\n",
        "tokenizer_config.json": json.dumps(config, indent=2, sort_keys=True).encode() + b"\n",
    }
    info = TokenizerInfo("trained", vocab_size, *(SPECIAL_TOKENS.index(token) for token in (BOS, EOS, PAD, UNK)))
    engine.encode_special_tokens = special_tokens == "text"
    return CorpusTokenizer(engine, info, files)


def check_vocab_size(vocab_size: int) -> None:
    """Refuse a vocabulary that cannot hold every byte."""
    if vocab_size < MINIMUM_BPE:
        raise InputError(f"--train-bpe {vocab_size}: must be at least {MINIMUM_BPE} (256 bytes, 4 special tokens)")


def read(
    path: Path, *, special_tokens: str = "text", bos: str | None = None, eos: str | None = None
) -> CorpusTokenizer:
    """Read an existing Hugging Face tokenizer.

    Args:
        path: a folder with tokenizer.json, or that file.
        special_tokens: "text": a special token's text in a document stays text; "parse": it becomes the token.
        bos, eos: first and last token of a document; None: as tokenizer_config.json says, else `<s>` and `</s>`.

    Raises:
        InputError: it is not there, cannot be read, or lacks these tokens.
    """
    main = path / "tokenizer.json" if path.is_dir() else path
    if not main.exists():
        raise InputError(
            f"{main}: no such file; --tokenizer takes a folder on this machine that holds tokenizer.json, or that file"
        )
    companions = {name: path / name for name in _COMPANIONS} if path.is_dir() else {}
    try:
        files = {"tokenizer.json": main.read_bytes()}
        files |= {name: file.read_bytes() for name, file in companions.items() if file.is_file()}
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
        if not isinstance(config, dict):
            raise ValueError("tokenizer_config.json is not an object")
        from tokenizers import Tokenizer

        engine = Tokenizer.from_str(files["tokenizer.json"].decode())
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None
    except Exception as error:  # the library raises plain Exception
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is not a tokenizer in the format of the tokenizers library: {reason}") from None
    engine.no_truncation()
    engine.no_padding()
    engine.encode_special_tokens = special_tokens == "text"
    ids = engine.get_vocab(with_added_tokens=True)
    chosen = {"bos": bos or _named(config, "bos_token") or BOS, "eos": eos or _named(config, "eos_token") or EOS}
    for option, token in chosen.items():
        if token not in ids:
            raise InputError(f"{path}: the tokenizer has no token {token!r}: name one with --{option}")
    info = TokenizerInfo(
        kind="given",
        vocab_size=max(ids.values()) + 1,
        bos_id=ids[chosen["bos"]],
        eos_id=ids[chosen["eos"]],
        pad_id=ids.get(_named(config, "pad_token") or PAD),
        unk_id=ids.get(_named(config, "unk_token") or UNK),
    )
    return CorpusTokenizer(engine, info, files)


def _named(config: dict[str, Any], key: str) -> str | None:
    """A token of tokenizer_config.json, which may be written as text or as an object."""
    token = config.get(key)
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None

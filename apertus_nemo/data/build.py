"""Text into a built corpus: tokenizer, Megatron's .bin/.idx, manifest. Complete or absent, and byte-reproducible.

    manifest = build(find(["*.txt"]), Path("corpus"), train_bpe=4096)

The inputs are streamed, once with an existing tokenizer and twice when one is trained; a file that
changes between the two is refused. The folder is made beside the output, synced, and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.metadata
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apertus_nemo import __version__
from apertus_nemo.data import manifest as manifests
from apertus_nemo.data import tokenizer as tokenizers
from apertus_nemo.data.chat_format import ChatEncoder
from apertus_nemo.data.chat_rows import ChatReader
from apertus_nemo.data.manifest import FileEntry, InputEntry, Manifest
from apertus_nemo.data.sources import Reader, RowReader, Source
from apertus_nemo.data.tokenizer import CorpusTokenizer
from apertus_nemo.errors import InputError
from apertus_nemo.record.files import sync_folder, writing

Progress = Callable[[str, int], None]  # (what is done, input bytes of this pass read so far)
_BATCH_CHARACTERS = 1 << 20  # text handed to the tokenizer at once


@dataclass(frozen=True)
class ChatOptions:
    """How conversations are encoded; see `chat_format.ChatEncoder`."""

    date: str | None = None  # of the default system turn
    max_tokens: int | None = None
    drop_longer: bool = False


def build(
    sources: Sequence[Source],
    output: Path,
    *,
    tokenizer: Path | None = None,
    train_bpe: int | None = None,
    text_key: str = "text",
    special_tokens: str = "text",
    bos: str | None = None,
    eos: str | None = None,
    chat: ChatOptions | None = None,
    force: bool = False,
    progress: Progress = lambda what, size: None,
) -> Manifest:
    """Build a corpus folder and return its manifest.

    Args:
        sources: what to read, in this order.
        output: the folder to make; its parent folders are made too.
        tokenizer: an existing tokenizer (see `tokenizer.read`); exactly one of this and `train_bpe`.
        train_bpe: vocabulary of a byte-level BPE to train on the text.
        text_key, special_tokens, bos, eos: see `sources.Reader` and `tokenizer.read`.
        chat: the sources hold conversations, and become the tokens of the chat format; wants `tokenizer`.
        force: replace `output` if it is a built corpus.
        progress: called often.

    Raises:
        InputError: anything wrong with inputs, tokenizer or output; nothing is left behind.
        UnfitEnvironment: the disk is full or cannot be written.
    """
    if (tokenizer is None) == (train_bpe is None):
        raise InputError("give either a tokenizer or the size of one to train")
    if chat is not None and tokenizer is None:
        raise InputError("chat data take the tokenizer of the model that is tuned: give it with --tokenizer")
    output = Path(os.path.abspath(output))
    _check_output(output, force)
    if train_bpe is not None:
        tokenizers.check_vocab_size(train_bpe)
    with writing(output), _made_beside(output) as folder:
        first: list[RowReader[Any]] = [Reader(source, text_key=text_key) for source in sources]
        second = first
        if train_bpe is not None:
            documents = _documents(first, "training the tokenizer", progress)
            chosen = _train(documents, train_bpe, special_tokens)
            second = [Reader(source, text_key=text_key) for source in sources]
        else:
            assert tokenizer is not None
            chosen = tokenizers.read(tokenizer, special_tokens=special_tokens, bos=bos, eos=eos)
        if chat is not None:
            assert tokenizer is not None
            encoder = ChatEncoder(chosen, of=str(tokenizer), **vars(chat))
            first = second = [ChatReader(source, text_key=text_key) for source in sources]
            encode: Callable[[list[Any]], list[list[int]]] = encoder.encode
        else:
            encode = chosen.encode
        documents = _documents(second, "tokenizing", progress)
        vocab_size, prefix = chosen.info.vocab_size, folder / manifests.PREFIX
        count, tokens, dtype = _write_indexed(documents, encode, vocab_size, prefix)
        for before, after in zip(first, second, strict=True):
            if before.sha256 != after.sha256:
                raise InputError(f"{before.source.label} changed while it was read: build again")
        _write_tokenizer(folder / manifests.TOKENIZER, chosen)
        manifest = Manifest(
            files=_entries(folder),
            tokenizer=chosen.info if chat is None else encoder.tokenizer_info,
            documents=count,
            empty_documents=sum(reader.empty_documents for reader in second),
            tokens=tokens,
            dtype=dtype,
            inputs=tuple(InputEntry(r.source.name, r.source.format, r.size_bytes, r.sha256) for r in second),
            text_key=text_key,
            special_tokens=special_tokens,
            built_with=versions(),
            chat=None if chat is None else encoder.info,
        )
        (folder / manifests.MANIFEST).write_bytes(manifests.canonical(manifest))
        (folder / manifests.MANIFEST_SUM).write_bytes(manifests.sum_line(manifest))
        sync_tree(folder)
        _put_in_place(folder, output, force)
    return manifest


def versions() -> dict[str, str]:
    """The packages whose code decides the bytes of a built corpus."""
    packages = ("megatron-core", "tokenizers")
    return {"apertus-nemo": __version__, **{name: importlib.metadata.version(name) for name in packages}}


def _check_output(output: Path, force: bool) -> None:
    if not os.path.lexists(output):
        return
    if output.is_symlink() or not output.is_dir():
        raise InputError(f"{output} exists and is not a folder: name another --output")
    if not any(output.iterdir()):
        return
    if not (output / manifests.MANIFEST).is_file():
        raise InputError(f"{output} holds other files: name another --output")
    if not force:
        raise InputError(f"{output} is a built corpus already: name another --output, or replace it with --force")


@contextlib.contextmanager
def _made_beside(output: Path) -> Iterator[Path]:
    """A new folder in the output's parent, on the same file system; gone afterwards unless it was renamed."""
    missing = []
    for parent in output.parents:
        if parent.exists():
            break
        missing.append(parent)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError):
        raise InputError(f"{output.parent} is not a folder: name another --output") from None
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.building-", dir=output.parent))
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not output.exists():
            for parent in missing:
                with contextlib.suppress(OSError):
                    parent.rmdir()


def _documents(readers: Sequence[RowReader[Any]], what: str, progress: Progress) -> Iterator[Any]:
    done = 0
    for reader in readers:
        for document in reader:
            yield document
            progress(what, done + reader.size_bytes)
        done += reader.size_bytes
        progress(what, done)


def _train(documents: Iterator[str], vocab_size: int, special_tokens: str) -> CorpusTokenizer:
    """`tokenizer.train`, with an error of the inputs passed on whatever the library makes of it."""
    failure: list[BaseException] = []

    def watched() -> Iterator[str]:
        try:
            yield from documents
        except BaseException as error:
            failure.append(error)
            raise

    try:
        return tokenizers.train(watched(), vocab_size, special_tokens=special_tokens)
    except BaseException:
        if failure:
            raise failure[0] from None
        raise


def _write_indexed(
    documents: Iterator[Any], encode: Callable[[list[Any]], list[list[int]]], vocab_size: int, prefix: Path
) -> tuple[int, int, str]:
    """Tokenize into prefix.bin and prefix.idx; (documents, tokens, dtype)."""
    writer: Any = None
    dtype, count, tokens = "", 0, 0
    for batch in _batches(documents):
        sequences = encode(batch)
        if writer is None:  # imported when the first text is good: a mistake in it is told at once
            megatron = _indexed_dataset()
            kind = megatron.DType.optimal_dtype(vocab_size)
            dtype = kind.__name__
            writer = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=kind)
        for sequence in sequences:
            writer.add_document(sequence, [len(sequence)])
            count += 1
            tokens += len(sequence)
    if writer is None or not count:
        raise InputError("no document has any text: nothing to build")
    writer.finalize(f"{prefix}.idx")
    return count, tokens, dtype


def _indexed_dataset() -> Any:
    """Megatron's module, imported without its remarks about features that nobody here asked for."""
    log = logging.getLogger("megatron")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("megatron.core.datasets.indexed_dataset")
    finally:
        log.setLevel(level)


def _batches(documents: Iterator[Any]) -> Iterator[list[Any]]:
    batch: list[Any] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_tokenizer(folder: Path, tokenizer: CorpusTokenizer) -> None:
    folder.mkdir()
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)


def _entries(folder: Path) -> tuple[FileEntry, ...]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return tuple(FileEntry(name, *manifests.hash_file(folder / name)) for name in names)


def sync_tree(folder: Path) -> None:
    """Files and folders onto the disk."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    sync_folder(folder)


def _put_in_place(folder: Path, output: Path, force: bool) -> None:
    old: Path | None = None
    if force and output.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
        output.rename(old / "corpus")
    try:
        folder.rename(output)  # over nothing, or an empty folder
    except OSError as error:
        if old is not None:
            (old / "corpus").rename(output)
            old.rmdir()
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise InputError(f"{output} appeared while the corpus was built: name another --output") from None
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(output.parent)

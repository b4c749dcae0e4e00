"""The manifest of a built corpus: what the folder holds, and the check of every byte of it.

A built corpus is a folder:

    manifest.json       canonical JSON, no newline at its end; its SHA-256 is the *manifest digest*
    manifest.sha256     that digest, in the format of `sha256sum -c`
    corpus.bin/.idx     Megatron's indexed dataset: one sequence a document, `<s>` first, `</s>` last
    tokenizer/          what `transformers.AutoTokenizer.from_pretrained` reads

    manifest = verify(folder)   # every hash; raises Differs with the file's name
    manifest = load(folder)     # the manifest alone
    digest(manifest)            # goes into the lock

Pure Python: an auditor needs neither numpy nor torch.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apertus_nemo.errors import Differs, InputError
from apertus_nemo.recipe.schema import to_tree
from apertus_nemo.record.canonical import dumps, is_digest, loads_canonical, sha256_hex

FORMAT = "apertus-nemo corpus"
VERSION = 1
MANIFEST = "manifest.json"
MANIFEST_SUM = "manifest.sha256"
PREFIX = "corpus"  # of corpus.bin and corpus.idx
TOKENIZER = "tokenizer"  # folder of the tokenizer's files
INDEX_CACHE = "index-cache"  # folder that training may add: derived, checked and remade by itself

_SAFE_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")
_ITEM_BYTES = {"uint16": 2, "int32": 4}
_INDEX_HEADER = struct.Struct("<9sQBQQ")  # megatron/core/datasets/indexed_dataset.py: magic, version, dtype, counts
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileEntry:
    """One file of the folder."""

    path: str  # relative to the folder, with "/"
    size_bytes: int
    sha256: str  # 64 lowercase hex digits


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer's vocabulary; ids that it lacks are None."""

    kind: str  # "trained" on this corpus, or "given"
    vocab_size: int  # largest id + 1
    bos_id: int  # first token of every document
    eos_id: int  # last token of every document
    pad_id: int | None = None
    unk_id: int | None = None


@dataclass(frozen=True)
class InputEntry:
    """One file that was read: its bytes as stored, before unpacking."""

    name: str  # relative to the inputs' common folder, or an URL without credentials
    format: str  # "text" (one document) or "jsonl" (one a line)
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class ChatInfo:
    """How conversations became tokens; see `chat_format.py`."""

    format: str  # "apertus"
    assistant_start_id: int  # begins what is trained
    assistant_end_id: int  # the last token that is
    date: str | None  # in the default system turn; None: no conversation needed it
    default_systems: int  # conversations that got the default system turn
    max_tokens: int | None  # longer ones were refused, or left out
    dropped: int  # so many were left out
    longest_tokens: int
    longest_at: str  # input and line of the longest conversation
    trained_tokens: int  # labels of the loss in all conversations


@dataclass(frozen=True)
class Manifest:
    """All that is known of a built corpus."""

    files: tuple[FileEntry, ...]  # sorted by path
    tokenizer: TokenizerInfo
    documents: int
    empty_documents: int  # JSONL records without text: left out
    tokens: int  # BOS and EOS included
    dtype: str  # of the ids in corpus.bin: "uint16" or "int32"
    inputs: tuple[InputEntry, ...]  # in the order of reading
    text_key: str  # key of a JSONL record that holds the text
    special_tokens: str  # "text": `</s>` in a document stays text; "parse": it becomes the token
    built_with: Mapping[str, str]  # package: version
    chat: ChatInfo | None = None  # None: documents of text, and the manifest has no such key


def canonical(manifest: Manifest) -> bytes:
    """The bytes of manifest.json."""
    tree = {"format": FORMAT, "version": VERSION, **to_tree(manifest), "built_with": dict(manifest.built_with)}
    if manifest.chat is None:
        del tree["chat"]
    return dumps(tree)


def digest(manifest: Manifest) -> str:
    """The manifest digest: SHA-256 of the canonical bytes, 64 hex digits."""
    return sha256_hex(canonical(manifest))


def sum_line(manifest: Manifest) -> bytes:
    """What manifest.sha256 holds."""
    return f"{digest(manifest)}  {MANIFEST}\n".encode()


def load(folder: Path) -> Manifest:
    """Read and check the manifest, not the files that it names.

    Raises:
        InputError: the folder is not a built corpus, or one of another version.
        Differs: manifest.json is not what manifest.sha256 says.
    """
    try:
        data = (folder / MANIFEST).read_bytes()
        stated = (folder / MANIFEST_SUM).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        missing = Path(error.filename or folder).name
        raise InputError(
            f"{folder} is not a built corpus: it has no {missing}; make one with `apertus-nemo data build`"
        ) from None
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None
    actual = sha256_hex(data)
    if stated != f"{actual}  {MANIFEST}\n".encode():
        raise Differs(f"{folder / MANIFEST}: its SHA-256 is {actual}, which is not what {MANIFEST_SUM} says")
    tree = loads_canonical(data, what=str(folder / MANIFEST))
    try:
        if tree["format"] != FORMAT:
            raise ValueError(f"format is {tree['format']!r}")
        if tree["version"] != VERSION:
            raise ValueError(f"version is {tree['version']!r}, known here is {VERSION}")
        return _from_tree(tree)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / MANIFEST} is not the manifest of a corpus ({error}): build it again") from None


def verify(folder: Path, *, read: Callable[[], None] = lambda: None) -> Manifest:
    """Read every byte of a built corpus and hold it against the manifest; `read` is called once a block.

    Raises:
        InputError: the folder is not a built corpus.
        Differs: a file is missing, too much, or has other bytes; the message names the first one.
    """
    manifest = load(folder)
    named = {entry.path for entry in manifest.files} | {MANIFEST, MANIFEST_SUM}
    for path in _files_below(folder):
        if path not in named:
            raise Differs(f"{folder / path}: the manifest does not name this file; remove it or build the corpus again")
    for entry in manifest.files:
        _check_file(folder / entry.path, entry, read)
    _check_index(folder, manifest)
    return manifest


def hash_file(path: Path, *, read: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """(size in bytes, SHA-256) of a file, read as a stream; `read` is called once a block."""
    size, state = 0, hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            size += len(block)
            state.update(block)
            read()
    return size, state.hexdigest()


def _files_below(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if (not path.is_dir() or path.is_symlink()) and not name.startswith(f"{INDEX_CACHE}/"):
            yield name


def _check_file(path: Path, entry: FileEntry, read: Callable[[], None]) -> None:
    try:
        size, actual = hash_file(path, read=read)
    except FileNotFoundError:
        raise Differs(f"{path}: missing, but the manifest names it") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if size != entry.size_bytes:
        raise Differs(f"{path}: has {size} bytes, the manifest says {entry.size_bytes}")
    if actual != entry.sha256:
        raise Differs(f"{path}: its SHA-256 is {actual}, the manifest says {entry.sha256}")


def _check_index(folder: Path, manifest: Manifest) -> None:
    """The counts in the manifest against those in the files."""
    with (folder / f"{PREFIX}.idx").open("rb") as stream:
        header = stream.read(_INDEX_HEADER.size)
    counts = _INDEX_HEADER.unpack(header)[3:] if len(header) == _INDEX_HEADER.size else None
    tokens = (folder / f"{PREFIX}.bin").stat().st_size // _ITEM_BYTES[manifest.dtype]
    if counts != (manifest.documents, manifest.documents + 1) or tokens != manifest.tokens:
        raise InputError(f"{folder / MANIFEST}: its counts are not those of {PREFIX}.idx: build the corpus again")


def _from_tree(tree: dict[str, Any]) -> Manifest:
    """The manifest in parsed JSON; ValueError, KeyError or TypeError for anything else."""
    fields = {key: value for key, value in tree.items() if key not in ("format", "version")}
    manifest = Manifest(
        **{
            **fields,
            "files": tuple(FileEntry(**entry) for entry in fields["files"]),
            "inputs": tuple(InputEntry(**entry) for entry in fields["inputs"]),
            "tokenizer": TokenizerInfo(**fields["tokenizer"]),
            "chat": ChatInfo(**fields["chat"]) if "chat" in fields else None,
        }
    )
    paths = [entry.path for entry in manifest.files]
    if paths != sorted(set(paths)) or not {f"{PREFIX}.bin", f"{PREFIX}.idx", f"{TOKENIZER}/tokenizer.json"} <= {*paths}:
        raise ValueError("the list of files is incomplete")
    for entry in manifest.files:
        if not _SAFE_PATH.fullmatch(entry.path) or not is_digest(entry.sha256):
            raise ValueError(f"bad entry {entry.path!r}")
    counts = (manifest.documents, manifest.tokens, manifest.tokenizer.vocab_size, manifest.tokenizer.eos_id)
    if not all(type(count) is int and count >= 0 for count in counts) or manifest.dtype not in _ITEM_BYTES:
        raise ValueError("bad counts")
    return manifest

"""The embedded data: text that comes with the running Python, and conversations of our own making.

    folder = embedded(cache_dir, vocab_size=4096)
    folder = embedded_chat(cache_dir, vocab_size=4096)      # see chat_examples.py

`pydoc_data.topics` (one document a topic) and the standard library's .py files (one document each),
6 MB: some 1.6 million tokens at a vocabulary of 4096. Nothing is downloaded. The folder is built
once, named by everything that decides its bytes, and verified byte by byte whenever it is used again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from apertus_nemo.data import build as builder
from apertus_nemo.data import chat_examples
from apertus_nemo.data import manifest as manifests
from apertus_nemo.data.chat_rows import KEY
from apertus_nemo.data.sources import Source
from apertus_nemo.errors import Differs, InputError, UnfitEnvironment
from apertus_nemo.record.files import writing

BUILDER_VERSION = 2  # raise it when the same inputs give other bytes
MAXIMUM_BYTES = 6_000_000  # files are taken up to this sum, by the hashes of their names: from all over the library
MINIMUM_BYTES = 2_000_000  # less is not the standard library

# Not prose or everyday code (tables of encodings), generated for one machine, not part of every
# installation (distributions package them apart), or tests.
_SKIPPED_FOLDERS = {
    "__pycache__", "distutils", "encodings", "ensurepip", "idlelib", "idle_test", "lib2to3", "msilib", "pydoc_data",
    "site-packages", "dist-packages", "test", "tests", "tkinter", "turtledemo",
}  # fmt: skip
_SKIPPED_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize", "turtle.py")

_NO_TEXT = (
    "this Python comes without its documentation or the sources of its standard library, which data.source=embedded "
    "reads: use another Python, or data.source=built"
)


def texts() -> list[tuple[str, bytes]]:
    """(name, UTF-8 text) of each document, sorted by name, at most MAXIMUM_BYTES in all.

    Raises:
        UnfitEnvironment: this Python comes without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UnfitEnvironment(_NO_TEXT) from None
    documents = {f"topics/{name}": text.encode() for name, text in topics.items()}
    total = sum(map(len, documents.values()))
    library = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(library).as_posix() for path in _library_files(library)]
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        data = (library / name).read_bytes()
        if data and total + len(data) <= MAXIMUM_BYTES and _is_utf8(data):
            documents[f"library/{name}"] = data
            total += len(data)
    if total < MINIMUM_BYTES:
        raise UnfitEnvironment(_NO_TEXT)
    return sorted(documents.items())


def embedded(cache_dir: Path, vocab_size: int, *, progress: builder.Progress = lambda what, size: None) -> Path:
    """The folder of the embedded corpus below `cache_dir`, built now or verified.

    Safe for several processes at once: the first builds, the others wait and verify.

    Args:
        cache_dir: made if missing.
        vocab_size: of the byte-level BPE that is trained on the text.
        progress: called while building.

    Raises:
        InputError: the vocabulary is out of range.
        Differs: the cached folder is damaged; the message names the file.
        UnfitEnvironment: this Python comes without its sources, or the cache cannot be written.
    """
    documents = texts()
    folder = _folder(cache_dir, vocab_size, documents)
    sources = [
        Source(name, name, "text", lambda data=data: io.BytesIO(data), len(data))  # type: ignore[misc]
        for name, data in documents
    ]

    def make() -> None:
        builder.build(sources, folder, train_bpe=vocab_size, progress=progress)

    return _built_once(cache_dir, folder, make)


def embedded_chat(cache_dir: Path, vocab_size: int, *, progress: builder.Progress = lambda what, size: None) -> Path:
    """The folder of the embedded conversations, with the embedded corpus' tokenizer; as `embedded` for the rest."""
    text = embedded(cache_dir, vocab_size, progress=progress)
    folder = _chat_folder(cache_dir, text)
    data = chat_examples.examples()
    source = Source("conversations.jsonl", "conversations.jsonl", "jsonl", lambda: io.BytesIO(data), len(data))

    def make() -> None:
        with tempfile.TemporaryDirectory() as tokenizer:
            for name, content in chat_examples.chat_tokenizer(text / manifests.TOKENIZER).items():
                (Path(tokenizer) / name).write_bytes(content)
            chat = builder.ChatOptions(date=chat_examples.DATE)
            builder.build([source], folder, tokenizer=Path(tokenizer), text_key=KEY, chat=chat, progress=progress)

    return _built_once(cache_dir, folder, make)


def _built_once(cache_dir: Path, folder: Path, make: Callable[[], None]) -> Path:
    if not folder.exists():
        with writing(cache_dir):
            cache_dir.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(cache_dir / f".{folder.name}.lock"):
            if not folder.exists():
                try:
                    make()
                except InputError:
                    if not folder.exists():  # where locks do not work, another process may have been first
                        raise
    try:
        manifests.verify(folder)
    except Differs as difference:
        raise Differs(f"{difference}; remove {folder} to have it built again") from None
    return folder


def embedded_folder(cache_dir: Path, vocab_size: int) -> Path:
    """Where `embedded` has it, or would build it; nothing is built or verified.

    Raises UnfitEnvironment where this Python comes without the text.
    """
    return _folder(cache_dir, vocab_size, texts())


def embedded_chat_folder(cache_dir: Path, vocab_size: int) -> Path:
    """Where `embedded_chat` has it, or would build it. Raises InputError where the embedded corpus is not built."""
    return _chat_folder(cache_dir, embedded_folder(cache_dir, vocab_size))


def _chat_folder(cache_dir: Path, text: Path) -> Path:
    identity = {
        "builder": BUILDER_VERSION,
        "packages": builder.versions(),
        "corpus": manifests.digest(manifests.load(text)),
        "conversations": hashlib.sha256(chat_examples.examples()).hexdigest(),
        "date": chat_examples.DATE,
    }
    return cache_dir / f"embedded-chat-{_key(identity)}"


def _key(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _folder(cache_dir: Path, vocab_size: int, documents: list[tuple[str, bytes]]) -> Path:
    """Named by everything that decides the bytes of what is inside."""
    identity = {
        "builder": BUILDER_VERSION,
        "python": platform.python_version(),
        "packages": builder.versions(),
        "vocab_size": vocab_size,
        "documents": [[name, hashlib.sha256(data).hexdigest()] for name, data in documents],
    }
    return cache_dir / f"embedded-{_key(identity)}"


def _library_files(library: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(library):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        for name in files:
            if name.endswith(".py") and not name.startswith(_SKIPPED_FILES):
                yield Path(parent) / name


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Hold a file's lock; where the file system has none, go on: building twice is waste, not harm."""
    import fcntl

    with writing(path):
        stream = path.open("w")
    with stream:
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield

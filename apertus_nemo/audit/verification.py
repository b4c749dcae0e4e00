"""What a verification finds, and how it reads: what cannot be read of a file is blamed on that file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from apertus_nemo.audit.chain import MAX_FINDINGS
from apertus_nemo.audit.finding import Finding
from apertus_nemo.audit.trees import hash_files
from apertus_nemo.errors import InputError
from apertus_nemo.record.canonical import sha256_hex
from apertus_nemo.record.places import AnyPath, names, printable, read

_MAX_BYTES = 16 * 2**20  # of lock, observation, seal, or list of tensors
_MAX_SEALED_BYTES = 128 * 2**20  # of a file that end.json or the lock names


@dataclass
class Verification:
    """What was found."""

    record: str
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    finished: bool = False  # end.json is there, and agrees
    last_step: int | None = None
    planned_steps: int | None = None
    lines: int = 0  # of the step log
    sealed_step: int | None = None  # an unfinished log was made durable up to this step
    states: int = 0  # lists of tensors that agree with the log
    checkpoints: list[int] = field(default_factory=list)  # steps of whole checkpoints
    pruned: list[int] = field(default_factory=list)  # steps whose checkpoints the run removed by its own policy
    removed: list[int] = field(default_factory=list)  # steps whose checkpoints somebody else removed
    files: int = 0  # whose bytes were hashed, the log's segments not counted
    size_bytes: int = 0  # of them
    lock_digest: str | None = None
    record_digest: str | None = None  # SHA-256 of end.json

    @property
    def exit_code(self) -> int:
        """0: all that was checked is as it was written; 1: something is not."""
        return 1 if self.findings else 0


def names_in(folder: AnyPath) -> list[str]:
    """The names in a folder of a record, sorted. Raises InputError where it cannot be read."""
    try:
        return sorted(names(folder))
    except OSError as error:
        raise InputError(f"could not read {folder}: {error.strerror or error}") from error


class Ground:
    """A record, and what has been found in it so far."""

    def __init__(self, root: AnyPath) -> None:
        self._root = root
        self._result = Verification(str(root))
        self._hashes: dict[str, str] = {}  # name -> SHA-256 of files that were read

    def _find(self, file: str, what: str, line: int | None = None, step: int | None = None) -> None:
        if line is None and self._was_found(printable(file)):
            return  # one is enough, and the first is the cause
        if len(self._result.findings) < MAX_FINDINGS:
            self._result.findings.append(Finding(printable(file), printable(what), line, step))

    @contextmanager
    def _blaming(self, file: str) -> Iterator[None]:
        """An InputError or OSError of the block is a finding in `file`."""
        try:
            yield
        except InputError as error:
            reason = str(error).removeprefix(f"{self._root / file}").removeprefix(file)
            self._find(file, re.sub(r"^[: ]+", "", reason))
        except OSError as error:
            self._find(file, f"cannot be read: {error.strerror or error}")

    def _exists(self, name: str) -> bool:
        place = self._root / name
        return place.exists() or (isinstance(place, Path) and place.is_symlink())

    def _bytes(self, name: str) -> bytes:
        data = read(self._root / name, max_bytes=_MAX_BYTES)
        if name not in self._hashes:
            self._hashes[name] = sha256_hex(data)
            self._result.files += 1
            self._result.size_bytes += len(data)
        return data

    def _sha256(self, name: str) -> str:
        if name not in self._hashes:
            self._bytes(name)
        return self._hashes[name]

    def _hash_one(self, file: str, digest: str, witness: str) -> None:
        if self._was_found(file):
            return
        if file not in self._hashes:
            found = next(hash_files(self._root, {file: _MAX_SEALED_BYTES}, at_most=True))
            if found.error:
                self._find(file, found.error)
                return
            self._hashes[file] = found.sha256
            self._result.files += 1
            self._result.size_bytes += found.size_bytes
        if self._hashes[file] != digest:
            self._find(file, f"is not the one that {witness} names: it was changed or exchanged")

    def _was_found(self, file: str) -> bool:
        return any(finding.file == file for finding in self._result.findings)

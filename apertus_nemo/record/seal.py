"""Seals: files that say how far a step log went, so that lines cut off its end are missed.

    write_seal(folder, attempt=0, mark=log.mark())        # attempts/000/seal.json, whenever the log was made durable
    write_end(folder, attempt=0, mark=log.mark())    # end.json, once the last step is done
    Seal.from_bytes(data, what="end.json")

The chain of a log protects every line but the last, and cannot show that lines are missing after it. A seal names the
number of lines and the hash of the last one. `end.json` also holds the SHA-256 of the files that no other digest of
the record covers; the SHA-256 of `end.json` itself is the *record digest*, the name of the whole record. Every seal
carries the digest of its own fields, so that a changed seal is told from a changed log.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apertus_nemo.errors import InputError
from apertus_nemo.record.canonical import dumps, is_digest, loads_canonical, sha256_hex
from apertus_nemo.record.files import file_sha256, reading, write_atomic

FORMAT = 1
KIND = "apertus-nemo seal"
END = "end.json"
SEAL = "seal.json"  # in the folder of an attempt
START = "start.json"  # there too: what the attempt was started with
MAX_BYTES = 16 * 2**20

# What end.json holds the SHA-256 of. Not: steps/ and states/ (the chain covers them), the files of checkpoints (their
# manifests do), and what processes still write at the end (output of ranks) or people read only (TensorBoard).
_ROOT = re.compile(r"(?:checkpoints\.json|lock\.json|observed\.json|recipe\.yaml|relaunch\.json|source\.[a-z.]+)\Z")
_ATTEMPT = re.compile(r"[0-9]{3,6}\Z")
_CHECKPOINT = re.compile(r"step-[0-9]{9}\Z")
SEALED = re.compile(
    r"(?:checkpoints\.json|lock\.json|observed\.json|recipe\.yaml|relaunch\.json|source\.[a-z.]+"
    r"|attempts/[0-9]{3,6}/(?:environment|observed|outcome|seal|start)\.json|checkpoints/step-[0-9]{9}/manifest\.json)\Z"
)


@dataclass(frozen=True)
class LogMark:
    """How far a step log goes."""

    header: str  # SHA-256 of line 0, the header
    lines: int  # complete lines, the header included
    last_line: str  # SHA-256 of the last of them
    last_step: int | None  # None: the header stands alone

    def tree(self) -> dict[str, Any]:
        """As it stands in a seal."""
        return {
            "header": self.header,
            "last_line": self.last_line,
            "last_step": self.last_step,
            "lines": self.lines,
        }


@dataclass(frozen=True)
class Seal:
    """A seal that was read: of an attempt (`files` is empty), or the one of the end (`end` is None)."""

    attempt: int  # that wrote it
    mark: LogMark
    files: dict[str, str]  # name in the record -> SHA-256
    end: str | None  # the record digest, once the attempt has written end.json

    @classmethod
    def from_bytes(cls, data: bytes, *, what: str) -> Seal:
        """Read `end.json` or an attempt's `seal.json`; raises InputError, beginning with `what`."""
        tree = loads_canonical(data, what=what, max_bytes=MAX_BYTES)
        if not isinstance(tree, dict) or tree.get("kind") != KIND:
            raise InputError(f"{what}: is not a seal")
        if tree.get("format") != FORMAT:
            raise InputError(f"{what}: has format {str(tree.get('format'))[:40]}; this version reads {FORMAT}")
        body = {key: value for key, value in tree.items() if key != "digest"}
        digest = tree.get("digest")
        member = f'"digest":"{digest}",'.encode() if is_digest(digest) else b""
        if not member or sha256_hex(data.replace(member, b"", 1)) != digest:  # the rest of it is canonical as it stands
            raise InputError(f"{what}: does not have the digest that it names: it was changed after it was written")
        names = {"attempt", "end", "files", "format", "header", "kind", "last_line", "last_step", "lines"}
        attempt, files, step, lines = (body.get(name) for name in ("attempt", "files", "last_step", "lines"))
        if (
            set(body) != names
            or not isinstance(files, dict)
            or not all(SEALED.match(name) and is_digest(digest) for name, digest in files.items())
            or not (is_digest(body["header"]) and is_digest(body["last_line"]))
            or not (type(attempt) is int and attempt >= 0)
            or not (step is None or (type(step) is int and step >= 0))
            or not (type(lines) is int and lines >= 1)
            or not (body["end"] is None or is_digest(body["end"]))
        ):
            raise InputError(f"{what}: is not a seal")
        mark = LogMark(header=body["header"], lines=lines, last_line=body["last_line"], last_step=step)
        return cls(attempt, mark, files, body["end"])


def _to_bytes(seal: Seal) -> bytes:
    body = {
        **seal.mark.tree(),
        "attempt": seal.attempt,
        "end": seal.end,
        "files": seal.files,
        "format": FORMAT,
        "kind": KIND,
    }
    return dumps({**body, "digest": sha256_hex(dumps(body))})


def write_seal(folder: Path, *, attempt: int, mark: LogMark, end: str | None = None) -> None:
    """Write `attempts/<attempt>/seal.json` of the run directory `folder`, over the one before.

    `mark` must be durable already. Raises UnfitEnvironment where the disk does not allow it.
    """
    write_atomic(Path(folder) / "attempts" / f"{attempt:03d}" / SEAL, _to_bytes(Seal(attempt, mark, {}, end)))


def write_end(folder: Path, *, attempt: int, mark: LogMark) -> str:
    """Write `end.json`, then the attempt's seal, which says that there is one. Returns the record digest.

    Call it when the log is durable and the last checkpoint committed.
    """
    folder, own = Path(folder), f"attempts/{attempt:03d}/{SEAL}"  # which is written last
    files = {name: file_sha256(folder / name) for name in _sealed(folder) if name != own}
    data = _to_bytes(Seal(attempt, mark, files, None))
    write_atomic(folder / END, data)
    digest = sha256_hex(data)
    write_seal(folder, attempt=attempt, mark=mark, end=digest)
    return digest


def _sealed(folder: Path) -> list[str]:
    with reading(folder):
        names = [name for name in os.listdir(folder) if _ROOT.match(name)]
        for parent, pattern, file in (
            ("attempts", _ATTEMPT, "environment.json"),
            ("attempts", _ATTEMPT, "observed.json"),
            (
                "attempts",
                _ATTEMPT,
                "outcome.json",
            ),  # of earlier attempts: this one's is written when the ranks are gone
            ("attempts", _ATTEMPT, SEAL),
            ("attempts", _ATTEMPT, START),
            ("checkpoints", _CHECKPOINT, "manifest.json"),
        ):
            inner = os.listdir(folder / parent) if (folder / parent).is_dir() else []
            names += [f"{parent}/{name}/{file}" for name in inner if pattern.match(name)]
    return sorted(name for name in names if (folder / name).is_file())

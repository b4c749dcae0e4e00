"""`relaunch.json`: of which run a run is the relaunch, what that one had observed, and what was let differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from apertus_nemo.errors import InputError
from apertus_nemo.record.canonical import dumps, loads_canonical
from apertus_nemo.record.files import read_bytes
from apertus_nemo.record.run_dir import RunDirectory

FORMAT = 1
_MAX_BYTES = 2**20


@dataclass(frozen=True)
class Relaunched:
    """What a relaunch knows of the original."""

    lock_digest: str
    run_id: str
    observed: Any  # content of its observed.json, or unknown with the reason
    allowed: tuple[str, ...]  # names of fields that may differ, as given

    def to_bytes(self) -> bytes:
        """The file: canonical JSON."""
        of = {"lock_digest": self.lock_digest, "observed": self.observed, "run_id": self.run_id}
        return dumps({"allowed": list(self.allowed), "format": FORMAT, "relaunch_of": of})

    @classmethod
    def read(cls, directory: RunDirectory) -> Relaunched | None:
        """The file of a run directory; None where it is no relaunch. Raises InputError where it is broken."""
        what = str(directory.relaunch)
        if not directory.relaunch.exists():
            return None
        tree = loads_canonical(read_bytes(directory.relaunch, max_bytes=_MAX_BYTES), what=what)
        try:
            of, allowed = tree["relaunch_of"], tree["allowed"]
            found = cls(of["lock_digest"], of["run_id"], of["observed"], tuple(allowed))
            if (
                tree["format"] != FORMAT
                or not isinstance(found.observed, dict)
                or not all(isinstance(name, str) for name in (*allowed, *of["run_id"]))
            ):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{what}: is not the note of a relaunch") from None
        return found

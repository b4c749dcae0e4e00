"""Verify the record of a run: every file is as it was written, and nothing is missing or too much.

    result = verify("runs/a")                    # or the URL of a copy
    result.findings                              # empty: whole; each names file, line and step
    result.not_checked                           # what was not there, or what no digest covers
    result.exit_code                             # 0 or 1

Needs the record alone: no torch, no numpy, no network. What protects what: docs/verify.md. Whoever can write a record
can also write a consistent forgery: against that, hold the record digest against one that was kept elsewhere.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from apertus_nemo.audit.chain import Chain, read_chain
from apertus_nemo.audit.compare import planned_steps
from apertus_nemo.audit.trees import hash_files, read_manifest
from apertus_nemo.audit.verification import Ground, Verification, names_in
from apertus_nemo.errors import InputError
from apertus_nemo.record.attempts import FINISHED, OUTCOME, STOPPED, outcome_from_bytes
from apertus_nemo.record.canonical import is_unknown, loads_canonical
from apertus_nemo.record.checkpoint_list import LIST, CheckpointList
from apertus_nemo.record.files import FileEntry
from apertus_nemo.record.lock import RunLock
from apertus_nemo.record.places import (
    COPY,
    REPORT,
    AnyPath,
    RemotePath,
    files_below,
    locate,
    manifest_from_bytes,
    printable,
)
from apertus_nemo.record.seal import END, SEAL, SEALED, START, Seal
from apertus_nemo.record.step_log import SEGMENT_LINES

_ATTEMPT = re.compile(r"[0-9]{3,6}\Z")
_CHECKPOINT = re.compile(r"step-([0-9]{9})\Z")
_STATE = re.compile(r"step-([0-9]{9})\.json\Z")
_STATE_START = re.compile(rb'\{"digest":"([0-9a-f]{64})","format":1,"step":(0|[1-9][0-9]{0,15}),"tensors":')
_FOR_READING = (REPORT, "certificate.json")  # made from the record, and no part of it
_PARTIAL = ".partial"  # what a crash leaves


def verify(record: str | Path, *, segment_lines: int = SEGMENT_LINES) -> Verification:
    """Verify a run directory, or a copy behind an URL.

    Raises InputError where there is no record, UnfitEnvironment where an URL cannot be reached.
    """
    root = locate(record)
    if isinstance(root, Path) and not root.is_dir():
        raise InputError(f"{root} is not a folder")
    top = set(names_in(root))
    if "lock.json" not in top and END not in top and not names_in(root / "steps"):
        raise InputError(f"{root} is not the record of a run: it holds neither lock.json nor a step log")
    return _Verifier(root, top, segment_lines).run()


def _steps(steps: list[int]) -> str:
    """In words, shortened where they are many."""
    shown = ", ".join(map(str, steps[:8]))
    more = f" and {len(steps) - 8} more" if len(steps) > 8 else ""
    return f"checkpoint{'' if len(steps) == 1 else 's'} of step{'' if len(steps) == 1 else 's'} {shown}{more}"


class _Verifier(Ground):
    """One verification; its steps in order of `run`."""

    def __init__(self, root: AnyPath, top: set[str], segment_lines: int) -> None:
        super().__init__(root)
        self._top, self._segment_lines = top, segment_lines
        self._seals: dict[str, Seal] = {}  # by the name of their file
        self._end: Seal | None = None
        self._chain = Chain()
        self._copied: dict[str, FileEntry] = {}  # what the manifest of a copy names
        self._listed: CheckpointList | None = None  # checkpoints.json; None: not there, or not to be relied upon

    def run(self) -> Verification:
        self._read_copy_manifest()
        self._read_seals()
        self._log()
        self._log_against_seals()
        self._lock()
        self._observed()
        self._sealed_files()
        self._outcomes()
        self._read_list()
        self._states()
        self._checkpoints()
        self._copy()
        self._rest()
        return self._result

    def _read_copy_manifest(self) -> None:
        root = self._root
        if isinstance(root, RemotePath):
            self._copied = root.copy.files
        elif COPY in self._top:
            with self._blaming(COPY):
                self._copied = manifest_from_bytes(self._bytes(COPY), what=COPY)

    def _read_seals(self) -> None:
        numbers = [name for name in names_in(self._root / "attempts") if _ATTEMPT.match(name)]
        for file in [END, *(f"attempts/{name}/{SEAL}" for name in numbers)]:
            if self._exists(file):
                with self._blaming(file):
                    seal = Seal.from_bytes(self._bytes(file), what=file)
                    if file == END and seal.end is not None:
                        raise InputError("is the seal of an attempt")
                    if file != END and (seal.files or seal.attempt != int(file.split("/")[1])):
                        raise InputError("is not the seal of this attempt")
                    self._seals[file] = seal
        self._end = self._seals.get(END)
        if self._end is not None:
            self._result.record_digest = self._hashes[END]
        last = [(file, seal) for file, seal in self._seals.items() if seal.end is not None]
        for file, seal in last[-1:]:
            if not self._exists(END):
                self._find(END, f"is missing, though {file} names it: it was removed")
            elif self._end is not None and seal.end != self._hashes[END]:
                self._find(END, f"is not the one that {file} names: it was changed or exchanged")
                self._end = None
                del self._seals[END]

    def _log(self) -> None:
        folder = self._root / "steps"
        present = names_in(folder)
        for name in present:
            if not re.match(r"[0-9]{6}\.jsonl\Z", name):
                self._find(f"steps/{name}", "is no part of a step log")
        seals = list(self._seals.values())
        with self._blaming("steps"):
            self._chain = read_chain(
                folder,
                marks={seal.mark.lines: seal.mark.last_line for seal in seals},
                header=seals[0].mark.header if seals else None,
                segment_lines=self._segment_lines,
            )
        chain, result = self._chain, self._result
        result.findings += chain.findings
        result.lines, result.last_step = chain.lines, chain.last_step
        if chain.torn is not None:
            if self._end is not None:
                result.findings.append(chain.torn)
            else:
                result.notes.append(f"{chain.torn.place} {chain.torn.what}; starting the run again writes it anew")

    def _log_against_seals(self) -> None:
        chain, broken = self._chain, bool(self._chain.findings)
        for file, seal in sorted(self._seals.items(), key=lambda item: -item[1].mark.lines):
            mark = seal.mark
            if chain.lines == 0 and not broken:
                self._find("steps/000000.jsonl", f"is missing: {file} names {mark.lines} lines")
                break
            if (chain.last_step if chain.last_step is not None else -1) < (
                mark.last_step if mark.last_step is not None else -1
            ) or (not broken and chain.lines < mark.lines):
                if chain.torn is None or self._end is None:
                    after = "the header" if chain.last_step is None else f"step {chain.last_step}"
                    self._find_line(
                        chain.lines,
                        f"the log ends after {after}, but {file} has step {mark.last_step}: lines were cut off",
                        step=0 if chain.last_step is None else chain.last_step + 1,
                    )
                broken = True
                break
        for file, seal in self._seals.items():
            mark = seal.mark
            if broken:
                break
            if chain.hashes.get(mark.lines, mark.last_line) != mark.last_line:
                step = None if mark.last_step is None else mark.last_step
                self._find_line(mark.lines - 1, f"was changed: {file} holds another hash of it", step=step)
                broken = True
            elif file == END and chain.lines > mark.lines:
                self._find_line(mark.lines, f"was added after {file} was written")
        if not chain.findings and not broken:
            self._result.finished = self._end is not None
        if self._end is None and self._seals:
            steps = [seal.mark.last_step for seal in self._seals.values() if seal.mark.last_step is not None]
            self._result.sealed_step = max(steps, default=None)

    def _find_line(self, line: int, what: str, step: int | None = None) -> None:
        """A finding at a line that is counted from 0 through the whole log."""
        number, inside = divmod(line, self._segment_lines)
        self._find(f"steps/{number:06d}.jsonl", what, inside + 1, step)

    def _lock(self) -> None:
        file, header = "lock.json", self._chain.header
        if not self._exists(file):
            self._find(file, "is missing")
            return
        with self._blaming(file):
            found = self._sha256(file)
            if header is not None and not self._chain.header_is_blamed and found != header.lock_digest:
                self._find(file, f"is not the lock of the step log, whose digest is {header.lock_digest}")
                return
            lock = RunLock.from_bytes(self._bytes(file), what=file)
            self._result.lock_digest = found
            self._result.planned_steps = planned_steps(lock)
            self._source(lock.tree["source"])

    def _source(self, source: Any) -> None:
        """The stored source against what the lock says of it."""
        source = source if isinstance(source, dict) else {}
        patch = source.get("patch")
        for file, digest in (
            ("source.tar", source.get("archive_sha256")),
            ("source.patch", patch.get("sha256") if isinstance(patch, dict) else None),
        ):
            if not isinstance(digest, str):
                if file in self._top:
                    self._find(file, "is none that the lock names")
            elif file not in self._top:
                self._find(file, "is missing, though the lock names it")
            else:
                self._hash_one(file, digest, "the lock")

    def _observed(self) -> None:
        file, header = "observed.json", self._chain.header
        if header is None or self._chain.header_is_blamed:
            return
        named = header.observation_digest
        if is_unknown(named):
            self._result.not_checked.append("observed.json: the step log does not name it")
        elif not self._exists(file):
            self._find(file, "is missing, though the step log names it")
        else:
            with self._blaming(file):
                if self._sha256(file) != named:
                    self._find(file, f"is not the one of the step log, whose digest is {named}")
                else:
                    loads_canonical(self._bytes(file), what=file)

    def _sealed_files(self) -> None:
        if self._end is None:
            return
        own = f"attempts/{self._end.attempt:03d}/{SEAL}"
        if not self._exists(own):
            self._result.not_checked.append(f"{own}: is not here; it says that there is {END}, and is written last")
        for file, digest in self._end.files.items():
            if self._exists(file):
                self._hash_one(file, digest, END)
            elif not file.startswith("checkpoints/") or self._exists(file.rpartition("/")[0]):
                self._find(file, f"is missing, though {END} names it")

    def _outcomes(self) -> None:
        """How attempts ended: each is an outcome of this run, and says nothing that the log does not bear out."""
        for name in (name for name in names_in(self._root / "attempts") if _ATTEMPT.match(name)):
            file = f"attempts/{name}/{OUTCOME}"
            if not self._exists(file) or self._was_found(file):
                continue
            with self._blaming(file):
                outcome = outcome_from_bytes(self._bytes(file), what=file, attempt=int(name))
                last = self._chain.last_step or 0
                if outcome.cause == FINISHED and END not in self._top:
                    self._find(END, f"is missing, though {file} says that the run finished: it was removed")
                elif outcome.cause in (FINISHED, STOPPED) and (outcome.step or 0) > last and not self._result.findings:
                    # Of other causes the last lines may have been lost with the machine: they were not durable.
                    self._find(file, f"says that step {outcome.step} was done, and the log ends at step {last}")
            if self._end is not None and file not in self._end.files:
                if int(name) < self._end.attempt:
                    self._find(file, f"was added after {END} was written")
                else:
                    self._result.not_checked.append(f"{file}: written after {END}, so no digest covers it")

    def _read_list(self) -> None:
        """`checkpoints.json`, and what of it is not here: pruned by policy, left out of a copy, or removed."""
        listed = CheckpointList()
        if self._exists(LIST) and not self._was_found(LIST):
            with self._blaming(LIST):
                listed = self._listed = CheckpointList.from_bytes(self._bytes(LIST), what=LIST)
        result = self._result
        named = dict.fromkeys(self._sealed_checkpoints(), END)
        named |= {step: LIST for step, made in listed.made.items() if not made.pruned}
        gone = [step for step in sorted(named) if not self._exists(self._checkpoint_folder(step))]
        result.pruned = [
            step
            for step, made in sorted(listed.made.items())
            if made.pruned and not self._exists(self._checkpoint_folder(step))
        ]
        if result.pruned:
            result.notes.append(f"pruned by the run's own policy (trainer.keep_checkpoints): {_steps(result.pruned)}")
        if gone and self._copied and not any(name.startswith("checkpoints/") for name in self._copied):
            result.not_checked.append(f"left out of the copy: {_steps(gone)}")
            return
        result.removed = gone
        for step in gone:
            result.not_checked.append(
                f"{self._checkpoint_folder(step)}: is not here, though {named[step]} names it: somebody removed it, "
                "not the run"
            )

    def _sealed_checkpoints(self) -> list[int]:
        names = [] if self._end is None else self._end.files
        return [int(name.split("/")[1][5:]) for name in names if name.startswith("checkpoints/")]

    @staticmethod
    def _checkpoint_folder(step: int) -> str:
        return f"checkpoints/step-{step:09d}"

    def _against_list(self, file: str, step: int) -> None:
        """A manifest against what the run noted when it committed it."""
        if self._listed is None or self._was_found(file):
            return
        made, pending = self._listed.made.get(step), self._listed.pending
        expected = {item.manifest for item in (made, pending) if item is not None and item.step == step}
        if not expected:
            self._find(file, f"is none that {LIST} names: it was added")
        elif self._sha256(file) not in expected:
            self._find(file, f"is not the one that {LIST} names: it was changed or exchanged")

    def _states(self) -> None:
        chain, result = self._chain, self._result
        logged, present = chain.states, set()
        short = result.last_step is None or any(f.file.startswith("steps/") for f in result.findings)
        for name in names_in(self._root / "states"):
            file, match = f"states/{name}", _STATE.match(name)
            if name.endswith(_PARTIAL):
                continue
            if match is None:
                self._find(file, "is no list of tensors")
                continue
            step = int(match[1])
            present.add(step)
            if step in chain.blamed_steps:
                continue
            if step not in logged:
                if not short:
                    self._find(
                        file, f"the log names no state of step {step}: the file was added, or lines were cut off"
                    )
                continue
            with self._blaming(file):
                data = self._bytes(file)
                start = _STATE_START.match(data)
                if start is None or data[-1:] != b"}":
                    self._find(file, "is not a list of tensors as it is written")
                elif (
                    int(start[2]) != step
                    or start[1].decode() != logged[step]
                    or hashlib.sha256(memoryview(data)[start.end() : -1]).hexdigest() != logged[step]
                ):
                    self._find(file, f"is not the state that the log names for step {step}")
                else:
                    result.states += 1
        for step in sorted(set(logged) - present - chain.blamed_steps):
            file = f"states/step-{step:09d}.json"
            if step == chain.last_step and not result.finished:
                result.not_checked.append(f"{file}: is not here; the run ended before it was written")
            else:
                self._find(file, f"is missing, though the log names a state of step {step}")

    def _checkpoints(self) -> None:
        for name in names_in(self._root / "checkpoints"):
            folder, match = f"checkpoints/{name}", _CHECKPOINT.match(name)
            if match is None:
                if not name.endswith(_PARTIAL):
                    self._result.not_checked.append(f"{folder}: is no checkpoint")
                continue
            self._checkpoint(folder, int(match[1]))

    def _checkpoint(self, folder: str, step: int) -> None:
        result, file = self._result, f"{folder}/manifest.json"
        if not self._exists(file):
            self._find(file, "is missing: the folder is no whole checkpoint")
            return
        before = len(result.findings)
        manifest = None
        with self._blaming(file):
            manifest = read_manifest(self._bytes(file), what=file)
        if self._end is not None and file not in self._end.files:
            self._find(file, f"was added after {END} was written")
        if manifest is None or len(result.findings) > before or self._was_found(file):
            return
        if manifest.step != step:
            self._find(file, f"is of step {manifest.step}, not of step {step}")
            return
        last = self._chain.last_step
        if (last is None or step > last) and not any(f.file.startswith("steps/") for f in result.findings):
            self._find(
                file, f"is of step {step}, and the log ends at step {last or 0}: lines were cut off, or it is foreign"
            )
            return
        header = self._chain.header
        if header is not None and not self._chain.header_is_blamed:
            if manifest.lock_digest not in (None, header.lock_digest):
                self._find(file, f"is of another run, of the lock digest {manifest.lock_digest}")
                return
        self._against_list(file, step)
        if self._was_found(file):
            return
        present: list[str] = []
        others: list[str] = []
        with self._blaming(folder):
            present, others = files_below(self._root / folder)
        for name in others:
            self._find(f"{folder}/{name}", "is neither a file nor a folder")
        listed = set(present)
        for name in sorted(listed - manifest.files.keys() - {"manifest.json"}):
            self._find(f"{folder}/{name}", "is not in the manifest: it was added")
        for name in sorted(manifest.files.keys() - listed - set(others)):
            self._find(f"{folder}/{name}", "is missing, though the manifest names it")
        sizes = {name: entry["size_bytes"] for name, entry in manifest.files.items() if name in listed}
        for found in hash_files(self._root / folder, sizes, ordinary=True):
            result.files += 1
            result.size_bytes += found.size_bytes
            if found.error or found.sha256 != manifest.files[found.name]["sha256"]:
                self._find(f"{folder}/{found.name}", found.error or "has other bytes than the manifest says")
            elif self._copied:
                self._hashes[f"{folder}/{found.name}"] = found.sha256
        if len(result.findings) == before:
            result.checkpoints.append(step)

    def _copy(self) -> None:
        """Every file that the manifest of a copy names, and no other."""
        if not self._copied:
            return
        blamed = {finding.file for finding in self._result.findings}
        # The chain and end.json cover the log of a finished run.
        pending = [
            name
            for name in self._copied
            if name not in self._hashes and name not in blamed and not (name.startswith("steps/") and self._end)
        ]
        for name in sorted((self._copied.keys() & self._hashes.keys()) - blamed):
            if self._hashes[name] != self._copied[name]["sha256"]:
                self._find(name, f"is not the one that {COPY} names")
        for found in hash_files(self._root, {name: self._copied[name]["size_bytes"] for name in sorted(pending)}):
            self._result.files += 1
            self._result.size_bytes += found.size_bytes
            if found.error or found.sha256 != self._copied[found.name]["sha256"]:
                self._find(found.name, found.error or f"is not the one that {COPY} names")
        if isinstance(self._root, RemotePath):
            present = self._root.copy.listing()
        else:
            present = files_below(self._root)[0]
        if present is None:
            self._result.not_checked.append(
                "whether other files lie beside those of the copy: the place has no listing"
            )
            return
        for name in present:
            if name not in self._copied and name not in (COPY, REPORT) and name not in blamed:
                self._find(name, f"is not in {COPY}: it was added")

    def _rest(self) -> None:
        """Say what was not checked."""
        result, skipped = self._result, self._result.not_checked
        if result.last_step is None and not result.findings:
            result.notes.append("no step was logged")
        if self._end is None and not self._exists(END):
            at = "nothing of it is sealed" if result.sealed_step is None else f"sealed up to step {result.sealed_step}"
            of = "" if result.planned_steps is None else f" of {result.planned_steps} planned"
            result.notes.append(f"unfinished: {result.last_step or 0} steps{of}, {at}")
            skipped.append("whether later lines of the log are missing: only the end of a run is sealed for good")
            which = "manifests of checkpoints" if self._listed is None else LIST
            skipped.append(f"recipe.yaml, environments of attempts, {which}: only end.json covers them")
        if not self._copied:
            outputs = 0  # files that no digest covers
            for number in names_in(self._root / "attempts"):
                inner = names_in(self._root / "attempts" / number)
                outputs += len(set(inner) - {SEAL, START, OUTCOME, "environment.json", "observed.json"})
            if outputs:
                skipped.append(f"output of the ranks and the like: {outputs} files in attempts/")
            for name in sorted(self._top - {"steps", "states", "attempts", "checkpoints", COPY, END, *_FOR_READING}):
                if not name.endswith(_PARTIAL) and not SEALED.match(name):
                    skipped.append(f"{printable(name)}: no part of a record")
        if result.checkpoints:
            skipped.append("that the tensors inside checkpoints are those of the state digests")
        skipped.append("the data and packages themselves: a record holds their digests")

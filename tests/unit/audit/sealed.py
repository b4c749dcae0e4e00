"""A small record with everything that a finished run leaves, made without training."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

from apertus_nemo.record.canonical import dumps
from apertus_nemo.record.checkpoint_list import CheckpointList, Made, write_list
from apertus_nemo.record.files import tree_manifest
from apertus_nemo.record.lock import RunLock
from apertus_nemo.record.run_dir import RunDirectory
from apertus_nemo.record.seal import write_end, write_seal
from apertus_nemo.record.state import StateDigest
from apertus_nemo.record.step_log import StepLogHeader, StepLogWriter, StepRecord
from tests.unit.record.example import lock, state, step

SEGMENT_LINES = 8  # a small log then has several segments
STEPS = 20
SAVED = (10, 20)


def small_state(number: int) -> StateDigest:
    """Four of the example's tensors."""
    return StateDigest.of(number, state(number).tensors[:4])


def make_sealed(
    path: Path,
    *,
    finished: bool = True,
    steps: int = STEPS,
    pinned: RunLock | None = None,
    segment_lines: int = SEGMENT_LINES,
    saved: tuple[int, ...] = SAVED,
    prune: bool = False,
) -> Path:
    """A run directory of two attempts, with states, checkpoints and source; without its end if not `finished`.

    prune: the run has removed its first checkpoint once it had another one.
    """
    listed = CheckpointList()
    archive, patch = b"an archive\n" * 20, b"a patch\n" * 5
    tree = dict((pinned or lock()).tree)
    tree["source"] = {**tree["source"], "archive_sha256": sha256(archive), "patch": {"sha256": sha256(patch)}}
    pinned = RunLock(tree)
    files = {"source.tar": archive, "source.patch": patch}
    run = RunDirectory.create(path, lock=pinned, recipe_yaml="name: tiny_pretrain\n", files=files)
    observed = dumps({"host": "example", "version": 1})
    run.observed.write_bytes(observed)
    for number in range(2):
        folder = run.attempt(run.new_attempt())
        (folder / "environment.json").write_text(f'{{"ATTEMPT": "{number}"}}\n')
        (folder / "rank-0.log").write_text("hello\n")
    header = StepLogHeader(pinned.digest, "1" * 32, sha256(observed))
    with StepLogWriter.open(run.steps, header, segment_lines=segment_lines) as log:
        for number in range(steps + 1):
            record = StepRecord(step=0) if number == 0 else step(number)
            if number in (0, *saved):
                found = small_state(number)
                run.state(number).write_bytes(found.to_bytes())
                record = replace(record, state_digest=found.digest)
            log.append(record)
            if number in saved:
                write_seal(run.path, attempt=0 if number == saved[0] else 1, mark=log.mark())
                checkpoint(run.checkpoint(number), number)
                manifest = sha256((run.checkpoint(number) / "manifest.json").read_bytes())
                listed = listed.committed(Made(number, manifest, 0 if number == saved[0] else 1))
                if prune and number > saved[0]:
                    listed = listed.pruned([saved[0]])
                    shutil.rmtree(run.checkpoint(saved[0]))
                write_list(run.path, listed)
        if finished:
            write_end(run.path, attempt=1, mark=log.mark())
    return run.path


def checkpoint(folder: Path, number: int) -> None:
    """A committed checkpoint with three files."""
    (folder / "weights").mkdir(parents=True)
    for index in range(2):
        (folder / "weights" / f"__{index}_0.distcp").write_bytes(bytes([number, index]) * 60)
    (folder / "weights" / "metadata.json").write_text(f'{{"backend": "torch_dist", "step": {number}}}')
    manifest = {"files": tree_manifest(folder), "step": number, "version": 1}
    (folder / "manifest.json").write_bytes(dumps(manifest))


def sha256(data: bytes) -> str:
    """As 64 hex digits."""
    return hashlib.sha256(data).hexdigest()

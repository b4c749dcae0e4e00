"""What `verify` costs: over raw hashing of the same bytes, and for a log of a million steps.

    python benchmarks/verify.py [--rounds 5] [--files 10000] [--kib 64 4] [--steps 1000000]

Makes records with that many files of each size (a checkpoint's) and one with that many steps, in a folder of its own,
then times by turns: raw hashing of every byte of the record (SHA-256, blocks of 1 MiB, one file after the other, in
Python), `sha256sum` of the same files, and `verify`, in one process, the imports done. Prints medians with quartiles;
ratios are taken round by round. Goals: the ratio of wall times to raw hashing at most 1.5; the log within 10 s of
processor time, which is its wall time where nothing else wants the processor, since a log is read by one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from figures import Figure, finish

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apertus_nemo.audit.verify import verify  # noqa: E402
from apertus_nemo.record.canonical import dumps, sha256_hex, unknown  # noqa: E402
from apertus_nemo.record.checkpoint_list import CheckpointList, Made, write_list  # noqa: E402
from apertus_nemo.record.files import tree_manifest  # noqa: E402
from apertus_nemo.record.lock import RunLock  # noqa: E402
from apertus_nemo.record.run_dir import RunDirectory  # noqa: E402
from apertus_nemo.record.seal import LogMark, write_end  # noqa: E402
from apertus_nemo.record.step_line import StepLogHeader, StepRecord  # noqa: E402
from apertus_nemo.record.step_log import SEGMENT_LINES  # noqa: E402
from tests.unit.record.example import lock  # noqa: E402

RATIO_GOAL, LOG_GOAL_S = 1.5, 10.0


def record(folder: Path, *, steps: int, files: int, size_bytes: int) -> Path:
    """A finished run of `steps` steps whose last checkpoint has `files` files of `size_bytes` random bytes."""
    tree = dict(lock().tree)
    nothing = unknown("a benchmark")
    pinned = RunLock({**tree, "source": {**tree["source"], "archive_sha256": nothing, "patch": None}})
    run = RunDirectory.create(folder, lock=pinned, recipe_yaml="name: tiny_pretrain\n")
    run.new_attempt()
    first = line = StepLogHeader(pinned.digest, "1" * 32, nothing).to_line()
    lines, count = [line], 1
    for step in range(steps + 1):
        values = StepRecord(
            step=step,
            consumed_samples=8 * step,
            consumed_tokens=256 * step,
            loss=5.0 / (step + 1),
            grad_norm=1.0 / (3 + step),
            learning_rate=1e-3,
            global_batch_size=8,
            batch_digest=hashlib.sha256(str(step).encode()).hexdigest(),
        )
        line = values.to_line(sha256_hex(line))
        lines.append(line)
        count += 1
        if len(lines) == SEGMENT_LINES or step == steps:
            number = (count - 1) // SEGMENT_LINES
            (run.steps / f"{number:06d}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
            lines = []
    if files:
        weights = run.checkpoint(steps) / "weights"
        for index in range(files):
            path = weights / f"{index % 100:02d}" / f"__{index}_0.distcp"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(os.urandom(size_bytes))
        files_of_it = tree_manifest(weights.parent)
        manifest = dumps({"files": files_of_it, "lock_digest": pinned.digest, "step": steps, "version": 1})
        (weights.parent / "manifest.json").write_bytes(manifest)
        write_list(folder, CheckpointList().committed(Made(steps, sha256_hex(manifest), 0)))
    write_end(folder, attempt=0, mark=LogMark(sha256_hex(first), count, sha256_hex(line), steps))
    return folder


def raw(folder: Path) -> None:
    """Hash every byte below `folder`, and nothing else."""
    for parent, _, names in os.walk(folder):
        for name in names:
            digest = hashlib.sha256()
            with open(f"{parent}/{name}", "rb", buffering=0) as stream:
                while block := stream.read(2**20):
                    digest.update(block)
            digest.hexdigest()


def sha256sum(folder: Path) -> None:
    """The same by a program in C: one process for all files, its start included."""
    command = ["sh", "-c", 'find "$1" -type f -print0 | xargs -0 -n 100000 sha256sum', "sh", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def checked(folder: Path) -> None:
    """Verify; a benchmark of a broken record would mean nothing."""
    result = verify(folder)
    if result.findings or not result.finished:
        raise SystemExit(f"the record of the benchmark is not whole: {result.findings[:3]}")


def timed(action: Callable[[Path], None], folder: Path) -> tuple[float, float]:
    """(wall time, processor time) in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    action(folder)
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Raw hashing and verification of one record, by turns."""
    for action in (raw, checked):  # fill the cache of the disk
        action(folder)
    taken = [(timed(raw, folder), timed(sha256sum, folder), timed(checked, folder)) for _ in range(rounds)]
    return {
        "verify, cpu s": [ours[1] for _, _, ours in taken],
        "verify / raw, wall": [ours[0] / loop[0] for loop, _, ours in taken],
        "verify / raw, cpu": [ours[1] / loop[1] for loop, _, ours in taken],
        "verify / sha256sum, wall": [ours[0] / program[0] for _, program, ours in taken],
    }


def main() -> int:
    """Print the figures; 1 where a median misses its goal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--files", type=int, default=10_000, help="files of the record (default: 10000)")
    parser.add_argument("--kib", type=int, nargs="+", default=[64, 4], help="size of each (default: 64, then 4)")
    parser.add_argument("--steps", type=int, default=1_000_000, help="steps of the long log (default: 1000000)")
    parser.add_argument("--folder", type=Path, help="where to make the records (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    rounds = max(2, options.rounds)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        many = {
            kib: measure(record(Path(name) / str(kib), steps=20, files=options.files, size_bytes=kib * 1024), rounds)
            for kib in options.kib
        }
        log = measure(record(Path(name) / "long", steps=options.steps, files=0, size_bytes=0), rounds)
    steps, figures = f"a log of {options.steps:,} steps", []
    for kib, found in many.items():
        files = f"{options.files:,} files of {kib} KiB"
        figures += [
            Figure.of(
                f"`verify`, {files}, over raw hashing", found["verify / raw, wall"], unit="x", at_most=RATIO_GOAL
            ),
            Figure.of(f"`verify`, {files}, over raw hashing, processor time", found["verify / raw, cpu"], unit="x"),
            Figure.of(f"`verify`, {files}, over sha256sum", found["verify / sha256sum, wall"], unit="x"),
        ]
    figures += [
        Figure.of(f"`verify`, {steps}, processor time", log["verify, cpu s"], unit="s", at_most=LOG_GOAL_S),
        Figure.of(f"`verify`, {steps}, over raw hashing", log["verify / raw, wall"], unit="x"),
    ]
    return finish(figures, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())

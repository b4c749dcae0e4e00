"""Write the golden files anew: `python -m tests.golden.update`. `run-v1` is frozen and stays as it is.

Look at the difference before you commit it: a changed `lock.json` means that locks written today have other bytes
than locks written yesterday.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from apertus_nemo.record.files import write_atomic
from apertus_nemo.record.lock import RunLock
from apertus_nemo.record.run_dir import RunDirectory
from apertus_nemo.record.state import StateDigest
from apertus_nemo.record.state_digest import tensor_digest
from apertus_nemo.record.step_log import StepLogHeader, StepLogWriter, StepRecord
from tests.unit.record.example import lock, step

HERE = Path(__file__).parent


def golden_state(number: int) -> StateDigest:
    """A matrix in float32 with its optimizer states, a vector in bfloat16 bits, and floats that are hard to keep."""
    matrix = (np.arange(24, dtype=np.float32).reshape(4, 6) - 7) / np.float32(2 ** (number + 1))
    vector = np.array([0x3F80, 0x8000, 0x7FC1, 0x0001, 0xFF80], dtype=np.uint16) + np.uint16(number)
    kinds = ("weight", "exp_avg_fast", "exp_avg_slow", "exp_avg_sq")
    tensors = [tensor_digest("lm_head.weight", kind, matrix * np.float32(i)) for i, kind in enumerate(kinds, 1)]
    tensors.append(tensor_digest("model.norm.weight", "weight", vector, dtype="bfloat16"))
    tensors.append(tensor_digest("model.norm.weight", "master", vector.astype(np.float32)))
    return StateDigest.of(number, tensors)


def write_run(path: Path, pinned: RunLock) -> None:
    """A run directory of 12 steps with states at 0 and 12."""
    run = RunDirectory.create(path, lock=pinned, recipe_yaml="name: tiny_pretrain\n")
    with StepLogWriter.open(run.steps, StepLogHeader(pinned.digest, "0123456789abcdef" * 2, "e" * 64)) as log:
        for number in range(13):
            record = StepRecord(step=0) if number == 0 else step(number)
            if number in (0, 12):
                found = golden_state(number)
                write_atomic(run.state(number), found.to_bytes())
                record = replace(record, state_digest=found.digest)
            log.append(record)


def main() -> None:
    """Write what is not frozen."""
    write_atomic(HERE / "lock.json", lock().to_bytes())
    if not (HERE / "run-v1").exists():
        write_run(HERE / "run-v1", lock())


if __name__ == "__main__":
    main()

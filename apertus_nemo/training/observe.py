"""What the first rank finds on its machine before the first step: `observed.json`."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from apertus_nemo.recipe.schema import RunConfig
from apertus_nemo.record.canonical import dumps, is_unknown, loads_canonical
from apertus_nemo.record.files import read_bytes, write_atomic
from apertus_nemo.record.machine import machine
from apertus_nemo.record.observed import refuse_other_machine
from apertus_nemo.record.relaunched import Relaunched
from apertus_nemo.record.run_dir import RunDirectory

_MAX_BYTES = 2**20


def take_observation(run: RunConfig, directory: RunDirectory, *, attempt: int) -> bytes:
    """Observe this machine; the content of `observed.json`, which the first attempt writes.

    Later attempts are held against it, and the first one of a relaunch against what the original observed; an
    attempt that found something else keeps that in its own folder. Raises UnfitEnvironment where that may not be.
    """
    now = observe(run)
    data = dumps(now)
    rules = {"level": run.reproducibility.level, "instruction_set": run.reproducibility.instruction_set}
    if not directory.observed.exists():
        original = Relaunched.read(directory)
        if original is not None and not is_unknown(original.observed):
            refuse_other_machine(original.observed, now, allowed=original.allowed, **rules)
        write_atomic(directory.observed, data)
        return data
    first = read_bytes(directory.observed, max_bytes=_MAX_BYTES)
    if data != first:
        write_atomic(directory.attempt(attempt) / "observed.json", data)
        refuse_other_machine(loads_canonical(first, what=str(directory.observed)), now, **rules)
    return first


def observe(run: RunConfig) -> dict[str, Any]:
    """Hardware, instruction sets, threads and libraries as torch sees them; canonical JSON values only."""
    here = machine()
    cpu = run.trainer.accelerator == "cpu"
    return {
        "version": 1,
        "architecture": here["architecture"],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_features": here["cpu_features"],
        "cpu_model": here["cpu_model"],
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "driver": None if cpu else here["driver"],
        "gpu": None if cpu else torch.cuda.get_device_name(0),
        "host": platform.node(),
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "mkl": torch.backends.mkl.is_available(),  # type: ignore[no-untyped-call]
        "mkl_cbwr": os.environ.get("MKL_CBWR", ""),
        "process_group_backend": "gloo" if cpu else "nccl",
        "python": platform.python_version(),
        "threads_between_operations": torch.get_num_interop_threads(),
        "threads_per_rank": torch.get_num_threads(),
        "torch": torch.__version__,
        "world_size": run.world_size,
    }

"""What the first rank finds on its machine before the first step: `observed.json`."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from apertus_nemo.recipe.schema import RunConfig


def observe(run: RunConfig) -> dict[str, Any]:
    """Hardware, instruction sets, threads and libraries as torch sees them; canonical JSON values only."""
    observed: dict[str, Any] = {
        "version": 1,
        "architecture": platform.machine(),
        "cpu_model": _cpu_model(Path("/proc/cpuinfo")),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads_per_rank": torch.get_num_threads(),
        "mkl": torch.backends.mkl.is_available(),  # type: ignore[no-untyped-call]
        "mkl_cbwr": os.environ.get("MKL_CBWR", ""),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "world_size": run.world_size,
        "process_group_backend": "gloo" if run.trainer.accelerator == "cpu" else "nccl",
        "host": platform.node(),
        "gpu": None,
        "driver": None,
    }
    if run.trainer.accelerator == "gpu":
        observed["gpu"] = torch.cuda.get_device_name(0)
        observed["driver"] = _driver(Path("/proc/driver/nvidia/version"))
    return observed


def _cpu_model(path: Path) -> str:
    try:
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "CPU part"):
                return value.strip()
    except OSError:
        pass
    return "unknown: /proc/cpuinfo names no processor"


def _driver(path: Path) -> str:
    try:
        return path.read_text().splitlines()[0]
    except (OSError, IndexError):
        return "unknown: the driver's version file cannot be read"

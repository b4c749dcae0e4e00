"""Accelerators that a plan can be held against, with the sources of their figures."""

from __future__ import annotations

from dataclasses import dataclass

from apertus_nemo.errors import InputError


@dataclass(frozen=True)
class Accelerator:
    """One GPU, as a rank sees it."""

    name: str
    memory_bytes: int  # as the driver reports it
    peak_flops: float  # dense bf16, per second
    power_w: float  # while training, on average, per GPU


ACCELERATORS = {
    # Memory: what nvidia-smi prints on Alps, 97,871 MiB. Peak: NVIDIA's data sheet, dense. Power: arXiv 2509.14233,
    # section 2.6 (560 W on average, capped at 660 W).
    "gh200": Accelerator("gh200", 97_871 * 2**20, 989.5e12, 560.0),
    # Memory: 80 GB card, as the driver reports it. Peak: NVIDIA's data sheet, dense, SXM. Power: its limit.
    "h100": Accelerator("h100", 81_559 * 2**20, 989.5e12, 700.0),
}


def accelerator(name: str) -> Accelerator:
    """The accelerator of that name; InputError with the names that there are."""
    if name not in ACCELERATORS:
        raise InputError(f"there is no accelerator {name!r} in the plan's table; there are {', '.join(ACCELERATORS)}")
    return ACCELERATORS[name]

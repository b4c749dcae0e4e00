"""What this machine is, as far as a result can depend on it; without torch, from the kernel's files.

machine()       # {"architecture": "x86_64", "cpu_model": ..., "cpu_features": [...], "gpu": ..., "driver": ...}
"""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

from apertus_nemo.record.canonical import unknown

# Instruction sets by which torch, MKL, oneDNN and the C library choose their kernels (names of /proc/cpuinfo).
_FEATURES = frozenset(
    {
        "sse4_1", "sse4_2", "avx", "f16c", "fma", "avx2", "bmi2", "avx_vnni", "avx512f", "avx512cd",
        "avx512bw", "avx512dq", "avx512vl", "avx512ifma", "avx512vbmi", "avx512_vbmi2", "avx512_vnni",
        "avx512_bitalg", "avx512_vpopcntdq", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8",
        "amx_bf16", "erms", "asimd", "asimdhp", "asimddp", "asimdfhm", "fphp", "sve", "sve2", "sve_bf16",
        "svebf16", "i8mm", "svei8mm", "bf16", "sme", "sme2"
    }
)  # fmt: skip


def machine(proc: Path = Path("/proc")) -> dict[str, Any]:
    """Architecture, processor and its instruction sets, GPUs and their driver; what is not found is unknown."""
    model, features = _cpu(proc / "cpuinfo")
    gpus, driver = _gpus(proc / "driver" / "nvidia")
    return {
        "architecture": platform.machine(),
        "cpu_features": features,
        "cpu_model": model,
        "driver": driver,
        "gpu": gpus,
    }


def _cpu(path: Path) -> tuple[Any, Any]:
    fields: dict[str, str] = {}
    try:
        for line in path.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if not line.strip() and fields:
                break  # the first processor's block ends
            fields.setdefault(name.strip(), value.strip())
    except OSError as error:
        reason = unknown(f"/proc/cpuinfo cannot be read: {error.strerror}")
        return reason, reason
    model: Any = fields.get("model name")
    if model is None:  # arm64 names numbers only
        parts = [f"{key} {fields[key]}" for key in ("CPU implementer", "CPU part", "CPU variant") if key in fields]
        model = ", ".join(parts) or unknown("/proc/cpuinfo names no processor")
    else:
        numbers = [f"{key} {fields[key]}" for key in ("cpu family", "model", "stepping") if key in fields]
        model = ", ".join([model, *numbers])  # hypervisors give one name to many
    text = fields.get("flags", fields.get("Features"))
    if text is None:
        return model, unknown("/proc/cpuinfo lists no instruction sets")
    return model, sorted(_FEATURES & set(text.split()))


def _gpus(folder: Path) -> tuple[Any, Any]:
    """Models, one a GPU in the order of their addresses, and the driver's version."""
    try:
        text = (folder / "version").read_text(errors="replace")
    except OSError:
        reason = unknown("this machine has no driver of NVIDIA's")
        return reason, reason
    match = re.search(r"NVRM version:.*?\s([0-9]+(?:\.[0-9]+)+)\s", text)
    driver: Any = match[1] if match else unknown("the driver's version file has another form")
    models = []
    try:
        for path in sorted((folder / "gpus").iterdir()):
            found = re.search(r"^Model:\s*(.+?)\s*$", (path / "information").read_text(errors="replace"), re.MULTILINE)
            if found:
                models.append(found[1])
    except OSError as error:
        return unknown(f"the driver's list of GPUs cannot be read: {error.strerror}"), driver
    return models or unknown("the driver lists no GPU"), driver

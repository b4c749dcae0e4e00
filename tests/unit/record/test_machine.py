"""What /proc says of processors and GPUs, from texts of known machines, and of this one."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from apertus_nemo.record.machine import machine

X86 = """\
processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 207
model name\t: Intel(R) Xeon(R) Processor
stepping\t: 2
flags\t\t: fpu sse4_2 avx2 avx fma hypervisor amx_tile

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""
ARM = """\
processor\t: 0
BogoMIPS\t: 2000.00
Features\t: fp asimd sve2 sve bf16 crc32
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd4f
"""
VERSIONS = {
    "535.104.05": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n",
    "570.86.15": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  570.86.15  Release Build  (root@x)\n",
}


def proc(folder: Path, cpuinfo: str) -> Path:
    (folder / "cpuinfo").write_text(cpuinfo)
    return folder


def test_x86(tmp_path: Path) -> None:
    found = machine(proc(tmp_path, X86))
    assert found["cpu_model"] == "Intel(R) Xeon(R) Processor, cpu family 6, model 207, stepping 2"
    assert found["cpu_features"] == ["amx_tile", "avx", "avx2", "fma", "sse4_2"]
    assert found["gpu"] == found["driver"] == {"unknown": "this machine has no driver of NVIDIA's"}


def test_arm(tmp_path: Path) -> None:
    found = machine(proc(tmp_path, ARM))
    assert found["cpu_model"] == "CPU implementer 0x41, CPU part 0xd4f, CPU variant 0x0"
    assert found["cpu_features"] == ["asimd", "bf16", "sve", "sve2"]


@pytest.mark.parametrize("version", VERSIONS)
def test_gpus_and_driver(tmp_path: Path, version: str) -> None:
    folder = tmp_path / "driver" / "nvidia"
    for address in ("0000:0b:00.0", "0000:0a:00.0"):
        (folder / "gpus" / address).mkdir(parents=True)
        text = f"Model: \t\t NVIDIA GH200 120GB\nIRQ: 1\nGPU UUID: GPU-{address}\n"
        (folder / "gpus" / address / "information").write_text(text)
    (folder / "version").write_text(VERSIONS[version])
    found = machine(proc(tmp_path, ARM))
    assert found["gpu"] == ["NVIDIA GH200 120GB", "NVIDIA GH200 120GB"]
    assert found["driver"] == version


def test_what_is_not_known_says_why(tmp_path: Path) -> None:
    assert machine(tmp_path)["cpu_model"] == {"unknown": "/proc/cpuinfo cannot be read: No such file or directory"}
    found = machine(proc(tmp_path, "processor : 0\n"))
    assert found["cpu_model"] == {"unknown": "/proc/cpuinfo names no processor"}
    assert found["cpu_features"] == {"unknown": "/proc/cpuinfo lists no instruction sets"}


def test_this_machine() -> None:
    found = machine()
    assert found["architecture"] == platform.machine()
    assert isinstance(found["cpu_features"], list)
    assert found["cpu_features"]

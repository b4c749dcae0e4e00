"""Memory while a squashfs file is made: bounded, whatever the image weighs."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.image.layout import Layout
from apertus_nemo.image.oci import CONFIG, LAYER, MANIFEST, Descriptor, Manifest
from apertus_nemo.record.canonical import dumps
from tests.unit.image.servers import needs

BLOCK = os.urandom(2**20)
SCRIPT = """
import os, re, resource, sys
from pathlib import Path
from apertus_nemo.image.layout import Layout
from apertus_nemo.image.oci import Platform
from apertus_nemo.image.squashfs import find_tool, make_squashfs
layout = Layout.open(Path(sys.argv[1]))
image = layout.image(Platform("linux", "amd64"))
make_squashfs(layout.blobs, image, Path(sys.argv[2]), tool=find_tool(os.environ), contents="plain")
# its own high-water mark: ru_maxrss begins with that of whoever forked it
own = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print([own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss])
"""


class Repeated(io.RawIOBase):
    """A file of so many blocks, whose content does not shrink."""

    def __init__(self, blocks: int) -> None:
        self._at, self._end = 0, blocks * len(BLOCK)

    def read(self, size: int = -1) -> bytes:
        begin = self._at % len(BLOCK)
        data = BLOCK[begin : begin + min(size, self._end - self._at)]
        self._at += len(data)
        return data


def layout_of(folder: Path, *, files: int, blocks: int) -> Layout:
    """An image of one layer, written without being held in memory."""
    layout = Layout.create(folder)
    path = folder / "layer"
    with open(path, "wb") as out, tarfile.open(fileobj=out, mode="w|") as archive:
        for number in range(files):
            info = tarfile.TarInfo(f"file{number}")
            info.size = blocks * len(BLOCK)
            archive.addfile(info, Repeated(blocks))  # type: ignore[arg-type]
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    layer = Descriptor(LAYER, f"sha256:{digest}", path.stat().st_size)
    target = layout.blobs.path(layer.digest)
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    tree: dict[str, Any] = {"architecture": "amd64", "os": "linux", "config": {}}
    tree["rootfs"] = {"type": "layers", "diff_ids": [layer.digest]}
    manifest = Manifest(layout.blobs.write(dumps(tree), CONFIG), (layer,))
    layout.tag(layout.blobs.write(manifest.to_bytes(), MANIFEST), "1")
    return layout


def peaks_mib(layout: Layout, target: Path) -> list[float]:
    """The most memory of our process and of mksquashfs, each."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    command = [sys.executable, "-c", SCRIPT, str(layout.root), str(target)]
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300).stdout
    return [kib / 1024 for kib in json.loads(said)]


@pytest.mark.full
def test_memory_does_not_grow_with_sizes(tmp_path: Path) -> None:
    """An image of 800 MiB, of which one file has half; the goal is 512 MiB for both processes together."""
    needs("mksquashfs")
    small = peaks_mib(layout_of(tmp_path / "small", files=2, blocks=1), tmp_path / "small.sqsh")
    large = peaks_mib(layout_of(tmp_path / "large", files=2, blocks=400), tmp_path / "large.sqsh")
    assert (tmp_path / "large.sqsh").stat().st_size > 700 * 2**20
    assert large[0] - small[0] < 16  # ours
    assert sum(large) < 512

"""What it costs to make a squashfs file of an image, over `umoci unpack` and `mksquashfs`; and whether its bytes vary.

    python benchmarks/squashfs.py [--rounds 5] [--mib 400] [--files 12000]

Makes an image of that size (Python's own sources, and data that hardly shrinks, in three layers, the last of which
hides part of the second), in a folder of its own. Then by turns: ours, a process of its own, and `umoci unpack` with
`mksquashfs` of the same version, compressor, level and block size. Prints medians with quartiles, ratios of each round,
the peak memory of both of our processes together, and how many different files came out under other numbers of
processors, SOURCE_DATE_EPOCH, umasks and temporary folders. Goals: a ratio of at most 1; at most 512 MiB; one file.
Needs umoci, squashfs-tools and taskset, and root for umoci's sake.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

from figures import Figure, finish

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apertus_nemo.image.layout import Layout  # noqa: E402
from tests.unit.image.images import add_image, entry, tar  # noqa: E402

RATIO_GOAL, MEMORY_GOAL_MIB, ROUNDS_OF_BYTES = 1.0, 512, 10
OURS = """
import os, sys
from pathlib import Path
from apertus_nemo.image.layout import Layout
from apertus_nemo.image.oci import Platform
from apertus_nemo.image.squashfs import find_tool, make_squashfs
layout = Layout.open(Path(sys.argv[1]))
image = layout.image(Platform("linux", "amd64"))
make_squashfs(layout.blobs, image, Path(sys.argv[2]), tool=find_tool(os.environ), contents="plain")
"""
OPTIONS = [
    "-comp",
    "zstd",
    "-Xcompression-level",
    "3",
    "-b",
    "131072",
    "-mkfs-time",
    "0",
    "-noI",
    "-quiet",
    "-no-progress",
]


def make_image(folder: Path, *, size_bytes: int, files: int) -> Layout:
    """Three layers of files that are alike those of a real image: sources, and data that hardly shrinks."""
    sources = [path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    layers, made, number = [], 0, 0
    for part in (0.6, 0.3, 0.1):
        entries = [entry(f"part{part}")]
        limit = made + int(size_bytes * part)
        for index in range(int(files * part)):
            if index % 100 == 0:
                entries.append(entry(f"part{part}/{index // 100}"))
            number += 1
            data = sources[number % len(sources)] + str(number).encode()
            entries.append(entry(f"part{part}/{index // 100}/{index}.py", data))
            made += len(data)
        while made < limit:
            data = os.urandom(2_000_000) + bytes(range(256)) * 8_000
            entries.append(entry(f"part{part}/{made}.bin", data))
            made += len(data)
        layers.append(entries)
    layers[2].append(entry("part0.3/.wh.0", b""))
    layout = Layout.create(folder)
    add_image(layout, [tar(entries) for entries in layers])
    return layout


class Peak:
    """The largest memory of a process and its children together, looked at every 10 ms."""

    def __init__(self, pid: int) -> None:
        self.mib, self._pid, self._end = 0.0, pid, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._end.wait(0.01):
            total = 0
            for pid in (self._pid, *self._children()):
                try:
                    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                    total += int(text.split("Pss:")[1].split()[0])
                except (OSError, IndexError):
                    continue
            self.mib = max(self.mib, total / 1024)

    def _children(self) -> list[str]:
        try:
            return Path(f"/proc/{self._pid}/task/{self._pid}/children").read_text().split()
        except OSError:
            return []

    def stop(self) -> float:
        """MiB."""
        self._end.set()
        self._thread.join()
        return self.mib


def ours(layout: Path, target: Path, prefix: list[str] | None = None, **environment: str) -> tuple[float, float]:
    """(seconds, peak MiB) of a process that makes `target`."""
    target.unlink(missing_ok=True)
    shell = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment}
    begun = time.perf_counter()
    process = subprocess.Popen([*(prefix or []), sys.executable, "-c", OURS, str(layout), str(target)], env=shell)
    peak = Peak(process.pid)
    code = process.wait()
    seconds, mib = time.perf_counter() - begun, peak.stop()
    if code:
        raise SystemExit("our conversion failed")
    return seconds, mib


def theirs(layout: Path, folder: Path) -> float:
    """Seconds of umoci and mksquashfs."""
    shutil.rmtree(folder, ignore_errors=True)
    target = folder.with_suffix(".sqsh")
    target.unlink(missing_ok=True)
    begun = time.perf_counter()
    subprocess.run(["umoci", "unpack", "--image", f"{layout}:1", str(folder)], check=True, capture_output=True)
    subprocess.run(["mksquashfs", str(folder / "rootfs"), str(target), *OPTIONS], check=True, capture_output=True)
    return time.perf_counter() - begun


def different(layout: Path, folder: Path) -> int:
    """How many different files come out under several circumstances."""
    import hashlib

    circumstances: list[tuple[list[str], dict[str, str]]] = [
        (["taskset", "-c", "0"], {}),
        (["sh", "-c", 'umask 0077; exec "$@"', "sh"], {"TMPDIR": str(folder), "TZ": "Asia/Tokyo"}),
        ([], {"SOURCE_DATE_EPOCH": "1", "LC_ALL": "C.UTF-8"}),
    ]
    found = set()
    for prefix, environment in circumstances * ROUNDS_OF_BYTES:
        ours(layout, folder / "again.sqsh", prefix, **environment)
        found.add(hashlib.sha256((folder / "again.sqsh").read_bytes()).hexdigest())
    return len(found)


def main() -> int:
    """Print the table; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--mib", type=int, default=400, help="size of the image's files (default: 400)")
    parser.add_argument("--files", type=int, default=12_000, help="how many small ones (default: 12000)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    for tool in ("umoci", "mksquashfs"):
        if shutil.which(tool) is None:
            print(f"{tool} is not installed", file=sys.stderr)
            return 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        layout = make_image(folder / "layout", size_bytes=options.mib * 2**20, files=options.files).root
        ours(layout, folder / "a.sqsh")  # fill the cache of the disk
        rounds = []
        for number in range(max(2, options.rounds)):
            first = theirs(layout, folder / "b") if number % 2 else None
            mine = ours(layout, folder / "a.sqsh")
            rounds.append((*mine, first or theirs(layout, folder / "b")))
        files = different(layout, folder)
        sizes = [(folder / one).stat().st_size / 2**20 for one in ("a.sqsh", "b.sqsh")]
    figures = [
        Figure.of("image to `.sqsh`, ours", [one[0] for one in rounds], unit="s"),
        Figure.of("the same, umoci unpack and mksquashfs", [one[2] for one in rounds], unit="s"),
        Figure.of("ours over theirs", [one[0] / one[2] for one in rounds], unit="x", at_most=RATIO_GOAL),
        Figure.of("most memory of ours", [one[1] for one in rounds], unit="MiB", at_most=MEMORY_GOAL_MIB),
        Figure.of("size of our file over theirs", [sizes[0] / sizes[1]], unit="x"),
        Figure.of(f"different files of {3 * ROUNDS_OF_BYTES}", [files], unit="files", at_most=1),
    ]
    return finish(figures, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())

"""An image as a squashfs file: its layers, merged as a stream, piped into `mksquashfs -tar`. No root, nothing unpacked.

    made = make_squashfs(store, image, Path("cpu-1.0.0.partial"), environment=os.environ)

The same manifest digest gives the same bytes with the same version of mksquashfs, on any number of processors, at any
time: what mksquashfs would take from the machine is given to it (`OPTIONS`). Times of files stay as the layers have
them, since Python holds its bytecode against them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from apertus_nemo.errors import ApertusError, InputError, UnfitEnvironment
from apertus_nemo.image.blobs import BlobStore
from apertus_nemo.image.enroot import enroot_files
from apertus_nemo.image.layout import Image
from apertus_nemo.image.merge import Folder, Tree, put_file, read_tree, write_tree
from apertus_nemo.image.superblock import set_root_time
from apertus_nemo.record.files import writing

COMPRESSOR = "zstd"
LEVEL = 3
# What decides the bytes; kept in the sidecar. Without -no-duplicates, mksquashfs 4.5.1 made another file of the same
# stream in 3 of 160 times, with one processor too: whether it sees that a small file is there already is a race of its
# threads. With it, 400 of 400 were one file, 1.3 % larger (benchmarks/squashfs.py).
OPTIONS = (
    *("-comp", COMPRESSOR, "-Xcompression-level", str(LEVEL), "-b", "131072"),
    *("-mkfs-time", "0", "-root-mode", "0{root_mode:o}", "-root-uid", "{root_uid}", "-root-gid", "{root_gid}"),
    *("-root-time", "{root_time}", "-noI", "-no-exports", "-xattrs", "-no-duplicates"),
)
_MEMORY_MIB = 128  # of mksquashfs' caches
_MINIMUM = (4, 5)  # reads a tar archive
_VERSION = re.compile(r"mksquashfs version (\d+)\.(\d+)(\S*)")
_END = bytes(1024)  # of a tar archive
CONTENTS = ("enroot", "plain")


@dataclass(frozen=True)
class Tool:
    """The mksquashfs of this machine."""

    path: str
    version: str  # "4.5.1"


@dataclass(frozen=True)
class Made:
    """What was made, and of what."""

    tool: Tool
    options: tuple[str, ...]
    entries: int  # of the layers
    devices: int
    refused_xattrs: int


def find_tool(environment: Mapping[str, str]) -> Tool:
    """Raises UnfitEnvironment where there is no mksquashfs that reads tar archives."""
    path = shutil.which("mksquashfs", path=f"{environment.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        raise UnfitEnvironment("mksquashfs is not installed: it is in the package squashfs-tools")
    try:
        done = subprocess.run([path, "-version"], env=_clean(), capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnfitEnvironment(f"{path} does not start: {error}") from None
    match = _VERSION.search(done.stdout.decode(errors="replace"))
    if match is None:
        raise UnfitEnvironment(f"{path} does not say which version it is")
    version = f"{match[1]}.{match[2]}{match[3]}"
    if (int(match[1]), int(match[2])) < _MINIMUM:
        raise UnfitEnvironment(f"{path} is version {version}: 4.5 or newer is needed, which reads tar archives")
    return Tool(path, version)


def make_squashfs(
    store: BlobStore,
    image: Image,
    target: Path,
    *,
    tool: Tool,
    contents: str = "enroot",
    processors: int | None = None,
    what: str = "the image",
) -> Made:
    """Write `target`, which is replaced; it is there, whole and synced, or the call raises.

    `contents`: "enroot" adds the files that Enroot reads, "plain" nothing. Raises InputError for layers that no image
    may have, Differs where a layer is not as its digests say, UnfitEnvironment where the disk or mksquashfs refuses.
    """
    files = enroot_files(image, what=what) if contents == "enroot" else {}
    tree = read_tree(store, image)
    for path in files:
        _make_room(tree, path, what)
    options = _options(tree.root)
    command = [tool.path, "-", str(target), "-tar", "-noappend", "-no-progress", "-quiet", "-exit-on-error"]
    command += [*options, "-mem", f"{_MEMORY_MIB}M", "-processors", str(processors or _processors())]
    with _running(command, target) as output:
        write_tree(store, image, tree, output)
        for path, data in sorted(files.items()):
            put_file(output, path, data, mode=0o755 if path == b"etc/rc" else 0o644)
        output.write(_END)
    set_root_time(target, tree.root.mtime)
    with writing(target), open(target, "rb+") as file:
        os.fsync(file.fileno())
    return Made(tool, options, tree.entries, tree.devices, tree.refused_xattrs)


def _make_room(tree: Tree, path: bytes, what: str) -> None:
    """Take what an image has in the place of a file of ours out of the tree; its folder must be a folder."""
    *folders, name = path.split(b"/")
    here = tree.root
    for part in folders:
        below = here.children.setdefault(part, Folder(layer=-1))
        if not isinstance(below, Folder):
            raise InputError(
                f"{what}: its /{part.decode()} is not a folder; --contents plain leaves Enroot's files out"
            )
        here = below
    found = here.children.pop(name, None)
    if isinstance(found, Folder):
        raise InputError(f"{what}: its /{path.decode()} is a folder; --contents plain leaves Enroot's files out")
    for node, paths in tree.shared.items():
        if path in paths:
            tree.shared[node] = [one for one in paths if one != path]


def _options(root: Folder) -> tuple[str, ...]:
    return tuple(
        option.format(root_mode=root.mode, root_uid=root.uid, root_gid=root.gid, root_time=root.mtime)
        for option in OPTIONS
    )


def _processors() -> int:
    return len(os.sched_getaffinity(0))


def _clean() -> dict[str, str]:
    """mksquashfs refuses SOURCE_DATE_EPOCH beside the options; nothing else of the shell's is its business either."""
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "TZ": "UTC"}


class _Output:
    """The pipe to mksquashfs, in large writes."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe, self._kept, self._size = pipe, list[bytes](), 0
        self.broken = False  # mksquashfs ended first, and says why

    def write(self, data: bytes) -> int:
        self._kept.append(data)
        self._size += len(data)
        if self._size >= 2**18:
            self.flush()
        return len(data)

    def flush(self) -> None:
        data = memoryview(b"".join(self._kept))
        self._kept, self._size = [], 0
        try:
            while data:
                data = data[self._pipe.write(data) or 0 :]
        except BrokenPipeError:
            self.broken = True
            raise


@contextlib.contextmanager
def _running(command: Sequence[str], target: Path) -> Iterator[_Output]:
    """mksquashfs at work; on the way out it has ended well, or the call raises and `target` is gone."""
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                command,
                env=_clean(),
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise UnfitEnvironment(f"{command[0]} does not start: {error.strerror}") from None
        assert process.stdin is not None
        try:
            output = _Output(process.stdin)
            try:
                yield output
                output.flush()
            except (ApertusError, OSError):  # whatever the readers of layers made of it
                if not output.broken:
                    raise
            process.stdin.close()
            code = process.wait()
            said.seek(0)
            if code != 0:
                raise _failed(said.read(2**16).decode(errors="replace"), code, target)
        except BaseException:
            process.kill()
            process.wait()
            target.unlink(missing_ok=True)
            raise


def _failed(said: str, code: int, target: Path) -> UnfitEnvironment:
    if "No space left on device" in said or "Disk quota exceeded" in said:
        return UnfitEnvironment(
            f"could not write {target}: the disk is full; free some space, then run the command again"
        )
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    reason = next((line for line in lines if line.startswith(("FATAL ERROR", "Could not", "Write failed"))), None)
    reason = (reason or (lines[-1] if lines else f"exit code {code}"))[:300]
    return UnfitEnvironment(f"could not write {target}: mksquashfs: {reason}")

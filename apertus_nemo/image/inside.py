"""Commands inside an image that no engine has started: read-only, without a network, and without a right to anything.

    with opened(Path("cpu-1.0.0-1da79e64f3b1.sqsh"), work=folder) as root:
        root.read("etc/apertus-nemo/lock.json")                                    # bytes, or None
        root.run(["/usr/bin/python3", "-V"], environment={}, limit_s=60).code      # 0

The kernel mounts the squashfs file (`image/enter.py`), or it is unpacked where it may not. In there is no network but
loopback, nothing to write to but memory, and no process of this machine. Commands run as nobody where this is root, and
as the user elsewhere. All ends with this process, also where that is killed.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from apertus_nemo.errors import InputError, UnfitEnvironment
from apertus_nemo.image.programs import run as run_program
from apertus_nemo.record.files import reading, writing

_READ_LIMIT_S = 120.0
_UNPACK_LIMIT_S = 1800.0
_CANNOT_MOUNT = ("squashfs cannot be mounted", "loop")
_MAX_OUTPUT_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    output: bytes
    errors: bytes


class Root:
    """The root of an image, as a squashfs file that is open or as a folder."""

    def __init__(self, folder: Path, image: int | None) -> None:
        self._folder, self._image = folder, image

    def read(self, *names: str) -> dict[str, bytes | None]:
        """The content of regular files by path below the root; None where there is none, or more than 16 MiB of it."""
        done = self._enter(command=[], environment={}, read=list(names), limit_s=_READ_LIMIT_S)
        found = json.loads(done.output)
        return {name: None if data is None else base64.b64decode(data) for name, data in found.items()}

    def run(self, command: Sequence[str], *, environment: Mapping[str, str], limit_s: float) -> Done:
        """Run a program of the image, by its path, to its end.

        Raises UnfitEnvironment where the machine does not allow it, and where it takes longer than `limit_s`.
        """
        return self._enter(command=list(command), environment=dict(environment), read=None, limit_s=limit_s)

    def _enter(
        self, *, command: list[str], environment: dict[str, str], read: list[str] | None, limit_s: float
    ) -> Done:
        hearing, saying = os.pipe()
        spec = {
            "command": command,
            "environment": environment,
            "errors": saying,
            "folder": str(self._folder),
            "image": self._image,
            "launcher": os.getpid(),
            "read": read,
        }
        passed = [saying] if self._image is None else [saying, self._image]
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, hearing)
            output, errors = (stack.enter_context(tempfile.TemporaryFile(dir=self._folder.parent)) for _ in range(2))
            try:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-s", "-m", "apertus_nemo.image.enter", json.dumps(spec)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=errors,
                    pass_fds=passed,
                    start_new_session=True,
                )
            finally:
                os.close(saying)
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                raise UnfitEnvironment(
                    f"{command[0] if command else 'reading the image'} took more than {limit_s:.0f} s and was stopped"
                ) from None
            finally:
                if process.poll() is None:  # the kernel ends all that it has started
                    process.send_signal(signal.SIGKILL)
                    process.wait()
            refusal = os.read(hearing, 2**16).decode(errors="replace")
            if refusal:
                raise UnfitEnvironment(refusal)
            for stream in (output, errors):
                stream.seek(0)
            return Done(code, output.read(_MAX_OUTPUT_BYTES), errors.read(_MAX_OUTPUT_BYTES))


@contextlib.contextmanager
def opened(squashfs: Path, *, work: Path) -> Iterator[Root]:
    """The root that a squashfs file holds; `work` is an empty folder for the time being.

    Raises InputError where the file cannot be read or is none, UnfitEnvironment where the machine allows no namespaces.
    """
    folder = work / "root"
    with writing(folder):
        folder.mkdir()
    with reading(squashfs), open(squashfs, "rb") as file:
        if file.read(4) != b"hsqs":
            raise InputError(f"{squashfs} is not a squashfs file")
        root = Root(folder, file.fileno())
        try:
            root.read()
        except UnfitEnvironment as error:
            if "namespaces" in str(error):
                raise UnfitEnvironment(
                    f"{error}; start the image as its site does, and run `apertus-nemo selftest` in it"
                ) from None
            if not any(text in str(error) for text in _CANNOT_MOUNT):
                raise
        else:
            yield root
            return
    folder.rmdir()
    run_program(
        ["unsquashfs", "-no-progress", "-quiet", "-no-xattrs", "-d", folder, squashfs],
        what=f"unpacking {squashfs}",
        limit_s=_UNPACK_LIMIT_S,
    )
    try:
        yield Root(folder, None)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

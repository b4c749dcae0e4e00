"""The command line as a user starts it: a process of its own, in an environment that a test makes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "apertus_nemo.cli.main")
TRAIN = ("train", "--allow-dirty")  # the tests of a change run before it is committed


def shell(cache: Path, home: Path, **more: str) -> dict[str, str]:
    """A small environment with a home of its own."""
    home.mkdir(parents=True, exist_ok=True)
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "XDG_CACHE_HOME": str(cache),
        "PYTHONPATH": str(ROOT),
        **more,
    }


def apertus(
    arguments: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    timeout_s: float = 280.0,
    inside: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Run to the end; the process group is killed where it takes too long."""
    with started(arguments, folder=folder, environment=environment, inside=inside) as process:
        out, err = process.communicate(timeout=timeout_s)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@contextmanager
def started(
    arguments: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    inside: Sequence[str] = (),
    errors: int = subprocess.PIPE,
) -> Iterator[subprocess.Popen[str]]:
    """A running command; on the way out it and every rank that it has left are killed.

    `inside`: a command that becomes this one. `errors`: descriptor for standard error.

    The checkout under test may have changes: `train` is told to keep them.
    """
    if arguments[:1] == ["train"]:
        arguments = ["train", "--allow-dirty", *arguments[1:]]
    folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [*inside, *COMMAND, *arguments],
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        left = children(process.pid)
        if process.poll() is None:
            process.kill()
        for pid in left:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def on_a_terminal(
    arguments: Sequence[str], *, folder: Path, environment: Mapping[str, str], timeout_s: float = 280.0
) -> tuple[int, str, str]:
    """(exit code, standard output, what a terminal of 100 columns got as standard error)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    drawn = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # the last writer has closed it
            while data := os.read(ours, 2**16):
                drawn.extend(data)

    reader = threading.Thread(target=read)
    try:
        with started(arguments, folder=folder, environment={**environment, "TERM": "xterm"}, errors=theirs) as process:
            os.close(theirs)
            reader.start()
            out, _ = process.communicate(timeout=timeout_s)
        reader.join(timeout=10.0)
    finally:
        os.close(ours)
    return process.returncode, out, drawn.decode(errors="replace").replace("\r\n", "\n")


def children(pid: int) -> list[int]:
    """Process ids of the direct children, in the order in which they were started."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return sorted(map(int, found))


def ranks_of(launcher: int) -> list[int]:
    """Process ids of a launcher's ranks, by rank."""
    return [pid for pid in children(launcher) if "apertus_nemo.training.worker" in _command_line(pid)]


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def alive(pid: int) -> bool:
    """There is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], object], *, timeout_s: float, what: str) -> None:
    """Poll until the condition holds; AssertionError with `what` where it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Processes that compute all the time."""
    burning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in burning:
            process.kill()
            process.wait()

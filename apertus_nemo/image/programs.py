"""Programs of the machine that images are made with: found or missed by name, run with a chosen environment.

run(["mmdebstrap", ...], environment=plain_environment(epoch), what="making the base")
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from apertus_nemo.errors import UnfitEnvironment

# program -> Debian's package that has it
PACKAGES = {
    "apt-get": "apt",
    "buildah": "buildah",
    "dpkg-deb": "dpkg",
    "git": "git",
    "mmdebstrap": "mmdebstrap",
    "podman": "podman",
    "runc": "runc",
}
# util-linux: namespaces that die with their first process, which dies with us.
_APART = (
    "setpriv",
    "--pdeathsig",
    "KILL",
    "unshare",
    "--mount",
    "--net",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
)
_SHOWN_LINES = 3
_FULL = "No space left on device"


def find_program(name: str) -> str:
    """Where a program is: beside this Python, or on PATH. Raises UnfitEnvironment with the package that has it."""
    if "/" in name:
        return name
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(name, path=_search_path())
    if found is None:
        package = PACKAGES.get(name)
        how = f"as root: apt-get install {package}" if package else "it is one of the development packages"
        raise UnfitEnvironment(f"there is no program {name} on this machine; {how}")
    return found


def _search_path() -> str:
    """PATH with the folders of system programs, which users' PATHs on Debian lack."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def plain_environment(epoch: int, **more: str) -> dict[str, str]:
    """An environment that holds nothing of the user's: what is made in it does not depend on who makes it."""
    return {
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONHASHSEED": "0",
        "SOURCE_DATE_EPOCH": str(epoch),
        "TZ": "UTC",
        **more,
    }


def run(
    command: Sequence[str | Path],
    *,
    what: str,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    limit_s: float = 3600.0,
    log: Path | None = None,
    apart: bool = False,
) -> str:
    """Run a program to its end; its standard output, or "" where that goes to `log` together with its errors.

    Files are made with umask 022. `apart`: without a network, and, for root, with mounts and processes that end when we
    do, however that happens. Raises UnfitEnvironment, with `what` and the program's last words, where it fails.
    """
    program = find_program(str(command[0]))
    before = _APART if apart and os.geteuid() == 0 and all(map(shutil.which, ("setpriv", "unshare"))) else ()
    try:
        with open(log, "ab") if log is not None else open(os.devnull, "wb") as sink:
            done = subprocess.run(
                [*before, program, *map(str, command[1:])],
                env=None if environment is None else dict(environment),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=sink if log is not None else subprocess.PIPE,
                stderr=subprocess.STDOUT if log is not None else subprocess.PIPE,
                timeout=limit_s,
                umask=0o022,
            )
    except OSError as error:
        raise UnfitEnvironment(f"{what}: {program} could not be run: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise UnfitEnvironment(f"{what}: {command[0]} took more than {limit_s:.0f} s and was stopped") from error
    if done.returncode == 0:
        return "" if done.stdout is None else done.stdout.decode(errors="replace")
    said = log.read_bytes()[-20_000:] if log is not None else done.stderr
    raise UnfitEnvironment(f"{what}: {_last_words(str(command[0]), done.returncode, said, log)}")


def _last_words(program: str, code: int, said: bytes, log: Path | None) -> str:
    lines = [line.rstrip() for line in said.decode(errors="replace").splitlines() if line.strip()]
    if any(_FULL in line for line in lines):
        return "the disk is full; free some space, then run the command again"
    wrong, goes_on = [], False
    for line in lines:
        if line.lower().startswith(("e:", "error", "fatal")):
            wrong.append(line)
            goes_on = True
        elif goes_on and line.startswith(" "):  # uv says why in lines of their own
            wrong[-1] += f" {line.strip()}"
        else:
            goes_on = False
    shown = " | ".join(line.strip() for line in (wrong or lines)[-_SHOWN_LINES:])
    where = f"; all of it is in {log}" if log is not None else ""
    return f"{program} ended with {code}: {shown[-600:]}{where}"

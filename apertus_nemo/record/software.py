"""What software this process would run: installed packages, and our own source.

packages()      # {"torch": "2.13.0+cpu", ...}, sorted; milliseconds, no metadata file is opened
source()        # version, hash of our files, and the git commit where this is a checkout
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apertus_nemo import __version__
from apertus_nemo.record.canonical import dumps, sha256_hex, unknown
from apertus_nemo.record.files import file_sha256

_DIST_INFO = re.compile(r"(?P<name>[^-]+)-(?P<version>[^-]+)\.dist-info\Z")
_GIT_LIMIT_S = 20.0  # a slow network file system
_SUFFIXES = (".py", ".yaml", ".json", ".txt")  # of our files that can change a result


def packages(path: Sequence[str] | None = None) -> dict[str, str]:
    """Installed distributions, normalised name -> version, sorted; the first on `path` (sys.path) wins, as on import.

    Name and version are read from the names of the `.dist-info` folders (packaging specification "Recording installed
    projects"), which is a hundred times quicker than reading their metadata. Distributions that old tools left
    as `.egg-info` are listed too, with the version that their name gives, else "unknown".
    """
    found: dict[str, str] = {}
    for folder in sys.path if path is None else path:
        try:
            names = os.listdir(folder or ".")
        except OSError:
            continue
        here: dict[str, str] = {}
        for name in names:
            if match := _DIST_INFO.match(name):
                here[_normal(match["name"])] = match["version"]
            elif name.endswith(".egg-info"):
                parts = name.removesuffix(".egg-info").split("-")
                here.setdefault(_normal(parts[0]), parts[1] if len(parts) > 1 else "unknown")
        for name, version in here.items():
            found.setdefault(name, version)
    return dict(sorted(found.items()))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def source(package: Path | None = None) -> dict[str, Any]:
    """Our own source: {"commit", "dirty", "files_digest", "package_version", "tree"}.

    `files_digest` is the SHA-256 over the manifest of the package's files (recipes apart: the lock holds the resolved
    one), so it holds without git too. `dirty` says whether tracked files differ from the commit.
    """
    folder = Path(__file__).resolve().parents[1] if package is None else package
    result: dict[str, Any] = {"files_digest": _files_digest(folder), "package_version": __version__}
    root = folder.parent
    if not (root / ".git").exists():
        no_git = unknown("not a git checkout")
        return {"commit": no_git, "dirty": no_git, "tree": no_git, **result}
    try:
        commit, tree = _git(root, "rev-parse", "HEAD", "HEAD^{tree}").split()
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all")
    except (OSError, ValueError) as error:
        reason = unknown(str(error))
        return {"commit": reason, "dirty": reason, "tree": reason, **result}
    return {"commit": commit, "dirty": bool(changed.strip()), "tree": tree, **result}


def _files_digest(folder: Path) -> str:
    entries = []
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in ("__pycache__", "resources"))
        for name in names:
            if name.endswith(_SUFFIXES):
                path = Path(here) / name
                entries.append([path.relative_to(folder).as_posix(), file_sha256(path)])
    return sha256_hex(dumps(sorted(entries)))


def _git(root: Path, *arguments: str) -> str:
    """Output of git, read only: no lock is taken, no file-system monitor is started. Raises OSError with the reason."""
    import subprocess

    try:
        return subprocess.run(
            ["git", "-c", "core.fsmonitor=false", *arguments],
            cwd=root,
            env={
                "PATH": os.environ.get("PATH", os.defpath),
                "HOME": os.environ.get("HOME", os.devnull),
                "GIT_OPTIONAL_LOCKS": "0",
                "LC_ALL": "C",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            check=True,
            timeout=_GIT_LIMIT_S,
            text=True,
        ).stdout
    except FileNotFoundError as error:
        raise OSError("git is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise OSError(f"git took longer than {_GIT_LIMIT_S:.0f} s") from error
    except subprocess.CalledProcessError as error:
        raise OSError("git does not take it for a checkout of this user") from error

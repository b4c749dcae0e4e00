"""What git says of a checkout, read only: no lock is taken, no hook or monitor is started, nothing is written there.

All functions raise OSError with the reason where git cannot answer.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_LIMIT_S = 20.0  # a slow network file system
_QUIET = ("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-c", "core.quotePath=false")
_DIFF = (  # everything that a user's configuration could change in the bytes of a patch
    *("--binary", "--full-index", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--unified=3"),
    *(
        "--diff-algorithm=myers",
        "--no-indent-heuristic",
        "--src-prefix=a/",
        "--dst-prefix=b/",
        "--inter-hunk-context=0",
    ),
    *("-O/dev/null", "--ignore-submodules=all", "--no-relative"),
)


def read(root: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> bytes:
    """Output of `git arguments` in the checkout `root`."""
    try:
        return subprocess.run(
            ["git", *_QUIET, *arguments],
            cwd=root,
            env={
                "PATH": os.environ.get("PATH", os.defpath),
                "HOME": os.environ.get("HOME", os.devnull),  # its configuration says which owners are trusted
                "GIT_OPTIONAL_LOCKS": "0",
                "LC_ALL": "C",
                **(environment or {}),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            check=True,
            timeout=_LIMIT_S,
        ).stdout
    except FileNotFoundError as error:
        raise OSError("git is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise OSError(f"git took longer than {_LIMIT_S:.0f} s") from error
    except subprocess.CalledProcessError as error:
        raise OSError("git does not take it for a checkout of this user") from error


def changes(root: Path, folders: Sequence[str]) -> list[str]:
    """Paths that differ from the commit, sorted: tracked ones anywhere, new ones (but ignored) below `folders`."""
    tracked = read(
        root, "status", "--porcelain", "-z", "--no-renames", "--untracked-files=no", "--ignore-submodules=all"
    )
    new = read(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *folders)
    found = [entry[3:] for entry in tracked.split(b"\0") if entry] + [entry for entry in new.split(b"\0") if entry]
    return sorted(entry.decode(errors="backslashreplace") for entry in found)


def patch(root: Path, folders: Sequence[str]) -> bytes:
    """All of `changes` as a patch over the commit, for `git apply`; the same bytes for the same changes.

    Made in an index and a store of objects of its own: the checkout's are left as they are.
    """
    objects = Path(os.fsdecode(read(root, "rev-parse", "--git-path", "objects").strip()))
    with tempfile.TemporaryDirectory(prefix="apertus-nemo-") as scratch:
        own = {
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": str((root / objects).resolve()),
            "GIT_INDEX_FILE": f"{scratch}/index",
            "GIT_OBJECT_DIRECTORY": f"{scratch}/objects",
        }
        os.mkdir(own["GIT_OBJECT_DIRECTORY"])
        read(root, "read-tree", "HEAD", environment=own)
        read(root, "add", "--update", "--", ".", environment=own)
        present = [folder for folder in folders if (root / folder).is_dir()]
        if present:
            read(root, "add", "--", *present, environment=own)
        return read(root, "diff", "--cached", *_DIFF, "HEAD", environment=own)

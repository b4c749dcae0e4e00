"""Our own package as a wheel, from the committed tree: the same commit gives the same bytes.

    wheel = build_wheel(root, work, epoch=definition.epoch, allow_dirty=False)
    wheel.path, wheel.version, wheel.sha256, wheel.commit

The wheel is built from what git holds, in a folder of its own: files that are ignored, or not committed, have no part
in it. It carries the commit (`source.json`), so that a run inside an image has the source of a run from that checkout.
"""

from __future__ import annotations

import re
import shutil
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from apertus_nemo.errors import InputError, UnfitEnvironment
from apertus_nemo.image.programs import plain_environment, run
from apertus_nemo.record.canonical import dumps
from apertus_nemo.record.files import file_sha256, write_atomic, writing
from apertus_nemo.record.source import ORIGIN, PARTS


@dataclass(frozen=True)
class OwnWheel:
    """A wheel of ours."""

    path: Path
    version: str
    sha256: str
    commit: str | None  # 40 hex digits; None: built from a tree with changes, which nobody could build again


def build_wheel(root: Path, work: Path, *, epoch: int, allow_dirty: bool) -> OwnWheel:
    """Build it below `work`; `epoch` is the time of the files inside.

    Raises InputError where `root` is no checkout in git, or has changes and `allow_dirty` is not set.
    """
    try:
        commit = _git(root, "rev-parse", "--verify", "HEAD").strip()
        changed = [line for line in _git(root, "status", "--porcelain", "-z").split("\0") if line]
    except UnfitEnvironment as error:
        raise InputError(f"{root} is no checkout in git that can be read: {error}") from error
    if changed and not allow_dirty:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise InputError(
            f"{root} has changes that are not committed ({ascii(changed[0][3:])[1:-1]}{more}): commit them, or build "
            "with --allow-dirty, an image that cannot be published"
        )
    source = work / "source"
    with writing(source):
        source.mkdir()
        if changed:
            _copy(root, source)
        else:
            _export(root, commit, work / "source.tar", source)
            tree = _git(root, "rev-parse", "--verify", "HEAD^{tree}").strip()
            (source / PARTS[0] / "resources").mkdir()
            write_atomic(
                source / PARTS[0] / "resources" / ORIGIN,
                dumps({"commit": commit, "dirty": False, "patch": None, "tree": tree}),
            )
    target = work / "wheel"
    command: list[str | Path] = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", target]
    run(command, what="building our own wheel", environment=plain_environment(epoch), folder=source, limit_s=600)
    wheels = sorted(target.glob("*.whl"))
    named = re.match(r"apertus_nemo-([^-]+)-", wheels[0].name) if len(wheels) == 1 else None
    if named is None:
        raise UnfitEnvironment(f"building our own wheel gave {[path.name for path in wheels]}")
    return OwnWheel(wheels[0], named[1], file_sha256(wheels[0]), None if changed else commit)


def _git(root: Path, *arguments: str) -> str:
    return run(["git", "-C", root, *arguments], what="asking git", limit_s=120)


def _export(root: Path, commit: str, archive: Path, target: Path) -> None:
    _git(root, "archive", "--format=tar", f"--output={archive}", commit)
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    archive.unlink()


def _copy(root: Path, target: Path) -> None:
    """What git tracks or would track, as it lies there."""
    for name in _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        path = root / name
        if name and path.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)

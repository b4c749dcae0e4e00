"""The self-test of an image that is not started: it is made a root, and its own `selftest` runs in there.

    verified = verify("layouts/cpu:1.0.0", platform=..., work=folder, ...)
    verified.checks, verified.exit_code

The image speaks for itself; what is outside of it is held against it: the sidecar of a squashfs file, and the lock
digest that its configuration names.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apertus_nemo.errors import Differs, InputError
from apertus_nemo.image.definition import Definition, parse_definition
from apertus_nemo.image.inside import Root, opened
from apertus_nemo.image.layout import Image, Layout
from apertus_nemo.image.lock import ImageLock, parse_lock
from apertus_nemo.image.oci import INDEXES, LOCK_LABEL, Platform
from apertus_nemo.image.pull import pull
from apertus_nemo.image.sqsh import check, sidecar_path
from apertus_nemo.image.squashfs import find_tool, make_squashfs
from apertus_nemo.record.canonical import loads
from apertus_nemo.record.files import writing
from apertus_nemo.selftest.check import FAILED, NOT_CHECKED, OK, Check, exit_code

_PREFIX = "apertus-nemo-verify-"
_LOCK, _DEFINITION = "etc/apertus-nemo/lock.json", "etc/apertus-nemo/image.toml"
_STATES = (OK, FAILED, NOT_CHECKED)
_MAX_TEXT = 2000


@dataclass
class Verified:
    """What was found."""

    name: str  # "cpu-1.0.0"
    manifest_digest: str | None
    checks: list[Check] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0, or 1 where a check failed."""
        return exit_code(self.checks)

    def tree(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "checks": [check.tree() for check in self.checks],
            "image": self.name,
            "manifest_digest": self.manifest_digest,
            "verdict": FAILED if self.exit_code else OK,
        }


@dataclass(frozen=True)
class _File:
    """A squashfs file, and what is known of it from outside."""

    path: Path
    ours: bool  # it was made here, and is not kept
    manifest_digest: str | None
    lock_digest: str | None
    check: Check


@dataclass(frozen=True)
class Wanted:
    """An image, and where it may come from."""

    text: str  # a .sqsh file, a layout, a version or a reference
    platform: Platform
    cache: Path  # of blobs, for what is pulled
    environment: Mapping[str, str]
    mirror: str | None = None
    insecure: bool = False


def verify(
    wanted: Wanted,
    *,
    only: Sequence[str] = (),
    limit_s: float,
    tell: Callable[[Check], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> Verified:
    """What the image's own self-test finds, and what is held against it from outside.

    Raises InputError for what is no image of ours, UnfitEnvironment where it cannot be run here, or not in `limit_s`.
    """
    with _work() as work:
        file = _squashfs(wanted, work, say)
        with opened(file.path, work=work) as root:
            if file.ours:
                file.path.unlink()  # it is open, and gone when the last one closes it
            lock, definition = _papers(root, wanted.text)
            found = Verified(lock.name, file.manifest_digest)
            for one in (file.check, _lock_check(lock, file)):
                found.checks.append(one)
                tell(one)
            if found.exit_code:
                return found  # not what it should be: nothing of it is run
            say(f"running the self-test of {lock.name}")
            for one in _selftest(root, definition, only, limit_s):
                found.checks.append(one)
                tell(one)
            return found


@contextlib.contextmanager
def _work() -> Iterator[Path]:
    """A folder for the time being; what killed processes have left of theirs is taken away."""
    base = Path(tempfile.gettempdir())
    for path in base.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), open(path / "held", "rb") as held:
            if os.fstat(held.fileno()).st_uid == os.geteuid():
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
    with writing(base):
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    try:
        with open(folder / "held", "wb") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _squashfs(wanted: Wanted, work: Path, say: Callable[[str], None]) -> _File:
    """The image as a squashfs file: the one that is given, or one that is made in `work`."""
    path = Path(wanted.text)
    if path.is_file():
        if not sidecar_path(path).is_file():
            return _File(path, False, None, None, Check("file", NOT_CHECKED, f"{path.name} has no sidecar"))
        try:
            checked = check(path)
        except Differs as error:
            return _File(path, False, None, None, Check("file", FAILED, str(error)))
        fine = Check("file", OK, f"as it was made, {checked.size_bytes:,} bytes")
        return _File(path, False, checked.manifest_digest, None, fine)
    tool = find_tool(wanted.environment)
    folder, _, name = wanted.text.removeprefix("oci:").partition(":")
    if wanted.text.startswith("oci:") or Path(folder).is_dir():
        layout = Layout.open(Path(folder))
        image = _of_layout(layout, wanted.platform, name or None)
        say("making a squashfs file of its layers")
        target = work / "image.sqsh"
        make_squashfs(layout.blobs, image, target, tool=tool, contents="plain", what=wanted.text)
        return _of_image(target, image)
    pulled = pull(
        wanted.text,
        folder=work,
        cache=wanted.cache,
        platform=wanted.platform,
        environment=wanted.environment,
        mirror=wanted.mirror,
        insecure=wanted.insecure,
        with_referrers=False,
        say=say,
    )
    fine = Check("file", OK, f"every layer of {pulled.manifest_digest} as its digests say")
    return _File(pulled.path, True, pulled.manifest_digest, pulled.lock_digest, fine)


def _of_layout(layout: Layout, platform: Platform, name: str | None) -> Image:
    """The image that is meant where no name is given: the only one, or the only index."""
    if name is None:
        listed = layout.index().manifests
        indexes = [one.digest for one in listed if one.media_type in INDEXES]
        name = indexes[0] if len(listed) > 1 and len(indexes) == 1 else None
    return layout.image(platform, name)


def _of_image(path: Path, image: Image) -> _File:
    fine = Check("file", OK, f"{len(image.manifest.layers)} layers as their digests say")
    return _File(path, True, image.descriptor.digest, image.config.labels.get(LOCK_LABEL), fine)


def _papers(root: Root, what: str) -> tuple[ImageLock, Definition]:
    """What the image holds of how it was made."""
    files = root.read(_LOCK, _DEFINITION)
    lock, definition = files[_LOCK], files[_DEFINITION]
    if lock is None or definition is None:
        missing = _LOCK if lock is None else _DEFINITION
        raise InputError(f"{what} is no image of apertus-nemo: it holds no /{missing}")
    return (
        parse_lock(lock, what=f"{what}: /{_LOCK}"),
        parse_definition(definition, what=f"{what}: /{_DEFINITION}"),
    )


def _lock_check(lock: ImageLock, file: _File) -> Check:
    """The image's lock against the digest that the image's configuration has."""
    if file.lock_digest is None:
        return Check("lock", NOT_CHECKED, "a squashfs file does not say from which lock its image was built")
    if file.lock_digest != lock.digest:
        return Check("lock", FAILED, f"the lock in the image is {lock.digest}, its label says {file.lock_digest}")
    return Check("lock", OK, f"{lock.digest}, as the image's label says")


def _selftest(root: Root, definition: Definition, only: Sequence[str], limit_s: float) -> list[Check]:
    """Have the image's own self-test run; its checks, or one that says why there are none."""
    command = [f"{definition.prefix}/bin/apertus-nemo", "selftest", "--json"]
    command += [word for part in only for word in ("--only", part)]
    path = f"{definition.prefix}/bin:/usr/local/bin:/usr/bin:/bin"
    environment = {"HOME": "/tmp", "LANG": "C.UTF-8", "PATH": path, "PYTHONNOUSERSITE": "1", "TMPDIR": "/tmp"}
    done = root.run(command, environment=environment, limit_s=limit_s)
    try:
        tree = loads(done.output, what="the self-test")
        checks = [Check(*(_text(one[key]) for key in ("name", "state", "reason"))) for one in tree["checks"]]
        if not checks or any(one.state not in _STATES for one in checks) or done.code != exit_code(checks):
            raise ValueError
    except (InputError, ValueError, KeyError, TypeError):
        last = [line for line in done.errors.decode(errors="replace").splitlines() if line.strip()][-1:]
        return [
            Check("self-test", FAILED, f"it ended with {done.code}: {_text(last[0]) if last else 'without a word'}")
        ]
    return checks


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value[:_MAX_TEXT]


def to_json(found: Verified) -> str:
    """What --json prints."""
    return json.dumps(found.tree(), indent=2, sort_keys=True)

"""What changed between two images, and what each change may do to results.

    a = side("cpu-1.0.0", platform)
    b = side("images/cpu-1.1.0", platform, like=a)
    changes = diff(a, b, platform)     # [Change("python", "numpy", "1.26.4", "1.26.5", "bits", "..."), ...]

A side is an image's name, a lock, or an OCI layout that was built; only layouts have files to compare. Of two layouts,
layers that both have below all others are read once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apertus_nemo.errors import InputError
from apertus_nemo.image.definition import read_definition
from apertus_nemo.image.effects import (
    BITS,
    NOTHING,
    ORDER,
    Effect,
    effect_of_file,
    effect_of_package,
    effect_of_setting,
    effect_of_variable,
)
from apertus_nemo.image.families import DEFINITION, LOCK, MAX_BYTES, find
from apertus_nemo.image.layers import Layer, open_layer
from apertus_nemo.image.layout import REF_NAME, Image, Layout
from apertus_nemo.image.lock import ImageLock, parse_lock, read_lock
from apertus_nemo.image.oci import Platform

LOCK_IN_IMAGE = "etc/apertus-nemo/lock.json"
_BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class Side:
    """One of two images, as far as it is known."""

    name: str
    lock: ImageLock
    environment: Mapping[str, str] | None = None  # None: not known
    labels: Mapping[str, str] | None = None
    settings: Mapping[str, str] | None = None  # entrypoint, command, working directory, user, volumes
    layers: tuple[_Read, ...] | None = None
    whole: bool = False  # environment and labels are all that the image has, and not only what its definition says

    @property
    def files(self) -> Mapping[str, str] | None:
        """Path -> mode, owner and SHA-256, or where it points to."""
        return None if self.layers is None else self.layers[-1].files


@dataclass(frozen=True)
class _Read:
    """The files of an image after one of its layers."""

    digest: str
    files: Mapping[str, str]
    lock: bytes | None


@dataclass(frozen=True)
class Change:
    """One thing that is not the same."""

    kind: str  # "base", "debian", "python", "environment", "label", "setting", "file"
    name: str
    old: str | None  # None: it was not there
    new: str | None
    effect: str
    reason: str


@dataclass(frozen=True)
class Changes:
    """All that is not the same, and what could not be compared."""

    changes: list[Change]
    not_compared: list[str] = field(default_factory=list)

    @property
    def effect(self) -> str:
        """The most that any of them may do."""
        return max((one.effect for one in self.changes), key=ORDER.index, default=NOTHING)


def side(text: str, platform: str, *, folder: Path | None = None, like: Side | None = None) -> Side:
    """Read one side: a folder with an OCI layout (perhaps `:NAME`), a lock file, or the name of an image.

    `like` is the other side, whose layers are not read again. Raises InputError where it is none of these, Differs
    where a layer is not what its digest says.
    """
    path, _, tag = text.removeprefix("oci:").partition(":")
    if text.startswith("oci:") or (Path(path) / "oci-layout").is_file():
        return _of_layout(Path(path), tag or None, platform, () if like is None else like.layers or ())
    if Path(text).is_file():
        return Side(text, read_lock(Path(text)))
    if "/" in text:
        raise InputError(f"{text[:200]} is neither a lock nor a folder with an OCI layout")
    family = find(text, folder)
    definition = read_definition(family.folder / DEFINITION)
    lock = read_lock(family.folder / LOCK)
    if lock.name != family.name:
        raise InputError(f"the lock of {family.name} is not here, where {lock.name} is; give the file, or the layout")
    return Side(family.name, lock, dict(definition.environment), dict(definition.labels))


def _of_layout(root: Path, tag: str | None, platform: str, known: tuple[_Read, ...]) -> Side:
    layout = Layout.open(root)
    names = [one.annotations.get(REF_NAME, "") for one in layout.index().manifests]
    if tag is None and len(names) > 1:  # of one image: its name is the index of those with an architecture
        shortest = min((name for name in names if name), key=len, default="")
        tag = shortest if shortest and all(name.startswith(shortest) for name in names) else None
    image = layout.image(Platform.parse(platform), tag)
    layers = _read(layout, image, known)
    if not layers or (data := layers[-1].lock) is None:
        raise InputError(f"{root} is not an image of ours: it holds no {LOCK_IN_IMAGE}")
    lock = parse_lock(data, what=f"{root}: {LOCK_IN_IMAGE}")
    config = image.config
    settings = {
        "command": list(config.command),
        "entrypoint": list(config.entrypoint),
        "user": config.user,
        "volumes": list(config.volumes),
        "working directory": config.working_dir,
    }
    return Side(
        f"{root} ({lock.name})",
        lock,
        dict(entry.partition("=")[::2] for entry in config.environment),
        dict(config.labels),
        {name: str(value) for name, value in settings.items() if value},
        layers,
        whole=True,
    )


def _read(layout: Layout, image: Image, known: tuple[_Read, ...]) -> tuple[_Read, ...]:
    found: list[_Read] = []
    for number, (descriptor, kind) in enumerate(zip(image.manifest.layers, image.compressions, strict=True)):
        if number < len(known) and known[number].digest == descriptor.digest and len(found) == number:
            found.append(known[number])
            continue
        known = known[:number]  # above another layer, the same one makes something else
        files, lock = (dict(found[-1].files), found[-1].lock) if found else ({}, None)
        what = f"layer {number + 1} of {layout.root}"
        diff_id = image.config.diff_ids[number]
        with open_layer(layout.blobs, descriptor, kind, diff_id=diff_id, what=what) as layer:
            lock = _put(layer, files, lock)
        found.append(_Read(descriptor.digest, files, lock))
    return tuple(found)


def _put(layer: Layer, files: dict[str, str], lock: bytes | None) -> bytes | None:
    """Put a layer's entries into `files`, whiteouts obeyed; the image's lock as it is after the layer."""
    for entry in layer.entries():
        name = _plain(entry.name)
        folder, _, last = name.rpartition("/")
        if last == ".wh..wh..opq":
            _remove(files, f"{folder}/" if folder else "")
        elif last.startswith(".wh."):
            gone = f"{folder}/{last[4:]}" if folder else last[4:]
            files.pop(gone, None)
            _remove(files, f"{gone}/")
        elif entry.isreg():
            digest, kept = hashlib.sha256(), b""
            stream = layer.data(entry)
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
                if name == LOCK_IN_IMAGE and len(kept) < MAX_BYTES:
                    kept += block
            files[name] = f"{_owner(entry)} {digest.hexdigest()}"
            lock = kept if name == LOCK_IN_IMAGE else lock
        elif entry.islnk():
            files[name] = files.get(_plain(entry.linkname), "hard link")
        elif not entry.isdir():
            files[name] = f"{_owner(entry)} {'link to ' if entry.issym() else 'device '}{entry.linkname}".rstrip()
    return lock if LOCK_IN_IMAGE in files else None


def _plain(name: str) -> str:
    """Without the ways of writing the same: "./a", "/a", "a/"."""
    return re.sub(r"^(\./|/)+", "", name).rstrip("/")


def _owner(entry: Any) -> str:
    return f"{entry.mode:o} {entry.uid}:{entry.gid}"


def _remove(files: dict[str, str], prefix: str) -> None:
    for path in [path for path in files if path.startswith(prefix)]:
        del files[path]


def diff(a: Side, b: Side, platform: str) -> Changes:
    """What changed from `a` to `b`. Raises InputError where one is not for the platform."""
    for one in (a, b):
        if platform not in one.lock.platforms:
            raise InputError(f"{one.name} is not for {platform}; it is for {', '.join(one.lock.platforms)}")
    left, right = a.lock.tree, b.lock.tree
    changes = _base(left["base"], right["base"])
    for kind in ("debian", "python"):
        old, new = ({one["name"]: one for one in tree["platforms"][platform][kind]} for tree in (left, right))
        changes += _packages(kind, old, new)
    missing: list[str] = []
    changes += _texts("environment", *_alike(a, b, a.environment, b.environment), effect_of_variable, missing)
    changes += _texts(
        "label", *_alike(a, b, a.labels, b.labels), lambda _: Effect(NOTHING, "read by people and by sites"), missing
    )
    changes += _texts("setting", a.settings, b.settings, effect_of_setting, missing)
    changes += _texts("file", a.files, b.files, effect_of_file, missing)
    if a.whole != b.whole and a.environment is not None and b.environment is not None:
        missing.append("environment and labels beyond what a definition sets: one side was not built")
    return Changes(changes, missing)


def _alike(
    a: Side, b: Side, old: Mapping[str, str] | None, new: Mapping[str, str] | None
) -> tuple[Mapping[str, str] | None, Mapping[str, str] | None]:
    """Both in what the definition sets, where one side is a definition and the other an image that was built."""
    if old is None or new is None or a.whole == b.whole:
        return old, new
    names = set(new if a.whole else old)
    return {k: v for k, v in old.items() if k in names}, {k: v for k, v in new.items() if k in names}


def _base(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    names = ("kind", "release", "reference", "digest")
    reason = "everything below our packages: kernels, libraries, Python"
    found = [
        Change("base", name, _text(old.get(name)), _text(new.get(name)), BITS, reason)
        for name in names
        if old.get(name) != new.get(name)
    ]
    before, after = old.get("provides", {}), new.get("provides", {})
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            effect = effect_of_package(name)
            found.append(
                Change("base", name, _text(before.get(name)), _text(after.get(name)), effect.what, effect.reason)
            )
    return found


def _packages(kind: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    found = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        effect = effect_of_package(name)
        texts = [None if one is None else str(one["version"]) for one in (before, after)]
        if before is not None and after is not None and texts[0] == texts[1]:
            texts = [f"{one['version']} ({one['sha256'][:12]})" for one in (before, after)]
        found.append(Change(kind, name, texts[0], texts[1], effect.what, effect.reason))
    return found


def _texts(
    kind: str,
    old: Mapping[str, str] | None,
    new: Mapping[str, str] | None,
    effect_of: Callable[[str], Effect],
    missing: list[str],
) -> list[Change]:
    if old is None or new is None:
        what = kind if kind == "environment" else f"{kind}s"
        missing.append(f"{what}: not known of {'both' if old is new else 'one side'}")
        return []
    found = []
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            effect = effect_of(name)
            found.append(Change(kind, name, old.get(name), new.get(name), effect.what, effect.reason))
    return found


def _text(value: Any) -> str | None:
    return None if value is None else value if isinstance(value, str) else "unknown"

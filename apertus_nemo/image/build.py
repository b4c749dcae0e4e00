"""Builds the image of a family from its definition and its lock: same inputs, same digest.

    made = build(order, output, builder=None, say=print)
    made.platforms["linux/amd64"].manifest_digest

Below our package are three layers that follow from lock and definition alone: Debian, torch, the other packages. They
are kept in the cache under a name made of all that decides them, and are checked byte by byte when they are used again.
Our package is one layer more. Manifest and configuration are written here, so no builder has a say in them. A layout is
complete, or it is not there.
"""

from __future__ import annotations

import datetime
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apertus_nemo import __version__
from apertus_nemo.errors import ApertusError, InputError, UnfitEnvironment
from apertus_nemo.image import containerfile, inputs
from apertus_nemo.image.builders import Builder, find_builder, make_builder
from apertus_nemo.image.debian import archives_below, find_archives, make_base
from apertus_nemo.image.definition import Definition
from apertus_nemo.image.families import DEFINITION, LOCK
from apertus_nemo.image.layout import Image, Layout
from apertus_nemo.image.lock import ImageLock, stale
from apertus_nemo.image.oci import CONFIG, INDEX, MANIFEST, Descriptor, Index, Manifest, Platform
from apertus_nemo.image.programs import find_program, run
from apertus_nemo.image.publish import LOCK_LABEL, REVISION_LABEL
from apertus_nemo.image.sbom import bill_of_materials
from apertus_nemo.image.wheel import OwnWheel, build_wheel
from apertus_nemo.image.workplace import check_free, workplace
from apertus_nemo.record.canonical import dumps, sha256_hex
from apertus_nemo.record.files import read_bytes, writing

FORM = 2  # raised when the same inputs are built into other bytes
ABOVE_BASE = ("torch", "python")  # the layers between base and package
_UNPACKED = 6  # bytes that a byte of inputs becomes while a stack is built: unpacked, and compressed again
_SPARE_BYTES = 512 * 2**20
_MAX_BYTES = 16 * 2**20

Say = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """What is to be built, and from where."""

    definition: Definition
    lock: ImageLock
    root: Path  # the checkout
    folder: Path  # of the family: definition and lock as they lie in the image
    platforms: tuple[str, ...]
    cache: Path
    debian_mirror: str | None = None
    allow_dirty: bool = False
    anew: bool = False  # take no layer from the cache


@dataclass(frozen=True)
class Part:
    """A layer of an image that was built."""

    what: str
    digest: str
    size_bytes: int
    kept: bool  # from the cache of layers


@dataclass(frozen=True)
class Made:
    """The image of one platform."""

    manifest_digest: str
    config_digest: str
    layers: tuple[Part, ...]


@dataclass(frozen=True)
class Result:
    """A layout that was built."""

    output: Path
    name: str
    commit: str | None
    lock_digest: str
    index_digest: str
    platforms: Mapping[str, Made] = field(default_factory=dict)


def check_order(order: Order) -> None:
    """Raise InputError, one line, where the lock is not one that an image can be built from."""
    definition, lock = order.definition, order.lock
    again = f"run `apertus-nemo image lock {definition.family}`"
    old = stale(lock, definition, order.root)
    if old:
        raise InputError(f"{order.folder / LOCK} is stale: {old[0]}{_more(old)}; {again}")
    if lock.unresolved:
        raise InputError(
            f"{order.folder / LOCK} is not resolved: {lock.unresolved[0]}{_more(lock.unresolved)}; {again}"
        )
    for platform in order.platforms:
        if platform not in lock.platforms:
            raise InputError(f"{lock.name} is not for {platform}; it is for {', '.join(lock.platforms)}")
    if definition.sources:
        raise InputError(f"{order.folder / DEFINITION}: sources: no image is built with source trees yet")


def _more(found: list[str]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def fetch(order: Order, platform: str, say: Say) -> inputs.Inputs:
    """The files of a platform, from cache, mirror and index."""
    base, mirror = order.definition.base, order.debian_mirror
    return inputs.fetch(
        order.lock,
        platform,
        python_version=order.definition.python_version,
        cache=order.cache,
        archives=lambda: find_archives() if mirror is None else archives_below(mirror, base.suites),
        say=lambda text: say(f"{platform}: {text}"),
    )


def containerfiles(order: Order, platform: str) -> str:
    """Both texts that a builder is given, for reading."""
    wheel = f"apertus_nemo-{__version__}-py3-none-any.whl"
    stack = containerfile.stack_file(order.definition, order.lock, platform)
    return f"{stack}\n{containerfile.package_file(order.definition, order.lock, platform, wheel)}"


def build(order: Order, output: Path, *, builder: str | None, say: Say) -> Result:
    """Build every platform into an OCI layout at `output`, which must not be there.

    Raises InputError for a lock that is stale or not resolved and for a dirty tree, UnfitEnvironment where files cannot
    be had, a program is missing or the disk is full. Then nothing is at `output`.
    """
    check_order(order)
    if output.exists() or output.is_symlink():
        raise InputError(f"{output} is there already: remove it, or give another folder with --output")
    name = find_builder(builder)
    if order.definition.base.kind == "debian":
        find_program("mmdebstrap")
    for platform in order.platforms:
        _check_runs(platform)
    with workplace(order.cache, ".build-") as work:
        wheel = build_wheel(
            order.root, _fresh(work, "wheel"), epoch=order.definition.epoch, allow_dirty=order.allow_dirty
        )
        say(f"our package: {wheel.path.name} of {wheel.commit or 'a tree with changes'}")
        with workplace(output.absolute().parent, f".{output.name}.") as beside:
            layout = Layout.create(beside / "layout")
            made = {}
            for platform in order.platforms:
                with _keeping_logs(work, order.cache / "logs"):
                    made[platform] = _one(
                        order, platform, wheel, layout, _fresh(work, platform.replace("/", "-")), name, say
                    )
            listed = tuple(
                Descriptor(
                    MANIFEST, one.manifest_digest, _size(layout, one.manifest_digest), platform=Platform.parse(name)
                )
                for name, one in made.items()
            )
            index = layout.blobs.write(Index(listed).to_bytes(), INDEX)
            layout.tag(index, order.lock.name)
            with writing(output):
                try:
                    os.rename(layout.root, output)
                except FileExistsError:
                    raise InputError(f"{output} was made by another build meanwhile") from None
    return Result(output, order.lock.name, wheel.commit, order.lock.digest, index.digest, made)


@contextmanager
def _keeping_logs(work: Path, kept: Path) -> Iterator[None]:
    """Where the block ends with an error that names a log below `work`, keep that log, and name where it is then."""
    try:
        yield
    except UnfitEnvironment as error:
        text = str(error)
        for log in sorted(work.rglob("*.log")):
            if text.endswith(str(log)):
                target = kept / f"{log.stem}{work.name.removeprefix('.build')}.log"
                with writing(target):
                    kept.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(log, target)
                raise UnfitEnvironment(f"{text.removesuffix(str(log))}{target}") from error
        raise


def _size(layout: Layout, digest: str) -> int:
    return layout.blobs.path(digest).stat().st_size


def _fresh(work: Path, name: str) -> Path:
    with writing(work):
        (work / name).mkdir()
    return work / name


def _check_runs(platform: str) -> None:
    """Raise UnfitEnvironment where programs of the platform do not run: the image's own Python installs."""
    machine = {"linux/amd64": "x86_64", "linux/arm64": "aarch64"}[platform]
    if os.uname().machine != machine and not Path(f"/proc/sys/fs/binfmt_misc/qemu-{machine}").exists():
        raise UnfitEnvironment(
            f"this machine does not run programs for {platform}: build there, or emulate it (qemu-user-static and "
            "binfmt-support, with binfmt_misc mounted)"
        )


def _one(order: Order, platform: str, wheel: OwnWheel, layout: Layout, work: Path, name: str, say: Say) -> Made:
    """Build one platform into `layout`."""
    found = fetch(order, platform, say)
    files = _fresh(work, "files")
    for one, path in found.python:
        _place(path, files / one.file)
    for file, text in containerfile.requirements(order.lock, platform).items():
        (files / file).write_text(text)
    _place(wheel.path, files / wheel.path.name)
    bill = bill_of_materials(order.lock, platform, wheel, order.definition)
    builder = make_builder(name, _fresh(work, "builder"))
    stack, kept = _stack(order, platform, found, builder, work, say)
    say(f"{platform}: our package, as one layer")
    package = _package(order, platform, wheel, bill, stack, builder, work)
    layers = (*stack.image.manifest.layers, *package.image.manifest.layers)
    base = len(stack.image.manifest.layers) - len(ABOVE_BASE)
    names = (*["base"] * base, *ABOVE_BASE, *["package"] * len(package.image.manifest.layers))
    say(f"{platform}: putting it together")
    for part in (stack, package):
        for layer in part.image.manifest.layers:
            part.layout.blobs.check(layer)
            target = layout.blobs.path(layer.digest)
            if not target.exists():
                _place(part.layout.blobs.path(layer.digest), target)
    config = layout.blobs.write(dumps(_config(order, platform, wheel, stack.image, package.image, names)), CONFIG)
    manifest = layout.blobs.write(Manifest(config, layers).to_bytes(), MANIFEST)
    layout.tag(manifest, f"{order.lock.name}-{platform.rpartition('/')[2]}")
    shutil.rmtree(work, ignore_errors=True)
    parts = tuple(
        Part(what, layer.digest, layer.size_bytes, kept and what != "package")
        for what, layer in zip(names, layers, strict=True)
    )
    return Made(manifest.digest, config.digest, parts)


@dataclass(frozen=True)
class _Built:
    """Layers, where they lie."""

    layout: Layout
    image: Image


def _stack(
    order: Order, platform: str, found: inputs.Inputs, builder: Builder, work: Path, say: Say
) -> tuple[_Built, bool]:
    """(everything below our package, whether it was there)."""
    text = containerfile.stack_file(order.definition, order.lock, platform)
    decides = {
        "builder": builder.version(),
        "configured": _has_dpkg(order, platform),
        "containerfile": text,
        "debian": [one.sha256 for one in order.lock.debian(platform)],
        "epoch": order.definition.epoch,
        "form": FORM,
        "mmdebstrap": _version_of_mmdebstrap(order),
        "requirements": containerfile.requirements(order.lock, platform),
    }
    kept = order.cache / "layers" / sha256_hex(dumps(decides))
    if not order.anew:
        there = _look(kept, platform)
        if there is not None:
            say(f"{platform}: base, torch and Python packages are in the cache")
            return there, True
    check_free(order.cache, found.size_bytes * _UNPACKED + _SPARE_BYTES, f"building {order.lock.name} for {platform}")
    if order.definition.base.kind == "debian":
        say(f"{platform}: the base, from {len(found.debs)} Debian packages")
        make_base(
            found.debs,
            work / "base.tar",
            architecture=platform.rpartition("/")[2],
            epoch=order.definition.epoch,
            work=_fresh(work, "base"),
            configure=_has_dpkg(order, platform),
        )
    say(f"{platform}: {len(found.python)} Python packages, as two layers")
    target = work / "stack"
    builder.build(text, work, target, stage="stack", platform=platform, epoch=order.definition.epoch, base=None)
    layout = Layout.open(target)
    image = layout.image(Platform.parse(platform), "stack")
    _tag_base(layout, image)
    if order.anew:
        return _Built(layout, image), False
    with writing(kept):
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(target, kept)
        except OSError as error:
            if not kept.is_dir():
                raise error
            return _Built(layout, image), False  # another build was first, or what is there is damaged
    return _Built(Layout.open(kept), image), False


def _look(kept: Path, platform: str) -> _Built | None:
    """Layers of the cache, every byte checked; None where there are none, and what is damaged is removed."""
    if not kept.is_dir():
        return None
    try:
        layout = Layout.open(kept)
        image = layout.image(Platform.parse(platform), "stack")
        for layer in image.manifest.layers:
            layout.blobs.check(layer)
    except ApertusError:
        shutil.rmtree(kept, ignore_errors=True)
        return None
    return _Built(layout, image)


def _tag_base(layout: Layout, image: Image) -> None:
    """List the lowest layers as an image of their own, which our package is installed on."""
    count = len(image.manifest.layers) - len(ABOVE_BASE)
    platform = image.config.platform
    config = {
        "architecture": platform.architecture,
        "config": {"Env": list(image.config.environment)},
        "os": platform.os,
        "rootfs": {"diff_ids": list(image.config.diff_ids[:count]), "type": "layers"},
    }
    manifest = Manifest(layout.blobs.write(dumps(config), CONFIG), image.manifest.layers[:count])
    layout.tag(layout.blobs.write(manifest.to_bytes(), MANIFEST), "base")


def _package(
    order: Order, platform: str, wheel: OwnWheel, bill: bytes, stack: _Built, builder: Builder, work: Path
) -> _Built:
    """Our own layer."""
    papers = containerfile.papers(
        order.definition,
        toml=read_bytes(order.folder / DEFINITION, max_bytes=_MAX_BYTES),
        lock=order.lock.to_bytes(),
        sbom=bill,
    )
    with writing(work):
        for path, data in papers.items():
            file = work / "papers" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            file.chmod(0o644)
        for folder in (work / "papers", *(path for path in (work / "papers").rglob("*") if path.is_dir())):
            folder.chmod(0o755)
    text = containerfile.package_file(order.definition, order.lock, platform, wheel.path.name)
    target = work / "package"
    builder.build(
        text,
        work,
        target,
        stage="package",
        platform=platform,
        epoch=order.definition.epoch,
        base=stack.layout.root,
    )
    layout = Layout.open(target)
    return _Built(layout, layout.image(Platform.parse(platform), "package"))


def _config(
    order: Order, platform: str, wheel: OwnWheel, stack: Image, package: Image, names: tuple[str, ...]
) -> dict[str, Any]:
    """The configuration of the image: what it runs with, what it is, and what each layer holds."""
    definition = order.definition
    created = datetime.datetime.fromtimestamp(definition.epoch, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    labels = {
        **definition.labels,
        "ai.apertus.image.family": definition.family,
        LOCK_LABEL: order.lock.digest,
        "org.opencontainers.image.created": created,
        "org.opencontainers.image.title": definition.title,
        "org.opencontainers.image.version": definition.version,
    }
    if wheel.commit is not None:
        labels[REVISION_LABEL] = wheel.commit
    if definition.base.kind == "image":
        labels["org.opencontainers.image.base.digest"] = definition.base.digest
        labels["org.opencontainers.image.base.name"] = definition.base.reference
    inherited = dict(entry.partition("=")[::2] for entry in stack.config.environment)
    variables = containerfile.environment(definition, inherited)
    parsed = Platform.parse(platform)
    return {
        "architecture": parsed.architecture,
        "config": {
            "Cmd": ["apertus-nemo", "--help"],
            "Env": [f"{name}={value}" for name, value in sorted(variables.items())],
            "Labels": labels,
            "WorkingDir": "/",
        },
        "created": created,
        "history": [{"created": created, "created_by": f"apertus-nemo image build: {name}"} for name in names],
        "os": parsed.os,
        "rootfs": {"diff_ids": [*stack.config.diff_ids, *package.config.diff_ids], "type": "layers"},
    }


def _has_dpkg(order: Order, platform: str) -> bool:
    """Whether maintainer scripts run in the base; one without dpkg is only unpacked."""
    return any(one.name == "dpkg" for one in order.lock.debian(platform))


def _version_of_mmdebstrap(order: Order) -> str:
    if order.definition.base.kind != "debian":
        return ""
    return run(["mmdebstrap", "--version"], what="asking mmdebstrap for its version").strip()


def _place(source: Path, target: Path) -> None:
    """The same file at another place: a hard link, or a copy where that is on another disk."""
    with writing(target):
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)

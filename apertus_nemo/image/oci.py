"""What a registry stores: descriptors, manifests, indexes and image configurations (OCI image specification 1.1).

    found = parse(data, what="127.0.0.1:5000/a:1")            # Manifest or Index, by its media type
    found = choose(index, Platform.of_machine("aarch64"), what="...")
    data = Manifest(config=..., layers=(...)).to_bytes()         # canonical JSON: same content, same digest

Docker's manifests of version 2, schema 2 are the same under other media types, and are read alike. What is read comes
from anywhere: sizes, depths and types are checked, unknown media types are refused, unknown keys ignored, as the
specification asks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from apertus_nemo.errors import InputError
from apertus_nemo.image.reference import checked_digest
from apertus_nemo.record.canonical import MAX_INTEGER, dumps, loads, sha256_hex

MAX_MANIFEST_BYTES = 4 * 2**20  # what registries must accept (distribution specification 1.1), and what we read
MAX_CONFIG_BYTES = 16 * 2**20
MAX_LAYERS = 1024

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"

MANIFESTS = (MANIFEST, DOCKER_MANIFEST)
INDEXES = (INDEX, DOCKER_LIST)
CONFIGS = (CONFIG, DOCKER_CONFIG)
# media type of a layer -> its compression
COMPRESSIONS = {
    LAYER: "none",
    LAYER_GZIP: "gzip",
    LAYER_ZSTD: "zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar": "none",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": "zstd",
    "application/vnd.docker.image.rootfs.diff.tar": "none",
    DOCKER_LAYER_GZIP: "gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd": "zstd",
}

_MEDIA_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}\Z")
# What `uname -m` says -> what Go, and so an image, calls it.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "ppc64le": "ppc64le", "riscv64": "riscv64", "s390x": "s390x"}


LOCK_LABEL = "ai.apertus.image.lock"  # of a configuration: the digest of the lock that the image was built from


@dataclass(frozen=True)
class Platform:
    """Operating system and processor, in Go's names ("linux", "arm64")."""

    os: str
    architecture: str
    variant: str | None = None

    def __str__(self) -> str:
        return f"{self.os}/{self.architecture}" + (f"/{self.variant}" if self.variant else "")

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Read "linux/arm64" or "linux/arm64/v8"; raises InputError."""
        parts = text.split("/")
        if len(parts) not in (2, 3) or not all(re.fullmatch(r"[a-z0-9_.]+", part) for part in parts):
            raise InputError(f"{text!r} is not a platform: write for example linux/arm64")
        return cls(*parts)

    @classmethod
    def of_machine(cls, machine: str) -> Platform:
        """That of a Linux machine which calls its processor `machine` ("aarch64")."""
        return cls("linux", _ARCHITECTURES.get(machine, machine))

    def runs(self, other: Platform) -> bool:
        """Whether a machine of this platform runs an image for `other`; arm64 is arm64/v8."""

        def key(platform: Platform) -> tuple[str, str, str | None]:
            variant = None if (platform.architecture, platform.variant) == ("arm64", "v8") else platform.variant
            return platform.os, platform.architecture, variant

        return key(self) == key(other)


@dataclass(frozen=True)
class Descriptor:
    """A blob by its content: media type, digest, size."""

    media_type: str
    digest: str  # "sha256:<64 hex digits>"
    size_bytes: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    platform: Platform | None = None
    artifact_type: str | None = None

    @classmethod
    def of(cls, data: bytes, media_type: str) -> Descriptor:
        """That of `data`."""
        return cls(media_type, f"sha256:{sha256_hex(data)}", len(data))

    @classmethod
    def from_tree(cls, tree: object, *, what: str) -> Descriptor:
        """Read one of a manifest; raises InputError, beginning with `what`."""
        found = _mapping(tree, what)
        size = found.get("size")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_INTEGER:
            raise InputError(f"{what}: its size {size!r:.40} is not a number of bytes")
        return cls(
            media_type=_media_type(found.get("mediaType"), what),
            digest=checked_digest(found.get("digest"), what=what),
            size_bytes=size,
            annotations=_texts(found.get("annotations"), f"{what}: its annotations"),
            platform=_platform(found.get("platform"), what),
            artifact_type=_optional_type(found.get("artifactType"), what),
        )

    def tree(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        tree: dict[str, Any] = {"digest": self.digest, "mediaType": self.media_type, "size": self.size_bytes}
        if self.annotations:
            tree["annotations"] = dict(self.annotations)
        if self.artifact_type:
            tree["artifactType"] = self.artifact_type
        if self.platform:
            variant = {"variant": self.platform.variant} if self.platform.variant else {}
            tree["platform"] = {"architecture": self.platform.architecture, "os": self.platform.os, **variant}
        return tree


@dataclass(frozen=True)
class Manifest:
    """One image for one platform, or an artifact (an SBOM, a lock) that may have a subject."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    media_type: str = MANIFEST
    annotations: Mapping[str, str] = field(default_factory=dict)
    subject: Descriptor | None = None
    artifact_type: str | None = None

    def to_bytes(self) -> bytes:
        """Canonical JSON, of which the SHA-256 is the manifest digest."""
        own = {"config": self.config.tree(), "layers": [layer.tree() for layer in self.layers]}
        return _to_bytes(self, own | ({"artifactType": self.artifact_type} if self.artifact_type else {}))

    def compressions(self, *, what: str) -> tuple[str, ...]:
        """How each layer is compressed ("none", "gzip", "zstd"); raises InputError for an unknown media type.

        Raises too where this is no image: its configuration is of another kind.
        """
        if self.config.media_type not in CONFIGS:
            raise InputError(f"{what} is not an image but an artifact: its configuration is {self.config.media_type}")
        for number, layer in enumerate(self.layers, 1):
            if layer.media_type not in COMPRESSIONS:
                raise InputError(f"{what}: layer {number} has the unknown media type {layer.media_type}")
        return tuple(COMPRESSIONS[layer.media_type] for layer in self.layers)


@dataclass(frozen=True)
class Index:
    """A list of manifests: one image for several platforms, or the referrers of one."""

    manifests: tuple[Descriptor, ...]
    media_type: str = INDEX
    annotations: Mapping[str, str] = field(default_factory=dict)
    subject: Descriptor | None = None

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return _to_bytes(self, {"manifests": [manifest.tree() for manifest in self.manifests]})


def _to_bytes(document: Manifest | Index, own: Mapping[str, Any]) -> bytes:
    """What manifests and indexes have in common, with what is `own` to one of them."""
    tree = {**own, "mediaType": document.media_type, "schemaVersion": 2}
    if document.annotations:
        tree["annotations"] = dict(document.annotations)
    if document.subject:
        tree["subject"] = document.subject.tree()
    return dumps(tree)


@dataclass(frozen=True)
class ImageConfig:
    """What a container engine reads of an image's configuration."""

    platform: Platform
    diff_ids: tuple[str, ...]  # digests of the uncompressed layers, the lowest first
    environment: tuple[str, ...] = ()  # "NAME=value"
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    volumes: tuple[str, ...] = ()

    @classmethod
    def from_bytes(cls, data: bytes, *, what: str) -> ImageConfig:
        """Read one; raises InputError, beginning with `what`."""
        tree = _mapping(loads(data, what=what, max_bytes=MAX_CONFIG_BYTES), what)
        rootfs = _mapping(tree.get("rootfs"), f"{what}: rootfs")
        run = _mapping(tree.get("config") or {}, f"{what}: config")
        platform = _platform(tree, what)
        if platform is None:
            raise InputError(f"{what}: it names no platform (os, architecture)")

        def texts(key: str) -> tuple[str, ...]:
            value = run.get(key) or []
            if not isinstance(value, list) or not all(isinstance(item, str) and "\0" not in item for item in value):
                raise InputError(f"{what}: config.{key} is not a list of strings")
            return tuple(value)

        def text(key: str) -> str:
            value = run.get(key) or ""
            if not isinstance(value, str) or "\0" in value:
                raise InputError(f"{what}: config.{key} is not a string")
            return value

        ids = rootfs.get("diff_ids")
        if not isinstance(ids, list):
            raise InputError(f"{what}: rootfs.diff_ids is not a list")
        return cls(
            platform=platform,
            diff_ids=tuple(checked_digest(one, what=f"{what}: rootfs.diff_ids") for one in ids),
            environment=texts("Env"),
            entrypoint=texts("Entrypoint"),
            command=texts("Cmd"),
            working_dir=text("WorkingDir"),
            user=text("User"),
            labels=_texts(run.get("Labels"), f"{what}: config.Labels"),
            volumes=tuple(sorted(_mapping(run.get("Volumes") or {}, f"{what}: config.Volumes"))),
        )


def parse(data: bytes, *, what: str, media_type: str | None = None) -> Manifest | Index:
    """Read a manifest or an index.

    `media_type` is what its descriptor or the registry says; the document's own must not contradict it. Raises
    InputError, beginning with `what`, for anything that is neither, for unknown media types and for bad values.
    """
    tree = _mapping(loads(data, what=what, max_bytes=MAX_MANIFEST_BYTES), what)
    own = tree.get("mediaType")
    kind = own if own is not None else media_type
    if kind is None:  # the OCI specification lets a document leave it out
        kind = INDEX if "manifests" in tree else MANIFEST
    kind = _media_type(kind, what)
    if media_type is not None and kind != media_type:
        raise InputError(f"{what}: it says that it is {kind}, and was announced as {media_type}")
    if kind not in MANIFESTS + INDEXES:
        raise InputError(f"{what}: the media type {kind} is neither an image manifest nor an index")
    if tree.get("schemaVersion") != 2:
        raise InputError(f"{what}: its schemaVersion is {tree.get('schemaVersion')!r:.40}: only 2 can be read")
    # A document that is both could be taken for either one: CVE-2021-41190.
    if ("manifests" in tree) == ("layers" in tree or "config" in tree):
        raise InputError(f"{what}: it holds both layers and manifests, or neither")
    if ("manifests" in tree) != (kind in INDEXES):
        raise InputError(f"{what}: its content is not what its media type {kind} says")
    annotations = _texts(tree.get("annotations"), f"{what}: its annotations")
    subject = (
        None if tree.get("subject") is None else Descriptor.from_tree(tree["subject"], what=f"{what}: its subject")
    )
    if kind in INDEXES:
        listed = _list(tree.get("manifests"), f"{what}: its manifests")
        manifests = tuple(Descriptor.from_tree(one, what=f"{what}: manifest {n}") for n, one in enumerate(listed, 1))
        return Index(manifests, kind, annotations, subject)
    listed = _list(tree.get("layers"), f"{what}: its layers")
    return Manifest(
        config=Descriptor.from_tree(tree.get("config"), what=f"{what}: its configuration"),
        layers=tuple(Descriptor.from_tree(one, what=f"{what}: layer {n}") for n, one in enumerate(listed, 1)),
        media_type=kind,
        annotations=annotations,
        subject=subject,
        artifact_type=_optional_type(tree.get("artifactType"), what),
    )


def choose(index: Index, platform: Platform, *, what: str) -> Descriptor:
    """The manifest of an index for `platform`; the first, as the specification says, where there are several.

    Raises InputError with a list of what there is.
    """
    images = [one for one in index.manifests if one.platform and one.platform.os != "unknown"]
    for one in images:
        if one.platform and platform.runs(one.platform):
            return one
    there = ", ".join(sorted({str(one.platform) for one in images})[:20]) or "no image for any platform"
    raise InputError(f"{what} has no image for {platform}; it has {there}")


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{what} is not a JSON object")
    return value


def _list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{what} are not a list")
    if len(value) > MAX_LAYERS:
        raise InputError(f"{what} are {len(value)}, more than the {MAX_LAYERS} that are read")
    return value


def _texts(value: object, what: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise InputError(f"{what} are not a table of strings")
    return dict(value)


def _media_type(value: object, what: str) -> str:
    if not isinstance(value, str) or not _MEDIA_TYPE.match(value):
        raise InputError(f"{what}: {value!r:.80} is not a media type")
    return value


def _optional_type(value: object, what: str) -> str | None:
    return None if value is None or value == "" else _media_type(value, what)


def _platform(value: object, what: str) -> Platform | None:
    if value is None:
        return None
    tree = _mapping(value, f"{what}: its platform")
    parts = [tree.get("os"), tree.get("architecture"), tree.get("variant") or None]
    if not all(isinstance(part, str) for part in parts[:2]) or not isinstance(parts[2], str | None):
        return None  # an index may hold entries that are no images; they are never chosen
    if not all(part is None or re.fullmatch(r"[A-Za-z0-9_.-]{0,64}", part) for part in parts):
        raise InputError(f"{what}: its platform {parts!r:.80} is not one")
    return Platform(str(parts[0]), str(parts[1]), parts[2])

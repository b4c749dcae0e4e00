"""OCI image layouts: a folder with `oci-layout`, `index.json` and blobs (image specification 1.1, image-layout.md).

    layout = Layout.create(folder)
    config = layout.blobs.write(data, CONFIG)
    layout.tag(layout.blobs.write(manifest.to_bytes(), MANIFEST), "1.0.0")

    found = Layout.open(folder).image(platform)      # by the folder's only manifest, or by name
    found.manifest, found.config

skopeo (`oci:FOLDER:TAG`), umoci, podman and buildah read and write them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from apertus_nemo.errors import InputError
from apertus_nemo.image.blobs import BlobStore
from apertus_nemo.image.oci import (
    INDEXES,
    MANIFESTS,
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
    Platform,
    choose,
    parse,
)
from apertus_nemo.record.canonical import loads
from apertus_nemo.record.files import read_bytes, write_atomic, writing

REF_NAME = "org.opencontainers.image.ref.name"
_MARK = b'{"imageLayoutVersion":"1.0.0"}'
_MAX_INDEXES = 4  # an index within an index within ...

Fetch = Callable[[Descriptor, int], bytes]  # the checked bytes of a descriptor, at most so many


@dataclass(frozen=True)
class Image:
    """One image for one platform."""

    descriptor: Descriptor  # of the manifest; its digest is the manifest digest
    manifest: Manifest
    config: ImageConfig
    compressions: tuple[str, ...]  # of each layer
    index: Descriptor | None = None  # of the index that it was chosen from

    @property
    def size_bytes(self) -> int:
        """Of the layers as they are stored."""
        return sum(layer.size_bytes for layer in self.manifest.layers)


def image_of(descriptor: Descriptor, fetch: Fetch, *, platform: Platform, what: str) -> Image:
    """Follow a descriptor to an image for `platform`, every document checked against what names it.

    Raises InputError where there is none, where something has an unknown media type, and where a document is malformed.
    """
    index = None
    for _ in range(_MAX_INDEXES):
        if descriptor.media_type not in MANIFESTS + INDEXES:
            raise InputError(
                f"{what}: the media type {descriptor.media_type} is neither an image manifest nor an index"
            )
        found = parse(fetch(descriptor, MAX_MANIFEST_BYTES), what=what, media_type=descriptor.media_type)
        if isinstance(found, Index):
            index = index or descriptor
            descriptor = choose(found, platform, what=what)
            continue
        compressions = found.compressions(what=what)
        config = ImageConfig.from_bytes(
            fetch(found.config, MAX_CONFIG_BYTES), what=f"{what}: its configuration {found.config.digest}"
        )
        if len(config.diff_ids) != len(found.layers):
            raise InputError(
                f"{what}: its manifest has {len(found.layers)} layers, its configuration {len(config.diff_ids)}"
            )
        if not platform.runs(config.platform):
            raise InputError(f"{what} is an image for {config.platform}, not for {platform}")
        return Image(replace(descriptor, platform=None), found, config, compressions, index)
    raise InputError(f"{what}: indexes within indexes, more than {_MAX_INDEXES} deep")


class Layout:
    """An OCI image layout on disk."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.blobs = BlobStore(self.root)

    @classmethod
    def create(cls, root: Path) -> Layout:
        """A new one without images, in a folder that is missing or empty."""
        root = Path(root)
        if root.is_dir() and any(root.iterdir()):
            raise InputError(f"{root} is not empty: choose another folder")
        with writing(root):
            (root / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
        layout = cls(root)
        layout.write_index(Index(()))
        write_atomic(root / "oci-layout", _MARK)
        return layout

    @classmethod
    def open(cls, root: Path) -> Layout:
        """One that is there; raises InputError otherwise."""
        root = Path(root)
        if not (root / "oci-layout").is_file():
            raise InputError(f"{root} is not an OCI image layout: it holds no file oci-layout")
        mark = loads(read_bytes(root / "oci-layout", max_bytes=4096), what=str(root / "oci-layout"))
        if not isinstance(mark, dict) or mark.get("imageLayoutVersion") != "1.0.0":
            raise InputError(f"{root / 'oci-layout'}: only layouts of version 1.0.0 can be read")
        return cls(root)

    def index(self) -> Index:
        """What `index.json` lists."""
        path = self.root / "index.json"
        found = parse(read_bytes(path, max_bytes=MAX_MANIFEST_BYTES), what=str(path))
        if not isinstance(found, Index):
            raise InputError(f"{path} is not an index")
        return found

    def write_index(self, index: Index) -> None:
        """Replace `index.json`."""
        write_atomic(self.root / "index.json", index.to_bytes())

    def tag(self, descriptor: Descriptor, name: str | None) -> None:
        """List a manifest or index under `name`, which it takes from any other; None lists it without one."""
        annotations = {key: text for key, text in descriptor.annotations.items() if key != REF_NAME}
        if name is not None:
            annotations[REF_NAME] = name
        listed = replace(descriptor, annotations=annotations)
        index = self.index()
        others = (one for one in index.manifests if name is None or one.annotations.get(REF_NAME) != name)
        manifests = (*(one for one in others if one != listed), listed)
        self.write_index(replace(index, manifests=manifests))

    def find(self, name: str | None = None) -> Descriptor:
        """The manifest or index that is listed under a tag or digest; without one, the only one.

        Raises InputError with what there is.
        """
        listed = self.index().manifests
        for one in listed:
            if name is not None and name in (one.annotations.get(REF_NAME), one.digest):
                return one
        if name is None and len(listed) == 1:
            return listed[0]
        names = ", ".join(one.annotations.get(REF_NAME) or one.digest for one in listed[:20]) or "nothing"
        if name is None:
            raise InputError(f"{self.root}: say which image; it lists {names}")
        raise InputError(f"{self.root} lists no image {name}; it lists {names}")

    def image(self, platform: Platform, name: str | None = None) -> Image:
        """The image for `platform` that is listed under `name`; raises InputError or Differs."""
        what = f"{self.root}:{name}" if name else str(self.root)
        return image_of(self.find(name), self.fetch, platform=platform, what=what)

    def fetch(self, descriptor: Descriptor, max_bytes: int) -> bytes:
        """The checked bytes of a blob."""
        return self.blobs.read(descriptor, max_bytes=max_bytes)

"""Small images, made by our own writer: layers from lists of tar entries, in an OCI image layout."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apertus_nemo.image.layout import Layout
from apertus_nemo.image.oci import CONFIG, LAYER, LAYER_GZIP, LAYER_ZSTD, MANIFEST, Descriptor, Manifest, Platform
from apertus_nemo.record.canonical import dumps

PLATFORM = Platform("linux", "amd64")
MEDIA_TYPES = {"none": LAYER, "gzip": LAYER_GZIP, "zstd": LAYER_ZSTD}


def entry(name: str, data: bytes | None = None, **fields: Any) -> tuple[tarfile.TarInfo, bytes | None]:
    """A tar entry; `type`, `linkname`, `mode`, `uid`, `pax_headers` ... are those of TarInfo. No data: a directory."""
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE if data is None and "type" not in fields else tarfile.REGTYPE
    info.mode = 0o755 if info.type == tarfile.DIRTYPE else 0o644
    info.mtime = 1_700_000_000
    info.size = len(data or b"")
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def link(name: str, target: str, *, hard: bool = False, **fields: Any) -> tuple[tarfile.TarInfo, bytes | None]:
    """A symbolic or hard link."""
    return entry(name, type=tarfile.LNKTYPE if hard else tarfile.SYMTYPE, linkname=target, mode=0o777, **fields)


def tar(entries: Sequence[tuple[tarfile.TarInfo, bytes | None]], *, format: int = tarfile.PAX_FORMAT) -> bytes:
    """An uncompressed layer."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for info, data in entries:
            archive.addfile(info, io.BytesIO(data) if data else None)
    return buffer.getvalue()


def compressed(data: bytes, kind: str) -> bytes:
    """A layer as it is stored."""
    if kind == "gzip":
        return gzip.compress(data, 1, mtime=0)
    if kind == "zstd":
        import zstandard

        return zstandard.ZstdCompressor(level=1).compress(data)
    return data


def add_image(
    layout: Layout,
    layers: Sequence[bytes],
    *,
    tag: str | None = "1",
    kind: str = "gzip",
    platform: Platform = PLATFORM,
    config: Mapping[str, Any] | None = None,
    diff_ids: Sequence[str] | None = None,
) -> Descriptor:
    """An image of uncompressed `layers`; the descriptor of its manifest."""
    stored = [layout.blobs.write(compressed(layer, kind), MEDIA_TYPES[kind]) for layer in layers]
    ids = [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]
    tree = {
        "architecture": platform.architecture,
        "os": platform.os,
        "rootfs": {"type": "layers", "diff_ids": list(diff_ids or ids)},
        "config": dict(config or {}),
        "history": [{"created_by": f"layer {number}"} for number in range(len(layers))],
    }
    manifest = Manifest(layout.blobs.write(dumps(tree), CONFIG), tuple(stored))
    descriptor = layout.blobs.write(manifest.to_bytes(), MANIFEST)
    layout.tag(descriptor, tag)
    return descriptor


def layout_with(folder: Path, *layers: bytes, **options: Any) -> Layout:
    """A layout that holds one image."""
    layout = Layout.create(folder)
    add_image(layout, layers, **options)
    return layout

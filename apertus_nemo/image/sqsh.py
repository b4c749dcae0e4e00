"""`.sqsh` files on disk: their names, the file beside each that ties it to its image, and the check of every byte.

    sidecar = describe(path, image, made, reference=...)
    write_sidecar(path, sidecar)
    check(path)                        # Checked, or Differs with the place of the first difference

A name holds the beginning of the manifest digest, so that two images never share one, and an image keeps its. The
sidecar (`NAME.sqsh.json`, canonical JSON, no times) holds the SHA-256 of the whole file and of every 4 MiB of it, by
which a changed byte is found to the chunk.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apertus_nemo.errors import Differs, InputError
from apertus_nemo.image.layout import Image
from apertus_nemo.image.reference import is_image_digest
from apertus_nemo.image.squashfs import Made
from apertus_nemo.image.superblock import read_superblock
from apertus_nemo.record.canonical import dumps, is_digest, loads_canonical
from apertus_nemo.record.files import read_bytes, reading, write_atomic

KIND = "apertus-nemo squashfs"
FORMAT = 1
CHUNK_BYTES = 4 * 2**20
DIGITS = 12  # of the manifest digest in a name
_MAX_SIDECAR_BYTES = 16 * 2**20
_BLOCK_BYTES = 2**20
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Hashes:
    """SHA-256 of a file and of its chunks."""

    sha256: str
    size_bytes: int
    chunks: tuple[str, ...]


@dataclass(frozen=True)
class Checked:
    """A file that is as it was made."""

    path: Path
    size_bytes: int
    sha256: str
    manifest_digest: str | None  # None: there is no sidecar
    platform: str | None


def file_name(name: str, image: Image, contents: str) -> str:
    """Name of the squashfs file of an image that people call `name` ("cpu-1.0.0"), of letters, digits, and . _ -"""
    digits = image.descriptor.digest.removeprefix("sha256:")[:DIGITS]
    kind = "" if contents == "enroot" else f"-{contents}"
    return f"{_UNSAFE.sub('-', name).strip('.-') or 'image'}{kind}-{digits}.sqsh"


def sidecar_path(path: Path) -> Path:
    """Where the sidecar of a squashfs file is."""
    return path.with_name(f"{path.name}.json")


def hashes(path: Path) -> Hashes:
    """Read a file from its beginning to its end."""
    whole, chunks, size = hashlib.sha256(), list[str](), 0
    with reading(path), open(path, "rb", buffering=0) as file:
        chunk, left = hashlib.sha256(), CHUNK_BYTES
        while block := file.read(min(_BLOCK_BYTES, left)):
            whole.update(block)
            chunk.update(block)
            size += len(block)
            left -= len(block)
            if not left:
                chunks.append(chunk.hexdigest())
                chunk, left = hashlib.sha256(), CHUNK_BYTES
        if left < CHUNK_BYTES:
            chunks.append(chunk.hexdigest())
    return Hashes(whole.hexdigest(), size, tuple(chunks))


def describe(found: Hashes, image: Image, made: Made, *, contents: str, reference: str) -> dict[str, Any]:
    """The sidecar: what the file is, of which image, made with what."""
    return {
        "format": FORMAT,
        "image": {
            "config_digest": image.manifest.config.digest,
            "manifest_digest": image.descriptor.digest,
            "platform": str(image.config.platform),
            "reference": reference,
        },
        "kind": KIND,
        "made": {
            "contents": contents,
            "mksquashfs": made.tool.version,
            "options": list(made.options),
        },
        "squashfs": {
            "chunk_bytes": CHUNK_BYTES,
            "chunks": list(found.chunks),
            "sha256": found.sha256,
            "size_bytes": found.size_bytes,
        },
    }


def write_sidecar(path: Path, tree: Mapping[str, Any]) -> None:
    """Write the sidecar of the squashfs file `path`."""
    write_atomic(sidecar_path(path), dumps(dict(tree)) + b"\n")


def read_sidecar(path: Path) -> dict[str, Any]:
    """The sidecar of the squashfs file `path`; raises InputError where it is missing or not one."""
    where = sidecar_path(path)
    if not where.is_file():
        raise InputError(f"{path} has no sidecar: there is no {where.name} beside it; --sha256 says what it should be")
    data = read_bytes(where, max_bytes=_MAX_SIDECAR_BYTES)
    tree = loads_canonical(data.removesuffix(b"\n"), what=str(where))
    if not isinstance(tree, dict) or tree.get("kind") != KIND or tree.get("format") != FORMAT:
        raise InputError(f"{where} is not a sidecar of format {FORMAT}")
    parts: list[Any] = [tree.get(key) for key in ("image", "squashfs", "made")]
    image, squashfs, _ = parts
    fine = (
        all(isinstance(part, dict) for part in parts)
        and is_image_digest(image.get("manifest_digest"))
        and isinstance(image.get("platform"), str)
        and is_digest(squashfs.get("sha256"))
        and isinstance(squashfs.get("size_bytes"), int)
        and squashfs.get("chunk_bytes") == CHUNK_BYTES
        and isinstance(squashfs.get("chunks"), list)
        and all(is_digest(chunk) for chunk in squashfs["chunks"])
    )
    if not fine:
        raise InputError(f"{where} is not a sidecar of format {FORMAT}: something in it is missing or of another kind")
    return tree


def check(path: Path, *, sha256: str | None = None) -> Checked:
    """Read every byte of a squashfs file and hold it against its sidecar, and against `sha256` where it is given.

    Raises Differs with what differs and where, InputError where there is nothing to hold it against.
    """
    path = Path(path)
    if sha256 is not None:
        sha256 = sha256.removeprefix("sha256:")
        if not is_digest(sha256):
            raise InputError(f"--sha256 {sha256[:80]!r} is not 64 lower-case hex digits")
    sidecar = None if sha256 is not None and not sidecar_path(path).is_file() else read_sidecar(path)
    found = hashes(path)
    if sidecar is not None:
        _compare(path, found, sidecar["squashfs"])
    if sha256 is not None and found.sha256 != sha256:
        raise Differs(f"{path} is not the file that was asked for: its SHA-256 is {found.sha256}, not {sha256}")
    read_superblock(path)
    image = sidecar["image"] if sidecar else {}
    return Checked(path, found.size_bytes, found.sha256, image.get("manifest_digest"), image.get("platform"))


def _compare(path: Path, found: Hashes, expected: Mapping[str, Any]) -> None:
    if found.sha256 == expected["sha256"]:
        return
    size, chunks = expected["size_bytes"], expected["chunks"]
    places = [n for n, (one, other) in enumerate(zip(found.chunks, chunks, strict=False)) if one != other]
    if found.size_bytes != size:
        how = "cut off" if found.size_bytes < size else "longer than it was"
        raise Differs(f"{path} is {how}: it has {found.size_bytes:,} bytes and was made with {size:,}; pull it again")
    if not places:
        raise Differs(
            f"{path}: its bytes are those of the chunks in its sidecar, and the SHA-256 there is of another file"
        )
    first = places[0] * CHUNK_BYTES
    last = min(first + CHUNK_BYTES, size) - 1
    more = f", and {len(places) - 1} other chunks" if len(places) > 1 else ""
    raise Differs(f"{path} was changed: bytes {first:,} to {last:,} are not what was made{more}; pull it again")

"""An image from a registry to a `.sqsh` file: resolved once, every blob checked, converted, described.

    pulled = pull("cpu-1.0.0", folder=Path("images"), cache=cache, platform=..., environment=os.environ)
    pulled.path, pulled.manifest_digest, pulled.sha256

A tag is resolved once, and everything after goes by digest. A digest whose documents and layers are in the cache is
pulled without a network. What refers to the image (SBOM, lock, signatures) is fetched beside the file.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apertus_nemo.errors import ApertusError, Differs, InputError, UnfitEnvironment
from apertus_nemo.image.blobs import BlobStore
from apertus_nemo.image.families import FAMILY, Release, family_names, find, parse_name
from apertus_nemo.image.layers import CorruptBlob
from apertus_nemo.image.layout import Image, image_of
from apertus_nemo.image.lustre import stripe
from apertus_nemo.image.oci import LOCK_LABEL, MANIFESTS, MAX_MANIFEST_BYTES, Descriptor, Platform, parse
from apertus_nemo.image.publish import LOCK
from apertus_nemo.image.reference import Reference
from apertus_nemo.image.registry import MAX_ARTIFACT_BYTES, TITLE, Repository
from apertus_nemo.image.registry_http import LIMITS, Limits
from apertus_nemo.image.signature import MAX_ENVELOPE_BYTES, STATEMENT, public_key, verify
from apertus_nemo.image.sqsh import check, describe, file_name, hashes, read_sidecar, sidecar_path, write_sidecar
from apertus_nemo.image.squashfs import find_tool, make_squashfs
from apertus_nemo.image.transfer import Progress, no_progress
from apertus_nemo.record.files import read_bytes, sync_folder, write_atomic, writing

_ABANDONED_S = 3600.0  # without a write: of a pull that was killed
_UNPUBLISHED = "was never published: build it (apertus-nemo image build {family}), or name a reference, HOST/NAME:TAG"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")


@dataclass(frozen=True)
class Source:
    """What was asked for."""

    name: str  # for the file
    reference: Reference
    release: Release | None = None  # of a published version: what must come


@dataclass
class Pulled:
    """What is on disk now."""

    path: Path
    reference: str
    manifest_digest: str
    platform: str
    sha256: str
    size_bytes: int
    signed_by: str | None  # the file of the key that was asked for
    lock_digest: str | None  # that the image's label names; None: it has none
    made: bool  # False: it was there, and is as it was made
    referrers: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def default_cache(environment: Mapping[str, str]) -> Path:
    """`apertus-nemo/images` below XDG_CACHE_HOME, or below ~/.cache."""
    base = environment.get("XDG_CACHE_HOME")
    home = environment.get("HOME")
    if not base and not home:
        raise UnfitEnvironment("neither XDG_CACHE_HOME nor HOME is set: say with --cache where blobs are kept")
    return Path(base or f"{home}/.cache", "apertus-nemo", "images")


def source_of(text: str, platform: Platform, *, mirror: str | None = None) -> Source:
    """What a person means by "cpu-1.0.0" or by a reference; `mirror` (HOST/NAME) is asked instead of its registry.

    Raises InputError for anything else, and for a version that was not published for the platform.
    """
    if "/" not in text and "@" not in text and ":" not in text:
        name = text if FAMILY.match(text) else parse_name(text)[0]
        if name not in family_names():
            raise InputError(
                f"there is no family of images {name!r}; there are {', '.join(family_names())}. An image of a registry "
                f"is named with its registry and tag, as in docker.io/library/{name}:TAG"
            )
        family = find(text)
        release = family.releases.get(str(platform))
        if release is None:
            there = ", ".join(sorted(family.releases))
            state = f"is published for {there} only" if there else _UNPUBLISHED.format(family=family.family)
            raise InputError(f"{family.name} for {platform} {state}")
        reference = Reference.parse(release.reference).pinned(release.manifest_digest)
        return Source(family.name, _mirrored(reference, mirror), release)
    reference = Reference.parse(text)
    last = reference.repository.rpartition("/")[2]
    return Source(f"{last}-{reference.tag}" if reference.tag else last, _mirrored(reference, mirror))


def _mirrored(reference: Reference, mirror: str | None) -> Reference:
    if mirror is None:
        return reference
    other = Reference.parse(mirror)
    if other.digest is not None or other.tag != "latest" or mirror.endswith(":latest"):
        raise InputError(f"--from {mirror}: write the host and the name alone, as in registry.example/apertus/cpu")
    return Reference(other.registry, other.repository, reference.tag, reference.digest)


def pull(
    text: str,
    *,
    folder: Path,
    cache: Path,
    platform: Platform,
    environment: Mapping[str, str],
    mirror: str | None = None,
    insecure: bool = False,
    contents: str = "enroot",
    with_referrers: bool = True,
    key: Path | None = None,
    limits: Limits = LIMITS,
    progress: Progress = no_progress,
    say: Callable[[str], None] = lambda _: None,
) -> Pulled:
    """Have the `.sqsh` file of an image in `folder`.

    `key` is a public key: an image that it has not signed is not fetched. Raises InputError, UnfitEnvironment or
    Differs; of what failed, no file is left but blobs that can be gone on from.
    """
    tool = find_tool(environment)  # before the first byte
    source = source_of(text, platform, mirror=mirror)
    store = BlobStore(cache)
    with Repository(source.reference, environment=environment, insecure=insecure, limits=limits) as repository:
        image = _image(source, platform, store, repository)
        if source.release is not None and source.release.config_digest != image.manifest.config.digest:
            raise Differs(
                f"{source.reference} has the configuration {image.manifest.config.digest}, "
                f"{source.name} was published with {source.release.config_digest}"
            )
        what = f"{repository.reference}@{image.descriptor.digest}"
        say(f"{what} for {platform}")
        if key is not None:
            _signed(image, key, repository, what)
        path = Path(folder) / file_name(source.name, image, contents)
        found = _there(path, image, contents)
        if found is None:
            _download(image, store, repository, progress)
            say("making the squashfs file")
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            _tidy(path)
            partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(6)}.partial")
            try:
                stripe(partial, environment, _mounts())
                try:
                    made = make_squashfs(store, image, partial, tool=tool, contents=contents, what=what)
                except CorruptBlob as error:  # of the cache: once more from the registry
                    say(f"{error.digest} in the cache is damaged; it is fetched again")
                    store.remove(error.digest)
                    _download(image, store, repository, progress)
                    made = make_squashfs(store, image, partial, tool=tool, contents=contents, what=what)
                reading_back = hashes(partial)
                tree = describe(reading_back, image, made, contents=contents, reference=str(source.reference))
                write_sidecar(path, tree)
                with writing(path):
                    os.rename(partial, path)
                    sync_folder(path.parent)
            finally:
                partial.unlink(missing_ok=True)
            found = (reading_back.sha256, reading_back.size_bytes)
            notes = _notes(made.devices, made.refused_xattrs)
        else:
            made, notes = None, []
        pulled = Pulled(
            path=path,
            reference=str(repository.reference),
            manifest_digest=image.descriptor.digest,
            platform=str(image.config.platform),
            sha256=found[0],
            size_bytes=found[1],
            signed_by=None if key is None else str(key),
            lock_digest=image.config.labels.get(LOCK_LABEL),
            made=made is not None,
            notes=notes,
        )
        if with_referrers:
            _referrers(pulled, image, source, repository)
    return pulled


def _tidy(path: Path) -> None:
    """Remove what killed pulls left of this file."""
    for one in path.parent.glob(f".{path.name}.*.partial"):
        try:
            if time.time() - one.stat().st_mtime > _ABANDONED_S:
                one.unlink()
        except OSError:  # another pull was first, or it is not ours to remove
            pass


def _mounts() -> str:
    try:
        return Path("/proc/self/mounts").read_text(errors="replace")
    except OSError:
        return ""


def _notes(devices: int, refused_xattrs: int) -> list[str]:
    notes = []
    if devices:
        notes.append(f"the image has {devices} device nodes; they are kept, and engines mount without devices")
    if refused_xattrs:
        notes.append(f"{refused_xattrs} extended attributes (ACLs) were left out: squashfs cannot hold them")
    return notes


def _image(source: Source, platform: Platform, store: BlobStore, repository: Repository) -> Image:
    """The image, its documents from the cache where they are there and whole."""

    def fetch(descriptor: Descriptor, max_bytes: int) -> bytes:
        if store.has(descriptor):
            try:
                return store.read(descriptor, max_bytes=max_bytes)
            except Differs:
                store.remove(descriptor.digest)
        data = repository.document(descriptor, max_bytes)
        try:
            store.write(data, descriptor.media_type)
        except UnfitEnvironment:  # a cache that is only read
            pass
        return data

    pinned = source.reference.digest
    descriptor = _cached(pinned, store) if pinned else None
    if descriptor is None:
        descriptor = repository.resolve(source.reference.name)
    return image_of(descriptor, fetch, platform=platform, what=f"{repository.reference}@{descriptor.digest}")


def _cached(digest: str, store: BlobStore) -> Descriptor | None:
    """The descriptor of a manifest or an index that the cache has."""
    path = store.path(digest)
    try:
        data = read_bytes(path, max_bytes=MAX_MANIFEST_BYTES)
        found = Descriptor.of(data, parse(data, what=str(path)).media_type)
    except InputError:
        return None
    return found if found.digest == digest else None


def _download(image: Image, store: BlobStore, repository: Repository, progress: Progress) -> None:
    for layer in image.manifest.layers:
        if store.has(layer):
            progress(layer.digest, layer.size_bytes)
    repository.download(image.manifest.layers, store, progress=progress)


def _there(path: Path, image: Image, contents: str) -> tuple[str, int] | None:
    """(SHA-256, size) of a file that an earlier pull made; raises Differs where something else has its name."""
    if not os.path.lexists(path):
        return None
    if not sidecar_path(path).is_file():
        raise InputError(f"{path} is there and has no sidecar: remove it, or choose another folder")
    tree = read_sidecar(path)
    if tree["image"]["manifest_digest"] != image.descriptor.digest or tree["made"].get("contents") != contents:
        raise Differs(f"{path} is there, and its sidecar says that it is of another image: remove both")
    checked = check(path)
    return checked.sha256, checked.size_bytes


def _signed(image: Image, key: Path, repository: Repository, what: str) -> None:
    """Raise Differs unless one of the image's signatures is by `key`."""
    public_key(key)  # what is wrong with the file is no fault of the image
    reasons = []
    subject = image.descriptor.digest
    for one in repository.referrers(subject, STATEMENT):
        for layer in repository.artifact(one, subject).layers:
            envelope = repository.document(layer, MAX_ENVELOPE_BYTES)
            try:
                verify(envelope, key, digest=subject, what=f"signature {one.digest}")
                return
            except ApertusError as error:  # by others, or of a form that we do not know
                reasons.append(str(error))
    raise Differs(f"{what} is not signed by {key}: {reasons[0] if reasons else 'it has no signature'}")


def _referrers(pulled: Pulled, image: Image, source: Source, repository: Repository) -> None:
    """Fetch what refers to the image, beside its file; a listing says what came."""
    folder = pulled.path.with_name(f"{pulled.path.name}.referrers")
    listed: list[dict[str, Any]] = []
    built_from = image.config.labels.get(LOCK_LABEL)
    digests = [image.descriptor.digest, *([image.index.digest] if image.index else [])]
    try:
        found = [(digest, one) for digest in digests for one in repository.referrers(digest)]
    except UnfitEnvironment as error:
        if pulled.made:
            raise
        pulled.notes.append(f"its referrers were not looked at: {error}")
        return
    for subject, one in sorted(found, key=lambda pair: (pair[0], pair[1].digest)):
        if one.media_type not in MANIFESTS:
            continue
        manifest = repository.artifact(one, subject)
        kind = manifest.artifact_type or manifest.config.media_type
        files = []
        for layer in manifest.layers:
            data = repository.document(layer, MAX_ARTIFACT_BYTES)
            if kind == LOCK and layer.digest != built_from:
                raise Differs(
                    f"{one.digest} refers to the image as its lock, {layer.digest}; it was built from {built_from}"
                )
            title = layer.annotations.get(TITLE, "")
            digits = layer.digest.removeprefix("sha256:")[:12]
            name = f"{digits}-{title}" if _FILE_NAME.match(title) else digits
            with writing(folder):
                folder.mkdir(exist_ok=True)
            write_atomic(folder / name, data)
            files.append({"digest": layer.digest, "media_type": layer.media_type, "name": name})
        listed.append({"artifact_type": kind, "files": files, "manifest_digest": one.digest, "subject": subject})
    if listed:
        text = json.dumps({"format": 1, "referrers": listed}, indent=2, sort_keys=True) + "\n"
        write_atomic(folder / "referrers.json", text.encode())
    pulled.referrers = listed
    if source.release is not None:
        lock = source.release.lock_digest
        if lock not in {file["digest"] for one in listed for file in one["files"]}:
            pulled.notes.append(f"the lock that it was built from ({lock}) is not among its referrers")

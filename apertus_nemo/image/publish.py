"""Publishes an image that was built: pushes it with all that refers to it, once, and records what its name means.

    releases = publish(layout, Reference.parse("registry.example/apertus/cpu"), folder=..., environment=os.environ)

Lock and SBOM are read out of the image, so they are those that it was built with. They travel as referrers of each
platform's manifest, with EDFs and a signature. A published version never changes: where the tag, or the list of
releases, means another digest, nothing is pushed. The tag comes last: who finds it finds all that belongs to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from apertus_nemo.errors import InputError
from apertus_nemo.image.families import RELEASES, Release, read_releases
from apertus_nemo.image.layers import open_layer
from apertus_nemo.image.layout import REF_NAME, Image, Layout
from apertus_nemo.image.lock import ImageLock, parse_lock
from apertus_nemo.image.oci import (
    INDEXES,
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    Descriptor,
    ImageConfig,
    Index,
    Platform,
    parse,
)
from apertus_nemo.image.oci import (
    LOCK_LABEL as LOCK_LABEL,
)
from apertus_nemo.image.reference import Reference
from apertus_nemo.image.registry import MAX_ARTIFACT_BYTES, Repository
from apertus_nemo.image.signature import ENVELOPE, STATEMENT, sign, statement
from apertus_nemo.image.transfer import Progress, no_progress
from apertus_nemo.record.files import read_bytes, write_atomic

LOCK = "application/vnd.apertus-nemo.image.lock.v1+json"
SBOM = "application/vnd.cyclonedx+json"
EDF = "application/vnd.apertus-nemo.edf.v1+toml"
REVISION_LABEL = "org.opencontainers.image.revision"
_LOCK_PATH, _SBOM_PATH = "etc/apertus-nemo/lock.json", "etc/apertus-nemo/sbom.cdx.json"
_MAX_EDF_BYTES = 2**20


@dataclass(frozen=True)
class Papers:
    """An image of one platform, and what it says of itself."""

    image: Image
    lock: ImageLock
    lock_bytes: bytes
    sbom: bytes


def built(layout: Layout, name: str | None = None) -> tuple[Descriptor, dict[str, Papers]]:
    """(what the tag will mean, platform -> image) of a layout that `image build` wrote.

    Raises InputError where it holds no image of ours, or one that nobody could build again.
    """
    listed = layout.index().manifests
    if name is None and len(listed) > 1:  # NAME is the index of NAME-ARCHITECTURE
        indexes = [one.annotations.get(REF_NAME) for one in listed if one.media_type in INDEXES]
        name = indexes[0] if len(indexes) == 1 else None
    top = layout.find(name)
    document = parse(layout.fetch(top, MAX_MANIFEST_BYTES), what=f"{layout.root}: {top.digest}")
    found = {}
    if isinstance(document, Index):
        platforms = [str(one.platform) for one in document.manifests if one.platform]
    else:
        config = layout.fetch(document.config, MAX_CONFIG_BYTES)
        platforms = [str(ImageConfig.from_bytes(config, what=f"{layout.root}: {document.config.digest}").platform)]
    for platform in platforms:
        image = layout.image(Platform.parse(platform), top.digest)
        found[platform] = _papers(layout, image, f"{layout.root} for {platform}")
    if not found:
        raise InputError(f"{layout.root}: its index names no platform: build the image first")
    if len({one.lock.digest for one in found.values()}) > 1:
        raise InputError(f"{layout.root}: its platforms were built from different locks: build all of them again")
    return top, found


def _papers(layout: Layout, image: Image, what: str) -> Papers:
    files = _read(layout, image, what)
    missing = [path for path in (_LOCK_PATH, _SBOM_PATH) if path not in files]
    if missing:
        raise InputError(f"{what} is not an image of ours: it holds no {missing[0]}")
    lock = parse_lock(files[_LOCK_PATH], what=f"{what}: {_LOCK_PATH}")
    labels = image.config.labels
    if labels.get(LOCK_LABEL) != lock.digest:
        raise InputError(f"{what}: its label {LOCK_LABEL} is not the digest of the lock inside: build it again")
    if REVISION_LABEL not in labels:
        raise InputError(f"{what} names no commit, so nobody could build it again: build it from a checkout in git")
    if lock.unresolved:
        raise InputError(f"{what}: its lock is not resolved: {lock.unresolved[0]}")
    return Papers(image, lock, files[_LOCK_PATH], files[_SBOM_PATH])


def _read(layout: Layout, image: Image, what: str) -> dict[str, bytes]:
    """Lock and SBOM, from the highest layer that has them; they lie in the last one, and lower ones are not opened."""
    layers = list(zip(image.manifest.layers, image.compressions, image.config.diff_ids, strict=True))
    for number, (descriptor, kind, diff_id) in reversed(list(enumerate(layers, 1))):
        found: dict[str, bytes] = {}
        place = f"layer {number} of {what}"
        with open_layer(layout.blobs, descriptor, kind, diff_id=diff_id, what=place) as layer:
            for entry in layer.entries():
                path = re.sub(r"^(\./|/)+", "", entry.name)
                if path in (_LOCK_PATH, _SBOM_PATH) and entry.isreg():
                    found[path] = layer.data(entry).read(MAX_ARTIFACT_BYTES)
        if found:
            return found
    return {}


def refuse_change(name: str, version: str, releases: Mapping[str, Release], folder: Path) -> None:
    """Raise InputError where a release of this version is recorded with another digest."""
    for platform, old in read_releases(folder).get(version, {}).items():
        new = releases.get(platform)
        if new is not None and new.manifest_digest != old.manifest_digest:
            raise InputError(
                f"{name} for {platform} was published as {old.manifest_digest} and means that for ever; "
                f"this one is {new.manifest_digest}: raise the version in image.toml"
            )


def publish(
    layout: Layout,
    reference: Reference,
    *,
    folder: Callable[[str], Path],
    environment: Mapping[str, str],
    name: str | None = None,
    edfs: Sequence[Path] = (),
    key: Path | None = None,
    insecure: bool = False,
    progress: Progress = no_progress,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Release]:
    """Push to `reference` (tag: its own, else the version), then write the release; by platform.

    `folder` says where the list of releases of a family lies. Doing it again pushes what is missing. Raises InputError
    where the tag or the version means something else already; then nothing was pushed.
    """
    top, images = built(layout, name)
    lock = next(iter(images.values())).lock
    version = str(lock.tree["version"])
    records = folder(str(lock.tree["family"]))
    tag = version if reference.tag in (None, "latest") else str(reference.tag)
    target = Reference(reference.registry, reference.repository, tag)
    releases = {
        platform: Release(
            config_digest=one.image.manifest.config.digest,
            lock_digest=one.lock.digest,
            manifest_digest=one.image.descriptor.digest,
            reference=str(target),
        )
        for platform, one in images.items()
    }
    refuse_change(lock.name, version, releases, records)
    attached = {platform: _attached(lock.name, platform, one, edfs, key) for platform, one in images.items()}
    with Repository(target, environment=environment, insecure=insecure) as repository:
        there = repository.find(tag)
        if there is not None and there.digest != top.digest:
            raise InputError(
                f"{target} is {there.digest} already and means that for ever; this one is {top.digest}: "
                "raise the version in image.toml, or give another tag"
            )
        for platform, one in images.items():
            say(f"pushing {platform}")
            repository.push(layout, one.image.descriptor, progress=progress)
            for data, media_type, artifact_type, title in attached[platform]:
                repository.push_artifact(
                    data,
                    media_type=media_type,
                    artifact_type=artifact_type,
                    subject=one.image.descriptor,
                    title=title,
                )
        say(f"pushing {target}")
        repository.push(layout, top, tag=tag)
    _record(version, releases, records)
    return releases


def _attached(
    name: str, platform: str, papers: Papers, edfs: Sequence[Path], key: Path | None
) -> list[tuple[bytes, str, str, str]]:
    """(bytes, media type, artifact type, title) of everything that refers to one manifest."""
    found = [(papers.lock_bytes, LOCK, LOCK, "lock.json"), (papers.sbom, SBOM, SBOM, "sbom.cdx.json")]
    found += [(read_bytes(path, max_bytes=_MAX_EDF_BYTES), EDF, EDF, path.name) for path in edfs]
    if key is not None:
        predicate = {
            "commit": papers.image.config.labels[REVISION_LABEL],
            "lock_digest": papers.lock.digest,
            "platform": platform,
        }
        payload = statement(name, papers.image.descriptor.digest, predicate)
        found.append((sign(payload, key), ENVELOPE, STATEMENT, "signature.dsse.json"))
    return found


def _record(version: str, releases: Mapping[str, Release], folder: Path) -> None:
    """Write the release into the family's list; what is there stays."""
    known = read_releases(folder)
    here = dict(known.get(version, {}))
    for platform, one in releases.items():
        here.setdefault(platform, one)  # published a second time elsewhere: the first place stays
    known[version] = here
    tree = {
        version: {platform: asdict(one) for platform, one in platforms.items()} for version, platforms in known.items()
    }
    write_atomic(folder / RELEASES, (json.dumps(tree, indent=1, sort_keys=True) + "\n").encode())

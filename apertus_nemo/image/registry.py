"""One repository of an OCI registry (distribution specification 1.1): read, pushed to, its referrers.

    with Repository(Reference.parse("127.0.0.1:5000/apertus/cpu:1.0.0"), environment=os.environ) as repository:
        descriptor = repository.resolve("1.0.0")          # a tag becomes a digest, once
        image = repository.image(descriptor, platform)    # manifest and configuration, checked
        repository.download(image.manifest.layers, store)
        repository.push(layout, layout.find("1.0.0"), tag="1.0.0")
        repository.push_artifact(sbom, media_type="application/spdx+json", subject=descriptor)
        repository.referrers(descriptor.digest)

Everything after `resolve` goes by digest, so a registry that moves a tag meanwhile changes nothing. Docker's own
media types are read too. Where a registry has no referrers API, the tag schema of the specification takes its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO
from urllib.parse import urlencode

from apertus_nemo.errors import Differs, InputError, UnfitEnvironment
from apertus_nemo.image.blobs import BlobStore
from apertus_nemo.image.layout import Image, Layout, image_of
from apertus_nemo.image.oci import (
    EMPTY,
    INDEX,
    INDEXES,
    MANIFEST,
    MANIFESTS,
    MAX_MANIFEST_BYTES,
    Descriptor,
    Index,
    Manifest,
    Platform,
    parse,
)
from apertus_nemo.image.reference import Reference, is_image_digest
from apertus_nemo.image.registry_http import LIMITS, Answer, Ask, Limits, NotFound, Session, join
from apertus_nemo.image.transfer import Progress, download, no_progress, parallel
from apertus_nemo.record.canonical import loads

TITLE = "org.opencontainers.image.title"
MAX_ARTIFACT_BYTES = 64 * 2**20  # of an SBOM, a lock, a signature
_ACCEPT = ", ".join(MANIFESTS + INDEXES)
_MAX_PAGES = 100
_EMPTY = b"{}"


class Repository:
    """A repository that can be read and, with the rights, written."""

    def __init__(
        self,
        reference: Reference,
        *,
        environment: Mapping[str, str],
        insecure: bool = False,
        limits: Limits = LIMITS,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self.reference = replace(reference, tag=None, digest=None)
        self._session = Session(reference, environment=environment, insecure=insecure, limits=limits, sleep=sleep)
        self._documents: dict[str, bytes] = {}  # manifests that have come with a tag

    def __enter__(self) -> Repository:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.__exit__()

    def _what(self, name: str) -> str:
        return f"{self.reference}{'@' if is_image_digest(name) else ':'}{name}"

    # Reading

    def resolve(self, name: str) -> Descriptor:
        """What a tag or digest stands for now. Raises InputError where there is nothing of that name."""
        what = self._what(name)

        def handle(answer: Answer) -> Descriptor:
            data = answer.read(max_bytes=MAX_MANIFEST_BYTES)
            if answer.length_bytes is not None and answer.length_bytes != len(data):
                raise Differs(f"{what}: the registry sends {len(data)} bytes and announced {answer.length_bytes}")
            kind = answer.header("Content-Type").partition(";")[0].strip()
            kind = parse(data, what=what, media_type=kind if kind in MANIFESTS + INDEXES else None).media_type
            found = Descriptor.of(data, kind)
            announced = answer.header("Docker-Content-Digest")
            expected = name if is_image_digest(name) else announced
            if is_image_digest(expected) and expected != found.digest:
                raise Differs(f"{what}: the registry sends a manifest with the digest {found.digest}, not {expected}")
            self._documents[found.digest] = data
            return found

        return self._session.call(
            Ask(
                "GET",
                self._session.url(f"manifests/{name}"),
                scope="pull",
                expect=(200,),
                handle=handle,
                headers=lambda: {"Accept": _ACCEPT},
                what=what,
            )
        )

    def find(self, name: str) -> Descriptor | None:
        """As `resolve`; None where there is nothing of that name."""
        try:
            return self.resolve(name)
        except NotFound:
            return None

    def document(self, descriptor: Descriptor, max_bytes: int = MAX_MANIFEST_BYTES) -> bytes:
        """The checked bytes of a manifest, an index or a small blob (a configuration, an SBOM)."""
        known = self._documents.get(descriptor.digest)
        if known is not None and len(known) == descriptor.size_bytes:
            return known
        is_manifest = descriptor.media_type in MANIFESTS + INDEXES
        what = self._what(descriptor.digest)
        if descriptor.size_bytes > max_bytes:
            raise InputError(f"{what} has {descriptor.size_bytes} bytes, more than the {max_bytes} that are read")

        def handle(answer: Answer) -> bytes:
            data = answer.read(max_bytes=descriptor.size_bytes)
            found = Descriptor.of(data, descriptor.media_type)
            if found.size_bytes != descriptor.size_bytes:
                raise Differs(
                    f"{what}: the registry sends {len(data)} bytes, its descriptor says {descriptor.size_bytes}"
                )
            if found.digest != descriptor.digest:
                raise Differs(f"{what}: the registry sends other bytes, with the digest {found.digest}")
            return data

        data = self._session.call(
            Ask(
                "GET",
                self._session.url(f"{'manifests' if is_manifest else 'blobs'}/{descriptor.digest}"),
                scope="pull",
                expect=(200,),
                handle=handle,
                headers=lambda: {"Accept": descriptor.media_type} if is_manifest else {},
                what=what,
            )
        )
        self._documents[descriptor.digest] = data
        return data

    def image(self, descriptor: Descriptor, platform: Platform) -> Image:
        """The image for `platform` behind a manifest or an index."""
        return image_of(descriptor, self.document, platform=platform, what=self._what(descriptor.digest))

    def download(
        self, descriptors: Sequence[Descriptor], store: BlobStore, *, progress: Progress = no_progress
    ) -> None:
        """Have these blobs in `store`, several at once; what is there or partly there is not fetched again."""
        wanted = {one.digest: one for one in descriptors if not store.has(one)}
        parallel(
            self._session,
            [lambda one=one: download(self._session, one, store, progress) for one in wanted.values()],  # type: ignore[misc]
        )

    def referrers(self, digest: str, artifact_type: str | None = None) -> tuple[Descriptor, ...]:
        """What refers to a manifest: SBOMs, locks, signatures; through the referrers API or the tag schema."""
        found = self._referrers_by_api(digest)
        if found is None:
            found = self._referrers_by_tag(digest).manifests
        return tuple(one for one in found if artifact_type in (None, one.artifact_type))

    def artifact(self, descriptor: Descriptor, subject: str) -> Manifest:
        """The manifest of a referrer; raises Differs where it does not refer to `subject` after all."""
        found = parse(self.document(descriptor), what=self._what(descriptor.digest), media_type=descriptor.media_type)
        if not isinstance(found, Manifest) or found.subject is None or found.subject.digest != subject:
            raise Differs(f"{self._what(descriptor.digest)} is listed as a referrer of {subject}, and does not say so")
        return found

    def tags(self) -> tuple[str, ...]:
        """All tags, as the registry lists them."""
        found: list[str] = []
        url: str | None = self._session.url("tags/list")
        for _ in range(_MAX_PAGES):
            if url is None:
                return tuple(found)

            def handle(answer: Answer) -> tuple[object, str]:
                data = answer.read(max_bytes=MAX_MANIFEST_BYTES)
                return loads(data, what=f"{self.reference}: its list of tags"), answer.header("Link")

            tree, link = self._session.call(Ask("GET", url, scope="pull", expect=(200,), handle=handle))
            names = (tree.get("tags") or []) if isinstance(tree, dict) else None
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise InputError(f"{self.reference}: its list of tags is none")
            found += names
            url = _next_page(url, link, f"{self.reference}: its list of tags")
        raise UnfitEnvironment(f"{self.reference}: its list of tags has more than {_MAX_PAGES} pages")

    def _referrers_by_api(self, digest: str) -> tuple[Descriptor, ...] | None:
        what = f"{self._what(digest)}: its referrers"

        def handle(answer: Answer) -> tuple[Index | None, str]:
            if answer.status == 404:
                return None, ""
            found = parse(answer.read(max_bytes=MAX_MANIFEST_BYTES), what=what, media_type=INDEX)
            return (found if isinstance(found, Index) else None), answer.header("Link")

        url: str | None = self._session.url(f"referrers/{digest}")
        found: tuple[Descriptor, ...] = ()
        for _ in range(_MAX_PAGES):
            if url is None:
                return found
            index, link = self._session.call(
                Ask(
                    "GET",
                    url,
                    scope="pull",
                    expect=(200, 404),
                    handle=handle,
                    headers=lambda: {"Accept": INDEX},
                    what=what,
                )
            )
            if index is None:
                return None
            found += index.manifests
            url = _next_page(url, link, what)
        raise UnfitEnvironment(f"{what} have more than {_MAX_PAGES} pages")

    def _referrers_by_tag(self, digest: str) -> Index:
        name = digest.replace(":", "-", 1)
        listed = self.find(name)
        if listed is None:
            return Index(())
        found = parse(self.document(listed), what=self._what(name), media_type=listed.media_type)
        if not isinstance(found, Index):
            raise InputError(f"{self._what(name)}: the list of referrers of {digest} is not an index")
        return found

    # Writing

    def push(
        self, layout: Layout, descriptor: Descriptor, *, tag: str | None = None, progress: Progress = no_progress
    ) -> Descriptor:
        """Push an image or an index with all that it names, out of a layout, and then the tag.

        Returns the descriptor as the registry now has it: the digest is that of the layout.
        """
        data = layout.fetch(descriptor, MAX_MANIFEST_BYTES)
        found = parse(data, what=f"{layout.root}: {descriptor.digest}", media_type=descriptor.media_type)
        if isinstance(found, Index):
            for one in found.manifests:
                self.push(layout, one, progress=progress)
        else:
            blobs = {one.digest: one for one in (*found.layers, found.config)}
            parallel(
                self._session,
                [lambda one=one: self.push_blob(layout.blobs, one, progress=progress) for one in blobs.values()],  # type: ignore[misc]
            )
        return self.push_manifest(data, descriptor.media_type, tag=tag)

    def push_blob(self, store: BlobStore, descriptor: Descriptor, *, progress: Progress = no_progress) -> None:
        """Push one blob, unless the registry has it; its bytes are checked before."""
        if self._has_blob(descriptor):
            progress(descriptor.digest, descriptor.size_bytes)
            return
        store.check(descriptor)
        path = store.path(descriptor.digest)
        self._upload(descriptor, lambda: _Reported(path, lambda size: progress(descriptor.digest, size)))  # type: ignore[arg-type,return-value]

    def push_bytes(self, data: bytes, media_type: str) -> Descriptor:
        """Push a small blob."""
        descriptor = Descriptor.of(data, media_type)
        if not self._has_blob(descriptor):
            self._upload(descriptor, lambda: data)
        return descriptor

    def push_manifest(self, data: bytes, media_type: str, *, tag: str | None = None) -> Descriptor:
        """Push a manifest or an index under its digest, and under `tag`; a subject's list of referrers is kept up."""
        descriptor = Descriptor.of(data, media_type)
        what = self._what(tag or descriptor.digest)

        def handle(answer: Answer) -> bool:
            announced = answer.header("Docker-Content-Digest")
            if is_image_digest(announced) and announced != descriptor.digest:
                raise Differs(f"{what}: the registry stored {announced} where {descriptor.digest} was sent")
            return bool(answer.header("OCI-Subject"))

        listed = self._session.call(
            Ask(
                "PUT",
                self._session.url(f"manifests/{tag or descriptor.digest}"),
                scope="pull,push",
                expect=(201, 202),
                handle=handle,
                headers=lambda: {"Content-Type": media_type, "Content-Length": str(len(data))},
                content=lambda: data,
                what=what,
            )
        )
        found = parse(data, what=what, media_type=media_type)
        if found.subject is not None and not listed:
            self._list_referrer(found, descriptor)
        return descriptor

    def push_artifact(
        self,
        data: bytes,
        *,
        media_type: str,
        subject: Descriptor,
        artifact_type: str | None = None,
        annotations: Mapping[str, str] | None = None,
        title: str | None = None,
    ) -> Descriptor:
        """Push `data` as a referrer of `subject` (image specification 1.1, "guidelines for artifact usage").

        `title` is the name of a file, as other clients write it when they fetch the artifact.
        """
        layer = self.push_bytes(data, media_type)
        if title is not None:
            layer = replace(layer, annotations={TITLE: title})
        config = self.push_bytes(_EMPTY, EMPTY)
        manifest = Manifest(
            config,
            (layer,),
            annotations=dict(annotations or {}),
            subject=Descriptor(subject.media_type, subject.digest, subject.size_bytes),
            artifact_type=artifact_type or media_type,
        )
        return self.push_manifest(manifest.to_bytes(), MANIFEST)

    def _has_blob(self, descriptor: Descriptor) -> bool:
        return self._session.call(
            Ask(
                "HEAD",
                self._session.url(f"blobs/{descriptor.digest}"),
                scope="pull,push",
                expect=(200, 404),
                handle=lambda answer: answer.status == 200 and answer.length_bytes in (None, descriptor.size_bytes),
                what=self._what(descriptor.digest),
            )
        )

    def _upload(self, descriptor: Descriptor, content: Callable[[], IO[bytes] | bytes]) -> None:
        what = self._what(descriptor.digest)
        start = self._session.url("blobs/uploads/")
        place = self._session.call(
            Ask(
                "POST",
                start,
                scope="pull,push",
                expect=(202,),
                handle=lambda answer: join(start, answer.header("Location"), what),
                headers=lambda: {"Content-Length": "0"},
                what=what,
            )
        )
        joint = "&" if "?" in place else "?"
        self._session.call(
            Ask(
                "PUT",
                place + joint + urlencode({"digest": descriptor.digest}),
                scope="pull,push",
                expect=(201,),
                handle=lambda _: None,
                headers=lambda: {
                    "Content-Type": "application/octet-stream",
                    "Content-Length": str(descriptor.size_bytes),
                },
                content=content,
                what=what,
            )
        )

    def _list_referrer(self, manifest: Manifest | Index, descriptor: Descriptor) -> None:
        """Add to the index of the tag schema (distribution specification 1.1, "referrers tag schema")."""
        assert manifest.subject is not None
        if self._referrers_by_api(manifest.subject.digest) is not None:
            return
        artifact_type = None
        if isinstance(manifest, Manifest):
            artifact_type = manifest.artifact_type or manifest.config.media_type
        listed = replace(descriptor, artifact_type=artifact_type, annotations=manifest.annotations)
        name = manifest.subject.digest.replace(":", "-", 1)
        for _ in range(5):  # another client may replace the index at the same time: look whether ours stayed
            index = self._referrers_by_tag(manifest.subject.digest)
            if listed.digest in {one.digest for one in index.manifests}:
                return
            self.push_manifest(replace(index, manifests=(*index.manifests, listed)).to_bytes(), INDEX, tag=name)
        raise UnfitEnvironment(
            f"{self._what(name)}: the list of referrers is changed by others all the time; try again"
        )


class _Reported:
    """A file that says how far it was read."""

    def __init__(self, path: Path, report: Callable[[int], None]) -> None:
        self._stream = open(path, "rb")  # noqa: SIM115 (closed by the session)
        self._report, self._size = report, 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._size += len(data)
        self._report(self._size)
        return data

    def __iter__(self) -> _Reported:
        return self

    def __next__(self) -> bytes:
        if data := self.read(2**16):
            return data
        raise StopIteration

    def close(self) -> None:
        self._stream.close()


def _next_page(url: str, link: str, what: str) -> str | None:
    """The address of `Link: <...>; rel="next"`, which must be on the same server."""
    match = re.match(r'\s*<([^>]+)>\s*;\s*rel="?next"?', link)
    if match is None:
        return None
    target, base = join(url, match[1], what), url.split("/v2/", 1)[0]
    if not target.startswith(f"{base}/v2/"):
        raise UnfitEnvironment(f"{what} leads to another server: refused")
    return target

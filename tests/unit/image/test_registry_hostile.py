"""Registries that lie, stall, or are broken: one clear line, nothing kept that is wrong, no secret to another host."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from apertus_nemo.errors import ApertusError, Differs, InputError, UnfitEnvironment
from apertus_nemo.image.blobs import BlobStore
from apertus_nemo.image.layout import Layout
from apertus_nemo.image.oci import INDEX, LAYER, MANIFEST, Descriptor, Index
from apertus_nemo.image.reference import Reference
from apertus_nemo.image.registry import Repository
from apertus_nemo.image.registry_http import Limits
from tests.unit.image.images import PLATFORM, entry, layout_with, tar
from tests.unit.image.servers import Request, free_port, server

LIMITS = Limits(connect_s=2, idle_s=1, attempts=3, backoff_s=0.01, max_wait_s=5, window_s=0.3, window_bytes=1000)
BLOB = bytes(range(256)) * 20_000
DESCRIPTOR = Descriptor.of(BLOB, LAYER)
Behaviour = Callable[[Request], None]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return layout_with(tmp_path / "layout", tar([entry("a", b"a" * 1000)]))


def ask(host: str, *, environment: dict[str, str] | None = None, **changes: object) -> Repository:
    limits = replace(LIMITS, **changes)  # type: ignore[arg-type]
    return Repository(Reference.parse(f"{host}/a"), environment=environment or {}, limits=limits)


def refused(behave: Behaviour, kind: type[ApertusError], *, digest: str | None = None) -> str:
    """The message with which resolving the tag 1 (or a digest) ends."""
    with server(behave) as host, ask(host) as remote, pytest.raises(kind) as caught:
        remote.resolve(digest or "1")
    text = str(caught.value).replace(host, "HOST")
    assert "\n" not in text
    assert len(text) < 500
    return text


def fetched(behave: Behaviour, folder: Path, descriptor: Descriptor = DESCRIPTOR, **changes: object) -> BlobStore:
    """Download a blob; what is kept is the blob or nothing."""
    store = BlobStore(folder)
    try:
        with server(behave) as host, ask(host, **changes) as remote:
            remote.download([descriptor], store)
    except ApertusError:
        assert not store.path(descriptor.digest).exists()
        raise
    store.check(descriptor)
    assert list((folder / "partial").iterdir()) == []
    return store


@pytest.mark.parametrize(
    ("status", "kind", "expected"),
    [
        (403, UnfitEnvironment, "HOST/a:1: HOST does not allow it (403): CODE: words"),
        (404, InputError, "HOST/a:1: HOST has no such thing (404): CODE: words"),
        (418, UnfitEnvironment, "HOST/a:1: HOST answers 418: CODE: words"),
        (429, UnfitEnvironment, "HOST/a:1: HOST answers 429: CODE: words (3 attempts)"),
        (500, UnfitEnvironment, "HOST/a:1: HOST answers 500: CODE: words (3 attempts)"),
        (503, UnfitEnvironment, "HOST/a:1: HOST answers 503: CODE: words (3 attempts)"),
        (
            401,
            UnfitEnvironment,
            "HOST/a:1: HOST wants credentials, and none were found; `podman login HOST` keeps some",
        ),
    ],
)
def test_refusals(status: int, kind: type[ApertusError], expected: str) -> None:
    body = json.dumps({"errors": [{"code": "CODE", "message": "words"}]}).encode()
    assert refused(lambda request: request.answer(status, body), kind) == expected


def test_what_an_error_says_cannot_drive_the_terminal() -> None:
    for body in (b'{"errors":[{"code":"A","message":"\\u001b[31m"}]}', b"\x1b[31m" * 10_000, b"[" * 100_000, b"{}"):
        text = refused(lambda request, body=body: request.answer(403, body), UnfitEnvironment)  # type: ignore[misc]
        assert text.isprintable()


def test_it_comes_back_after_failures(layout: Layout) -> None:
    """Two refusals, then the manifest; Retry-After is heeded."""
    data = layout.fetch(layout.find(), 2**20)
    times: list[float] = []

    def behave(request: Request) -> None:
        times.append(time.monotonic())
        if len(times) == 1:
            request.answer(429, headers={"Retry-After": "1"})
        elif len(times) == 2:
            request.answer(503)
        else:
            request.answer(200, data, {"Content-Type": MANIFEST})

    with server(behave) as host, ask(host) as remote:
        assert remote.resolve("1").digest == layout.find().digest
    assert times[1] - times[0] >= 1
    assert times[2] - times[1] < 0.9


def test_a_wait_without_end_is_bounded() -> None:
    waits: list[float] = []
    with server(lambda request: request.answer(429, headers={"Retry-After": "99999999"})) as host:
        remote = Repository(Reference.parse(f"{host}/a"), environment={}, limits=LIMITS, sleep=waits.append)
        with remote, pytest.raises(UnfitEnvironment, match="answers 429"):
            remote.resolve("1")
    assert waits == [5.0, 5.0]


def test_nobody_listens() -> None:
    host = f"127.0.0.1:{free_port()}"
    with ask(host) as remote, pytest.raises(UnfitEnvironment) as caught:
        remote.resolve("1")
    assert str(caught.value) == f"{host}/a:1: {host} cannot be reached: [Errno 111] Connection refused (3 attempts)"


def test_a_name_that_does_not_resolve() -> None:
    reference = Reference.parse("registry.invalid/a:1")
    with Repository(reference, environment={}, limits=LIMITS) as remote, pytest.raises(UnfitEnvironment) as caught:
        remote.resolve("1")
    assert str(caught.value).startswith("registry.invalid/a:1: registry.invalid cannot be reached: ")


def test_manifests_that_are_not_what_was_asked_for(layout: Layout) -> None:
    data = layout.fetch(layout.find(), 2**20)
    ours = layout.find().digest
    other = "sha256:" + "0" * 64

    def sends(body: bytes = data, **headers: str) -> Behaviour:
        named = {key.replace("_", "-"): value for key, value in {"Content_Type": MANIFEST, **headers}.items()}
        return lambda request: request.answer(200, body, named)

    assert refused(sends(), Differs, digest=other) == (
        f"HOST/a@{other}: the registry sends a manifest with the digest {ours}, not {other}"
    )
    assert "sends a manifest with the digest" in refused(sends(Docker_Content_Digest=other), Differs)
    assert "was announced as" in refused(sends(Content_Type=INDEX), InputError)
    assert "is not JSON" in refused(sends(b"<html>"), InputError)
    assert "sends more than the 4194304 bytes" in refused(sends(b" " * (5 * 2**20)), Differs)
    assert "is not UTF-8" in refused(sends(b"\xff"), InputError)


def test_an_endless_manifest() -> None:
    def behave(request: Request) -> None:
        request.answer(200, length=None)
        while request.send(b"x" * 2**16):
            pass

    assert "sends more than the 4194304 bytes" in refused(behave, Differs)


def test_a_manifest_that_drips() -> None:
    """A byte now and then keeps a connection alive for ever; not here."""

    def behave(request: Request) -> None:
        request.answer(200, length=100)
        while request.send(b"x"):
            time.sleep(0.05)

    started = time.monotonic()
    assert refused(behave, UnfitEnvironment) == ("HOST/a:1: HOST sent fewer than 1000 bytes in 0 s (3 attempts)")
    assert time.monotonic() - started < 10


def test_a_silent_server() -> None:
    def behave(request: Request) -> None:
        time.sleep(2.5)

    assert refused(behave, UnfitEnvironment) == "HOST/a:1: HOST stopped sending (3 attempts)"


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/v2/a/manifests/1", "redirects more than 5 times"),
        ("", "redirects to nowhere"),
        ("file:///etc/passwd", "file:// is not reached over TLS"),
        ("http://[bad", "names an address that is not one"),
        ("gopher://x/", "gopher://x is not reached over TLS"),
    ],
)
def test_redirects_that_lead_nowhere(location: str, expected: str) -> None:
    headers = {"Location": location} if location else {}
    assert expected in refused(lambda request: request.answer(307, headers=headers), UnfitEnvironment)


def test_from_tls_to_plain_http_is_refused() -> None:
    """The rule itself: a registry that is not on this machine may not lead to plain HTTP."""
    from apertus_nemo.image.registry_http import Session

    reference = Reference.parse("registry.example/a")
    expected = r"w: http://x is not reached over TLS; --insecure allows it\Z"
    with Session(reference, environment={}) as session, pytest.raises(UnfitEnvironment, match=expected):
        session._check_scheme("http://x/y?token=secret", "w")
    with Session(reference, environment={}, insecure=True) as session:
        session._check_scheme("http://x/y", "w")


def test_a_blob_from_another_host_without_our_password(tmp_path: Path) -> None:
    """Registries send to their storage: the header that logs in stays with the registry, the blob comes."""
    elsewhere: list[Request] = []
    here: list[Request] = []
    with server(lambda request: request.answer(200, BLOB), elsewhere) as storage:

        def behave(request: Request) -> None:
            if "Authorization" not in request.headers:
                request.answer(401, headers={"WWW-Authenticate": 'Basic realm="x"'})
            else:
                request.answer(307, headers={"Location": f"http://{storage}/blob?signature=secret"})

        auth = base64.b64encode(b"user:password").decode()
        file = tmp_path / "auth.json"
        with server(behave, here) as host:
            file.write_text(json.dumps({"auths": {host: {"auth": auth}}}))
            with ask(host, environment={"REGISTRY_AUTH_FILE": str(file)}) as remote:
                remote.download([DESCRIPTOR], BlobStore(tmp_path / "cache"))
    assert [one.headers.get("Authorization") for one in here] == [None, f"Basic {auth}"]
    assert [one.headers.get("Authorization") for one in elsewhere] == [None]


def test_bearer_tokens(layout: Layout, tmp_path: Path) -> None:
    """The token service gets the password, the registry the token; the token is asked for once."""
    data = layout.fetch(layout.find(), 2**20)
    asked: list[Request] = []
    seen: list[Request] = []

    def tokens(request: Request) -> None:
        request.answer(200, b'{"token":"tok-en"}')

    with server(tokens, asked) as service:

        def behave(request: Request) -> None:
            if request.headers.get("Authorization") == "Bearer tok-en":
                request.answer(200, data, {"Content-Type": MANIFEST})
            else:
                challenge = f'Bearer realm="http://{service}/token",service="reg",scope="repository:evil:pull"'
                request.answer(401, headers={"WWW-Authenticate": challenge})

        file = tmp_path / "auth.json"
        with server(behave, seen) as host:
            file.write_text(json.dumps({"auths": {host: {"auth": base64.b64encode(b"user:password").decode()}}}))
            with ask(host, environment={"REGISTRY_AUTH_FILE": str(file)}) as remote:
                remote.resolve("1")
                remote.resolve("1")
    assert [one.headers.get("Authorization") for one in seen] == [None, "Bearer tok-en", "Bearer tok-en"]
    (request,) = asked
    assert request.path == "/token?service=reg&scope=repository%3Aa%3Apull"  # our own scope, whatever it says
    assert request.headers["Authorization"].startswith("Basic ")


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (200, b'{"token":"a\\nX-Evil: 1"}', "gave no token"),
        (200, b"{}", "gave no token"),
        (200, b"[]", "gave no token"),
        (200, b"[" * 100_000, "gave no token"),
        (401, b"", "wants credentials, and none were found"),
        (404, b"", "the token service 127.0.0.1: HOST has no such thing (404)"),
    ],
)
def test_token_services_that_give_none(status: int, body: bytes, expected: str) -> None:
    with server(lambda request: request.answer(status, body)) as service:
        challenge = {"WWW-Authenticate": f'Bearer realm="http://{service}/token"'}
        kind = InputError if status == 404 else UnfitEnvironment
        assert expected in refused(lambda request: request.answer(401, headers=challenge), kind)


def test_a_token_that_is_never_good_enough() -> None:
    """A registry that wants a new token for ever is asked twice."""
    asked: list[Request] = []
    with server(lambda request: request.answer(200, b'{"token":"x%d"}' % len(asked)), asked) as service:
        challenge = {"WWW-Authenticate": f'Bearer realm="http://{service}/token"'}
        text = refused(lambda request: request.answer(401, headers=challenge), UnfitEnvironment)
    assert "wants credentials" in text
    assert len(asked) <= 2


@pytest.mark.parametrize(
    ("behave", "kind", "expected"),
    [
        (lambda r: r.answer(200, BLOB[:-1] + b"x"), Differs, "the registry sends other bytes (sha256:"),
        (lambda r: r.answer(200, BLOB + b"x"), Differs, "sends more than the 5120000 bytes that were announced"),
        (lambda r: r.answer(200, BLOB[:1000]), UnfitEnvironment, "sent 1000 of 5120000 bytes (3 attempts)"),
        (lambda r: r.answer(200, b""), UnfitEnvironment, "sent 0 of 5120000 bytes (3 attempts)"),
        (lambda r: r.answer(416), UnfitEnvironment, "does not go on where it was asked to"),
        (lambda r: r.answer(404), InputError, "has no such thing (404)"),
        (lambda r: r.answer(206, BLOB), UnfitEnvironment, "does not go on where it was asked to"),
    ],
)
def test_blobs_that_are_wrong(behave: Behaviour, kind: type[ApertusError], expected: str, tmp_path: Path) -> None:
    with pytest.raises(kind) as caught:
        fetched(behave, tmp_path)
    assert expected in str(caught.value)


def test_an_endless_blob(tmp_path: Path) -> None:
    def behave(request: Request) -> None:
        request.answer(200, length=None)
        while request.send(bytes(2**16)):
            pass

    with pytest.raises(Differs, match="sends more than the 5120000 bytes"):
        fetched(behave, tmp_path)


def resuming(request: Request, cut: int) -> None:
    """Send from where the request wants it, and break off after `cut` bytes."""
    begin = int(request.headers.get("Range", "bytes=0-")[6:].rstrip("-"))
    headers = {"Content-Range": f"bytes {begin}-{len(BLOB) - 1}/{len(BLOB)}"}
    request.answer(206 if begin else 200, BLOB[begin : begin + cut], headers, length=len(BLOB) - begin)


def test_a_connection_that_breaks_off_is_gone_on_with(tmp_path: Path) -> None:
    """Steps forward make attempts available again: five breaks with three attempts."""
    requests: list[str] = []

    def behave(request: Request) -> None:
        requests.append(request.headers.get("Range", ""))
        resuming(request, 1_100_000)

    fetched(behave, tmp_path)
    assert requests == ["", *(f"bytes={n * 1_100_000}-" for n in range(1, 5))]


def test_a_server_that_cannot_go_on(tmp_path: Path) -> None:
    """200 to a request for a range: the blob is taken from its start."""
    sent = []

    def behave(request: Request) -> None:
        sent.append(request.headers.get("Range"))
        request.answer(200, BLOB if len(sent) > 1 else BLOB[:2000], length=len(BLOB))

    fetched(behave, tmp_path)
    assert sent == [None, "bytes=2000-"]


def test_an_interrupted_pull_goes_on(tmp_path: Path) -> None:
    """What is in partial/ is kept; where it is wrong, the blob is fetched once more from its start."""
    partial = tmp_path / "partial" / DESCRIPTOR.digest.removeprefix("sha256:")
    for begun, ranges in (
        (BLOB[:3_000_000], ["bytes=3000000-"]),
        (b"wrong" + BLOB[5:3_000_000], ["bytes=3000000-", ""]),
        (BLOB + b"too long", [""]),
        (BLOB, []),
    ):
        partial.parent.mkdir(exist_ok=True)
        partial.write_bytes(begun)
        asked: list[str] = []

        def behave(request: Request, asked: list[str] = asked) -> None:
            asked.append(request.headers.get("Range", ""))
            resuming(request, len(BLOB))

        store = fetched(behave, tmp_path)
        assert asked == ranges
        store.remove(DESCRIPTOR.digest)


def test_a_tag_that_moves_during_a_pull(layout: Layout, tmp_path: Path) -> None:
    """It is read once; what comes after goes by digest."""
    other = layout_with(tmp_path / "other", tar([entry("evil", b"evil")]))
    asked: list[Request] = []

    def behave(request: Request) -> None:
        name = request.path.rpartition("/")[2]
        if name == "1":
            source = layout if len(asked) == 1 else other
            data = source.fetch(source.find(), 2**20)
        else:
            data = layout.blobs.path(name).read_bytes()
        request.answer(200, data, {"Content-Type": MANIFEST} if "manifests" in request.path else {})

    with server(behave, asked) as host, ask(host) as remote:
        image = remote.image(remote.resolve("1"), PLATFORM)
        remote.download(image.manifest.layers, BlobStore(tmp_path / "cache"))
    assert image.descriptor.digest == layout.find().digest
    assert sum(one.path.endswith("/manifests/1") for one in asked) == 1


def test_the_first_failure_ends_the_others(tmp_path: Path) -> None:
    """One blob is missing, another would take for ever."""
    slow = Descriptor.of(b"slow", LAYER)
    gone = threading.Event()

    def behave(request: Request) -> None:
        if request.path.endswith(slow.digest):
            request.answer(200, length=4)
            gone.wait(0.8)
        else:
            request.answer(404)

    started = time.monotonic()
    with server(behave) as host, ask(host, idle_s=30) as remote, pytest.raises(InputError, match="has no such thing"):
        remote.download([slow, DESCRIPTOR], BlobStore(tmp_path))
    assert time.monotonic() - started < 5


def test_referrers_by_the_api(layout: Layout) -> None:
    """Two pages; a next page on another server is not asked, a liar is found."""
    subject = layout.find()
    one, two = (Descriptor(MANIFEST, f"sha256:{n:064}", 5, artifact_type=f"application/{n}") for n in (1, 2))
    seen: list[str] = []

    def behave(request: Request) -> None:
        seen.append(request.path)
        if request.path.startswith("/v2/a/referrers/"):
            last = "page=2" in request.path
            index = Index((two if last else one,)).to_bytes()
            link = {} if last else {"Link": f'<{request.path}?page=2>; rel="next"'}
            request.answer(200, index, {"Content-Type": INDEX, **link})
        else:
            request.answer(200, layout.fetch(subject, 2**20), {"Content-Type": MANIFEST})

    with server(behave) as host, ask(host) as remote:
        assert remote.referrers(subject.digest) == (one, two)
        assert remote.referrers(subject.digest, "application/2") == (two,)
        with pytest.raises(Differs, match=r"is listed as a referrer of sha256:.*, and does not say so"):
            remote.artifact(subject, "sha256:" + "1" * 64)


def test_pages_without_end() -> None:
    def behave(request: Request) -> None:
        number = int(request.path.rpartition("=")[2] or 0) if "=" in request.path else 0
        link = {"Link": f'<http://evil.invalid/v2/a/tags/list?n={number + 1}>; rel="next"'}
        request.answer(200, b'{"tags":["x"]}', link)

    with server(behave) as host, ask(host) as remote, pytest.raises(UnfitEnvironment, match="tags leads to another"):
        remote.tags()


def test_a_registry_that_stores_something_else(layout: Layout) -> None:
    def behave(request: Request) -> None:
        request.answer(201, headers={"Docker-Content-Digest": "sha256:" + "0" * 64})

    with server(behave) as host, ask(host) as remote, pytest.raises(Differs, match=r"stored sha256:0+ where"):
        remote.push_manifest(layout.fetch(layout.find(), 2**20), MANIFEST, tag="1")

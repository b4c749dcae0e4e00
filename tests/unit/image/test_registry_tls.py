"""Registries over TLS, through a proxy: certificates, redirects and tokens that lead from it, --insecure."""

from __future__ import annotations

import base64
import json
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from apertus_nemo.errors import UnfitEnvironment
from apertus_nemo.image.blobs import BlobStore
from apertus_nemo.image.layout import Layout
from apertus_nemo.image.oci import LAYER, MANIFEST, Descriptor
from apertus_nemo.image.reference import Reference
from apertus_nemo.image.registry import Repository
from apertus_nemo.image.registry_http import Limits
from tests.unit.image.images import entry, layout_with, tar
from tests.unit.image.servers import Request, free_port, needs, server

LIMITS = Limits(connect_s=2, idle_s=2, attempts=2, backoff_s=0.01)
BLOB = b"blob" * 1000
DESCRIPTOR = Descriptor.of(BLOB, LAYER)
NAMES = ("registry.example", "storage.example")
AUTH = base64.b64encode(b"user:password").decode()


@dataclass
class Proxy:
    """A proxy that answers CONNECT, and sends each name to a port of this machine."""

    address: str
    ports: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@contextmanager
def proxy() -> Iterator[Proxy]:
    """Runs until the end of the block."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        found = Proxy(f"127.0.0.1:{listening.getsockname()[1]}")

        def pump(source: socket.socket, target: socket.socket) -> None:
            try:
                while data := source.recv(2**16):
                    target.sendall(data)
            except OSError:
                pass
            for one in (source, target):
                try:
                    one.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

        def serve(client: socket.socket) -> None:
            head = b""
            while b"\r\n\r\n" not in head and (data := client.recv(4096)):
                head += data
            method, name, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
            found.asked.append(f"{method} {name}")
            port = found.ports.get(name.partition(":")[0])
            if method != "CONNECT" or port is None:
                client.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
                client.close()
                return
            behind = socket.create_connection(("127.0.0.1", port))
            client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            threading.Thread(target=pump, args=(client, behind), daemon=True).start()
            pump(behind, client)

        def accept() -> None:
            while True:
                try:
                    client, _ = listening.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(client,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield found
        listening.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class Place:
    """What the tests of a module share: certificates, a proxy."""

    certificate: Path
    context: ssl.SSLContext
    proxy: Proxy


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A certificate for both names, by itself; openssl makes it."""
    needs("openssl")
    folder = tmp_path_factory.mktemp("tls")
    names = ",".join(f"DNS:{name}" for name in NAMES)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=tests", "-addext", f"subjectAltName={names}", "-keyout", folder / "key.pem",
         "-out", folder / "cert.pem"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    with proxy() as running:
        yield Place(folder / "cert.pem", context, running)


@pytest.fixture
def trusted(place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The certificate is one that this process trusts."""
    monkeypatch.setenv("SSL_CERT_FILE", str(place.certificate))
    return place


@contextmanager
def named(place: Place, name: str, behave: Callable[[Request], None], seen: list[Request]) -> Iterator[None]:
    """A TLS server under a name."""
    with server(behave, seen, context=place.context) as host:
        place.proxy.ports[name] = int(host.rpartition(":")[2])
        yield
        del place.proxy.ports[name]


def ask(place: Place, *, insecure: bool = False, auth: Path | None = None, **more: str) -> Repository:
    environment = {"https_proxy": f"http://{place.proxy.address}", **more}
    if auth is not None:
        auth.write_text(json.dumps({"auths": {NAMES[0]: {"auth": AUTH}}}))
        environment["REGISTRY_AUTH_FILE"] = str(auth)
    reference = Reference.parse(f"{NAMES[0]}/a")
    return Repository(reference, environment=environment, insecure=insecure, limits=LIMITS)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return layout_with(tmp_path / "layout", tar([entry("a", b"a")]))


def sends(layout: Layout) -> Callable[[Request], None]:
    data = layout.fetch(layout.find(), 2**20)
    return lambda request: request.answer(200, data, {"Content-Type": MANIFEST})


def test_a_certificate_that_is_trusted(trusted: Place, layout: Layout) -> None:
    with named(trusted, NAMES[0], sends(layout), []), ask(trusted) as remote:
        assert remote.resolve("1").digest == layout.find().digest
    assert trusted.proxy.asked[-1] == f"CONNECT {NAMES[0]}:443"


def test_a_certificate_that_is_not(place: Place, layout: Layout) -> None:
    """Said in one attempt; --insecure takes it."""
    seen: list[Request] = []
    with named(place, NAMES[0], sends(layout), seen):
        with ask(place) as remote, pytest.raises(UnfitEnvironment) as caught:
            remote.resolve("1")
        assert str(caught.value) == (
            "registry.example/a:1: registry.example shows a certificate that is not trusted (self-signed certificate); "
            "SSL_CERT_FILE names a file of those to trust, --insecure takes any"
        )
        assert seen == []
        with ask(place, insecure=True) as remote:
            assert remote.resolve("1").digest == layout.find().digest


def test_a_certificate_of_another(trusted: Place, layout: Layout) -> None:
    reference = Reference.parse("other.example/a")
    environment = {"HTTPS_PROXY": trusted.proxy.address}
    with named(trusted, "other.example", sends(layout), []):
        remote = Repository(reference, environment=environment, limits=LIMITS)
        with remote, pytest.raises(UnfitEnvironment) as caught:
            remote.resolve("1")
    assert "other.example shows a certificate that is not trusted (Hostname mismatch, " in str(caught.value)


def test_insecure_takes_plain_http_where_there_is_no_tls(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """TLS first, with any certificate; also on this machine, which is asked without TLS otherwise."""
    with server(sends(layout)) as host:
        remote = Repository(Reference.parse(f"{host}/a"), environment={}, insecure=True, limits=LIMITS)
        with remote:
            assert remote.resolve("1").digest == layout.find().digest


def test_tls_on_this_machine(place: Place, layout: Layout) -> None:
    with server(sends(layout), context=place.context) as host:
        reference = Reference.parse(f"{host}/a")
        with Repository(reference, environment={}, insecure=True, limits=LIMITS) as remote:
            assert remote.resolve("1").digest == layout.find().digest
        with Repository(reference, environment={}, limits=LIMITS) as remote, pytest.raises(UnfitEnvironment) as caught:
            remote.resolve("1")
        assert str(caught.value).startswith(f"{host}/a:1: {host} broke off: ")


def test_a_redirect_to_plain_http(trusted: Place, tmp_path: Path) -> None:
    """Refused, whatever comes; the address may hold a secret, and is not shown."""
    plain: list[Request] = []
    with server(lambda request: request.answer(200, BLOB), plain) as storage:

        def behave(request: Request) -> None:
            request.answer(307, headers={"Location": f"http://{storage}/blob?signature=secret"})

        with named(trusted, NAMES[0], behave, []), ask(trusted) as remote, pytest.raises(UnfitEnvironment) as caught:
            remote.download([DESCRIPTOR], BlobStore(tmp_path))
    assert str(caught.value) == (
        f"registry.example/a@{DESCRIPTOR.digest}: registry.example redirects from TLS to http://{storage}: refused"
    )
    assert plain == []


@pytest.mark.parametrize("user", ["", "someone:hidden@"])
def test_a_redirect_to_another_host(user: str, trusted: Place, tmp_path: Path) -> None:
    """The password stays with the registry; what the address itself holds is for its host, and is not shown."""
    here: list[Request] = []
    there: list[Request] = []

    def behave(request: Request) -> None:
        if "Authorization" not in request.headers:
            request.answer(401, headers={"WWW-Authenticate": 'Basic realm="x"'})
        else:
            request.answer(307, headers={"Location": f"https://{user}{NAMES[1]}/blob"})

    with (
        named(trusted, NAMES[0], behave, here),
        named(trusted, NAMES[1], lambda request: request.answer(200 if not user else 403, BLOB), there),
        ask(trusted, auth=tmp_path / "auth.json") as remote,
    ):
        if not user:
            remote.download([DESCRIPTOR], BlobStore(tmp_path))
        else:
            with pytest.raises(UnfitEnvironment) as caught:
                remote.download([DESCRIPTOR], BlobStore(tmp_path))
            assert (
                str(caught.value) == f"registry.example/a@{DESCRIPTOR.digest}: registry.example does not allow it (403)"
            )
    assert [one.headers.get("Authorization") for one in here] == [None, f"Basic {AUTH}"]
    own = "Basic " + base64.b64encode(b"someone:hidden").decode() if user else None
    assert [one.headers.get("Authorization") for one in there] == [own]


def test_a_token_service_without_tls(trusted: Place, tmp_path: Path) -> None:
    """It would get the password."""
    seen: list[Request] = []
    with server(lambda request: request.answer(200, b'{"token":"x"}'), seen) as service:
        challenge = {"WWW-Authenticate": f'Bearer realm="http://{service}/token?a=secret"'}
        with (
            named(trusted, NAMES[0], lambda request: request.answer(401, headers=challenge), []),
            ask(trusted, auth=tmp_path / "auth.json") as remote,
            pytest.raises(UnfitEnvironment) as caught,
        ):
            remote.resolve("1")
    expected = f"registry.example/a:1: http://{service} is not reached over TLS; --insecure allows it"
    assert str(caught.value) == expected
    assert seen == []


def test_proxies(trusted: Place, layout: Layout) -> None:
    """Hosts of NO_PROXY go around it; one that is not there, or refuses, is said."""
    trusted.proxy.asked.clear()
    with ask(trusted, NO_PROXY="example") as remote, pytest.raises(UnfitEnvironment, match="cannot be reached"):
        remote.resolve("1")
    assert trusted.proxy.asked == []
    with ask(trusted) as remote, pytest.raises(UnfitEnvironment) as caught:
        remote.resolve("1")
    assert str(caught.value) == "registry.example/a:1: registry.example broke off: 502 Bad Gateway (2 attempts)"
    gone = f"127.0.0.1:{free_port()}"
    with ask(trusted, https_proxy=f"http://{gone}") as remote, pytest.raises(UnfitEnvironment) as caught:
        remote.resolve("1")
    assert str(caught.value).startswith("registry.example/a:1: registry.example cannot be reached: ")

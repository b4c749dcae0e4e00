"""Registries for tests, on loopback: the real docker-registry, and a server that answers as a test wants."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


def needs(*tools: str) -> None:
    """Skip where a tool is missing; in CI it must be there."""
    missing = [tool for tool in tools if shutil.which(tool, path=_path()) is None]
    if missing:
        assert not os.environ.get("CI"), f"CI must have {missing}: see .ci/run"
        pytest.skip(f"not installed: {', '.join(missing)}")


def needs_mounts() -> None:
    """Skip where this user has no mount namespaces of its own."""
    needs("unshare")
    if os.geteuid() != 0:
        pytest.skip("only root mounts")
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True, timeout=30)
    if tried.returncode != 0:
        pytest.skip(f"no mount namespaces here: {tried.stderr.strip()}")


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def docker_registry(folder: Path, *, htpasswd: str | None = None) -> Iterator[str]:
    """The real one; its host and port."""
    needs("docker-registry")
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    auth = ""
    if htpasswd is not None:
        (folder / "htpasswd").write_text(htpasswd)
        auth = f"auth:\n  htpasswd:\n    realm: test\n    path: {folder}/htpasswd\n"
    config = folder / "config.yml"
    config.write_text(
        "version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\n"
        f"storage:\n  filesystem:\n    rootdirectory: {folder}/data\n  delete:\n    enabled: true\n"
        f"http:\n  addr: 127.0.0.1:{port}\n{auth}"
    )
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, "docker-registry does not come up"
                time.sleep(0.02)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=20)


class Request:
    """What a hostile server was asked."""

    def __init__(self, handler: BaseHTTPRequestHandler) -> None:
        self._handler = handler
        self.method, self.path = handler.command, handler.path
        self.headers = dict(handler.headers.items())

    def answer(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, *, length: int | None = -1
    ) -> None:
        """Answer; `length` None leaves Content-Length out, another value than -1 is sent as it is."""
        self._handler.send_response(status)
        for key, value in (headers or {}).items():
            self._handler.send_header(key, value)
        if length is not None:
            self._handler.send_header("Content-Length", str(len(body) if length == -1 else length))
        self._handler.end_headers()
        if self.method != "HEAD":
            self.send(body)

    def send(self, data: bytes) -> bool:
        """More of a body; False when the client is gone."""
        try:
            self._handler.wfile.write(data)
            self._handler.wfile.flush()
        except OSError:
            return False
        return True


@contextmanager
def server(
    behave: Callable[[Request], None], requests: list[Request] | None = None, *, context: ssl.SSLContext | None = None
) -> Iterator[str]:
    """A server that calls `behave` for each request, over TLS where `context` is given; its host and port."""

    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            request = Request(self)
            if requests is not None:
                requests.append(request)
            behave(request)
            self.close_connection = True

        def setup(self) -> None:
            if context is not None:  # the handshake is this thread's
                self.request = context.wrap_socket(self.request, server_side=True)
            super().setup()

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = _any

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{httpd.server_address[1]}"
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join(timeout=10)

"""An S3 server on this machine, for whatever reads and writes through fsspec."""

from __future__ import annotations

from collections.abc import Iterator

import fsspec
import pytest


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An S3 server of this machine, with the bucket "runs"; its endpoint."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    patch.setenv("AWS_ACCESS_KEY_ID", "testing")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-key")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.filesystem("s3", skip_instance_cache=True).makedirs("runs", exist_ok=True)
    yield f"http://{host}:{port}"
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    patch.undo()
    server.stop()

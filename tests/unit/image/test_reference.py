"""References to images."""

from __future__ import annotations

import pytest

from apertus_nemo.errors import InputError
from apertus_nemo.image.reference import Reference

D = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nvcr.io/nvidia/pytorch:25.11-py3", Reference("nvcr.io", "nvidia/pytorch", "25.11-py3")),
        ("docker://nvcr.io/nvidia/pytorch", Reference("nvcr.io", "nvidia/pytorch", "latest")),
        ("nvcr.io#nvidia/pytorch:a", Reference("nvcr.io", "nvidia/pytorch", "a")),
        (f"127.0.0.1:5000/a/b__c-d.e@{D}", Reference("127.0.0.1:5000", "a/b__c-d.e", None, D)),
        (f"[::1]:5000/a:1@{D}", Reference("[::1]:5000", "a", "1", D)),
        ("localhost/a:1", Reference("localhost", "a", "1")),
    ],
)
def test_a_reference_is_read(text: str, expected: Reference) -> None:
    assert Reference.parse(text) == expected
    assert Reference.parse(str(expected)) == expected
    assert Reference.parse(expected.enroot()).name == expected.name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ubuntu:24.04", "the registry is not named; write for example docker.io/library/ubuntu:24.04"),
        ("a/b:1", "the registry is not named; write for example docker.io/a/b:1"),
        ("nvcr.io/Nvidia/pytorch", "'Nvidia/pytorch' is not a repository"),
        ("nvcr.io/a/../b", "'a/../b' is not a repository"),
        ("nvcr.io/a:-x", "'-x' is not a tag"),
        ("nvcr.io/a:" + "x" * 129, "is not a tag"),
        ("nvcr.io/a@sha256:12", "is not sha256 with 64 lower-case hex digits"),
        ("nvcr.io/a@sha512:" + "0" * 128, "is not sha256 with 64 lower-case hex digits"),
        ("nvcr.io/a@", "'' is not a digest"),
        ("user:pass@nvcr.io/a", "is not a digest"),
        ("-x.y/a", "'-x.y' is not the host of a registry"),
        ("nvcr.io/a\n", "is not a reference"),
        ("", "is not a reference"),
        ("a.b/" + "x/" * 130 + "x", "more than 255 characters"),
    ],
)
def test_anything_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Reference.parse(text)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_loopback_is_known() -> None:
    for text in ("127.0.0.1:5000/a", "localhost/a", "[::1]:80/a", "127.1.2.3/a"):
        assert Reference.parse(text).is_loopback
    for text in ("127.0.0.1.evil.example/a", "localhost.evil.example/a", "10.0.0.1:5000/a"):
        assert not Reference.parse(text).is_loopback

"""Manifests, indexes and configurations: read back, refused in one line, never a traceback."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apertus_nemo.errors import InputError
from apertus_nemo.image.oci import (
    CONFIG,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    INDEX,
    LAYER_GZIP,
    MANIFEST,
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
    Platform,
    choose,
    parse,
)

BLOB = Descriptor.of(b"x", LAYER_GZIP)
IMAGE = Manifest(
    Descriptor.of(b"{}", CONFIG), (BLOB, BLOB), annotations={"a": "b"}, subject=Descriptor.of(b"", MANIFEST)
)
ARM = Descriptor(
    "application/vnd.oci.image.manifest.v1+json", BLOB.digest, 7, platform=Platform("linux", "arm64", "v8")
)
LIST = Index((ARM, Descriptor(MANIFEST, BLOB.digest, 8, platform=Platform("unknown", "unknown"))))
CONFIGURATION = {
    "os": "linux",
    "architecture": "amd64",
    "rootfs": {"diff_ids": [BLOB.digest]},
    "config": {"Env": ["A=1"]},
}


def test_read_back() -> None:
    assert parse(IMAGE.to_bytes(), what="m") == IMAGE
    assert parse(LIST.to_bytes(), what="m") == LIST
    assert ImageConfig.from_bytes(json.dumps(CONFIGURATION).encode(), what="c").environment == ("A=1",)


def test_docker_documents_are_read_alike() -> None:
    tree = json.loads(IMAGE.to_bytes()) | {"mediaType": DOCKER_MANIFEST}
    assert parse(json.dumps(tree).encode(), what="m", media_type=DOCKER_MANIFEST) != IMAGE
    tree = json.loads(LIST.to_bytes()) | {"mediaType": DOCKER_LIST}
    assert isinstance(parse(json.dumps(tree).encode(), what="m"), Index)


def test_the_platform_is_chosen() -> None:
    assert choose(LIST, Platform("linux", "arm64"), what="a:1") == ARM
    assert Platform.of_machine("aarch64") == Platform.parse("linux/arm64")
    with pytest.raises(InputError) as caught:
        choose(LIST, Platform("linux", "amd64"), what="a:1")
    assert str(caught.value) == "a:1 has no image for linux/amd64; it has linux/arm64/v8"
    with pytest.raises(InputError, match="it has no image for any platform"):
        choose(Index(()), Platform("linux", "amd64"), what="a:1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schemaVersion": 1}, "its schemaVersion is 1: only 2 can be read"),
        ({"mediaType": "text/plain"}, "the media type text/plain is neither an image manifest nor an index"),
        ({"mediaType": 7}, "7 is not a media type"),
        ({"manifests": []}, "it holds both layers and manifests, or neither"),
        ({"mediaType": INDEX}, "its content is not what its media type"),
        ({"layers": {}}, "its layers are not a list"),
        ({"layers": [BLOB.tree()] * 1025}, "its layers are 1025, more than the 1024 that are read"),
        ({"layers": [{**BLOB.tree(), "size": -1}]}, "layer 1: its size -1 is not a number of bytes"),
        ({"layers": [{**BLOB.tree(), "size": True}]}, "layer 1: its size True is not a number of bytes"),
        ({"layers": [{**BLOB.tree(), "digest": "md5:00"}]}, "layer 1: the digest 'md5:00' is not sha256"),
        ({"layers": [{**BLOB.tree(), "digest": "../../etc"}]}, "layer 1: '../../etc' is not a digest"),
        ({"config": None}, "its configuration is not a JSON object"),
        ({"annotations": {"a": 1}}, "its annotations are not a table of strings"),
    ],
)
def test_malformed_manifests(changes: dict[str, Any], message: str) -> None:
    tree = json.loads(IMAGE.to_bytes()) | changes
    with pytest.raises(InputError) as caught:
        parse(json.dumps(tree).encode(), what="a:1")
    assert str(caught.value).startswith("a:1: ")
    assert message in str(caught.value)


def test_what_was_announced_must_come() -> None:
    with pytest.raises(InputError, match=r"m: it says that it is .*index.* announced as .*manifest"):
        parse(LIST.to_bytes(), what="m", media_type=MANIFEST)


def test_unknown_layers_and_artifacts_are_no_images() -> None:
    odd = Manifest(IMAGE.config, (BLOB, Descriptor("application/x-odd", BLOB.digest, 1)))
    with pytest.raises(InputError, match="a:1: layer 2 has the unknown media type application/x-odd"):
        odd.compressions(what="a:1")
    with pytest.raises(InputError, match="a:1 is not an image but an artifact: its configuration is text/x"):
        Manifest(Descriptor("text/x", BLOB.digest, 1), ()).compressions(what="a:1")
    assert IMAGE.compressions(what="a:1") == ("gzip", "gzip")


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value below `tree`."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in list(items) for place in [(tree, key), *_places(value)]]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(
    which=st.sampled_from(["manifest", "index", "config"]), where=st.integers(0, 200), value=JSON, drop=st.booleans()
)
def test_a_changed_document_is_read_or_refused(which: str, where: int, value: Any, drop: bool) -> None:
    tree = json.loads({"manifest": IMAGE.to_bytes(), "index": LIST.to_bytes()}.get(which) or json.dumps(CONFIGURATION))
    places = _places(tree)
    holder, key = places[where % len(places)]
    if drop:
        del holder[key]
    else:
        holder[key] = value
    _read_or_refused(which, json.dumps(tree).encode())


@settings(max_examples=200, deadline=None)
@given(which=st.sampled_from(["manifest", "config"]), data=st.binary(max_size=200))
def test_any_bytes_are_refused(which: str, data: bytes) -> None:
    _read_or_refused(which, data)


def _read_or_refused(which: str, data: bytes) -> None:
    refusal = _refusal(which, data)
    assert refusal is None or (refusal.startswith("w") and len(refusal) < 1000)


def _refusal(which: str, data: bytes) -> str | None:
    try:
        if which == "config":
            ImageConfig.from_bytes(data, what="w")
            return None
        found = parse(data, what="w")
        again = parse(found.to_bytes(), what="w")
        if isinstance(found, Manifest):
            found.compressions(what="w")
        else:
            choose(found, Platform("linux", "amd64"), what="w")
    except InputError as error:
        return str(error)
    assert again == found
    return None

"""The image that a run's lock pins: what it says of itself, and what a recipe says of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from apertus_nemo.audit.relaunch import differences
from apertus_nemo.errors import InputError
from apertus_nemo.recipe.schema import ImageConfig
from apertus_nemo.record.canonical import sha256_hex
from apertus_nemo.record.image import NO_IMAGE, find_image, pinned
from apertus_nemo.record.lock import RunLock, build_lock
from tests.unit.record import example

PREFIX = "/opt/apertus-nemo"
DIGEST, OTHER = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"
REFERENCE = f"registry.example/apertus/cpu@{DIGEST}"


def papers(folder: Path, *, manifest: str | None = None) -> Path:
    """What an image of ours holds of itself."""
    folder.mkdir(exist_ok=True)
    (folder / "image.toml").write_text(f'family = "cpu"\n[python]\nprefix = "{PREFIX}"\n')
    (folder / "lock.json").write_text(json.dumps({"family": "cpu", "version": "1.2.3"}))
    if manifest is not None:
        (folder / "manifest-digest").write_text(f"{manifest}\n")
    return folder


def test_an_image_says_what_it_is(tmp_path: Path) -> None:
    found = find_image(papers(tmp_path, manifest=DIGEST), prefix=PREFIX)
    assert found == {
        "lock_digest": f"sha256:{sha256_hex((tmp_path / 'lock.json').read_bytes())}",
        "manifest_digest": DIGEST,
        "name": "cpu-1.2.3",
        "stated_by": "the image",
    }
    assert pinned(found, None) == found
    assert pinned(found, REFERENCE) == found


def test_an_image_that_no_pull_has_made_a_file_of(tmp_path: Path) -> None:
    found = find_image(papers(tmp_path), prefix=PREFIX)
    assert found is not None
    reason = "the image does not hold it; image.reference=HOST/NAME@sha256:... in the recipe says it"
    assert (found["manifest_digest"], found["stated_by"]) == ({"unknown": reason}, None)
    said = pinned(found, REFERENCE)
    assert (said["manifest_digest"], said["stated_by"]) == (DIGEST, "image.reference of the recipe")


def test_a_host_and_another_python_are_no_image(tmp_path: Path) -> None:
    assert find_image(tmp_path, prefix=PREFIX) is None
    assert find_image(papers(tmp_path), prefix="/usr") is None
    assert pinned(None, None) == {"unknown": NO_IMAGE}


@pytest.mark.parametrize(
    ("own", "reference", "message"),
    [
        (DIGEST, "registry.example/cpu:1", "image.reference registry.example/cpu:1 has no digest: write HOST/NAME@"),
        (OTHER, REFERENCE, f"image.reference names the image {REFERENCE}, and this is run inside {OTHER}$"),
        (None, REFERENCE, f"image.reference names the image {REFERENCE}, but this is not run inside an image of ape"),
    ],
)
def test_a_recipe_that_names_another(tmp_path: Path, own: str | None, reference: str, message: str) -> None:
    found = None if own is None else find_image(papers(tmp_path, manifest=own), prefix=PREFIX)
    with pytest.raises(InputError, match=message):
        pinned(found, reference)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("image.toml", "[", "image.toml: is not TOML: "),
        ("lock.json", "[]", "lock.json: is not the lock of an image$"),
        ("manifest-digest", "latest", "manifest-digest: is not the digest of a manifest$"),
    ],
)
def test_files_of_an_image_that_cannot_be_read(tmp_path: Path, name: str, content: str, message: str) -> None:
    (papers(tmp_path) / name).write_text(content)
    with pytest.raises(InputError, match=message):
        find_image(tmp_path, prefix=PREFIX)


def lock(folder: Path, *, manifest: str | None, reference: str | None = None) -> RunLock:
    """Of the example, run inside an image."""
    found = find_image(papers(folder, manifest=manifest), prefix=PREFIX)
    return build_lock(
        replace(example.config(), image=ImageConfig(reference)),
        overrides=[],
        environment={},
        data=example.DATA,
        surroundings=replace(example.SURROUNDINGS, image=found),
    )


def test_a_lock_pins_the_image_and_a_relaunch_compares_it(tmp_path: Path) -> None:
    one, other = lock(tmp_path / "a", manifest=DIGEST), lock(tmp_path / "b", manifest=OTHER)
    assert one.tree["image"]["manifest_digest"] == DIGEST
    assert RunLock.from_bytes(one.to_bytes(), what="lock").digest == one.digest
    assert [(item.field, item.locked, item.found) for item in differences(one, other)] == [
        ("image.manifest_digest", DIGEST, OTHER)
    ]
    on_host = [item.field for item in differences(one, example.lock())]
    assert "image" in on_host


def test_a_lock_with_what_the_recipe_says(tmp_path: Path) -> None:
    found = lock(tmp_path / "a", manifest=None, reference=REFERENCE).tree
    assert found["image"]["stated_by"] == "image.reference of the recipe"
    assert found["config"]["image"]["reference"] == REFERENCE

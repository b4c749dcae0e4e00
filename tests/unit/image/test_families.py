"""Names of images, and what the files of `containers/` say of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apertus_nemo.errors import InputError
from apertus_nemo.image import families

DIGEST = "sha256:" + "0" * 63 + "1"
RELEASE = {"config_digest": DIGEST, "lock_digest": DIGEST, "manifest_digest": DIGEST, "reference": "127.0.0.1:5/a:b"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of families with one, at version 1.1.0, whose 1.0.0 was published."""
    here = tmp_path / "containers" / "tiny"
    here.mkdir(parents=True)
    (here / families.DEFINITION).write_text('version = "1.1.0"\n')
    (here / families.RELEASES).write_text(json.dumps({"1.0.0": {"linux/arm64": RELEASE}}))
    return here.parent


def test_the_families_that_come_with_the_package_are_unbuilt() -> None:
    assert families.family_names() == ["cpu", "gh200"]
    for name in ("cpu-1.0.0", "gh200-1.0.0"):
        found = families.find(name)
        assert (found.name, found.state, dict(found.releases)) == (name, "unbuilt", {})
    assert families.find("gh200").file_name == "gh200-1-0-0"


def test_a_published_version_has_digests(folder: Path) -> None:
    old, new = families.versions("tiny", folder)
    assert (old.name, old.state, old.releases["linux/arm64"].manifest_digest) == ("tiny-1.0.0", "published", DIGEST)
    assert (new.name, new.state) == ("tiny-1.1.0", "unbuilt")
    assert families.find("tiny-1.0.0", folder) == old
    assert families.find("tiny", folder) == new


@pytest.mark.parametrize(
    "name", ["", "gh200-", "gh200-1.0", "GH200-1.0.0", "gh200-01.0.0", "../cpu-1.0.0", "a-1.0.0+b"]
)
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(
        InputError, match=r"is not the name of an image: write a family and a version, as in gh200-1.0.0"
    ):
        families.parse_name(name)


def test_a_pre_release_is_a_version() -> None:
    assert families.parse_name("gh200-1.0.0-rc.1") == ("gh200", "1.0.0-rc.1")


def test_unknown_families_and_versions_are_named_with_what_there_is(folder: Path) -> None:
    with pytest.raises(InputError, match=r"^there is no family of images 'rocm'; there are cpu, gh200$"):
        families.find("rocm")
    with pytest.raises(InputError, match=r"^tiny has no version 2.0.0; there are tiny-1.0.0, tiny-1.1.0$"):
        families.find("tiny-2.0.0", folder)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"1.0": {}}',
        '{"1.0.0": {}}',
        '{"1.0.0": {"windows/amd64": {}}}',
        '{"1.0.0": {"linux/arm64": {"manifest_digest": "sha256:0"}}}',
        json.dumps({"1.0.0": {"linux/arm64": {**RELEASE, "lock_digest": "latest"}}}),
        "{",
    ],
)
def test_malformed_releases_are_refused(folder: Path, text: str) -> None:
    (folder / "tiny" / families.RELEASES).write_text(text)
    with pytest.raises(InputError, match=families.RELEASES):
        families.find("tiny", folder)

"""Bills of materials: valid by CycloneDX's own schema, complete, and the same bytes each time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apertus_nemo.image.definition import read_definition
from apertus_nemo.image.families import containers_folder
from apertus_nemo.image.lock import read_lock
from apertus_nemo.image.sbom import bill_of_materials
from apertus_nemo.image.wheel import OwnWheel

WHEEL = OwnWheel(Path("apertus_nemo-0.1.0-py3-none-any.whl"), "0.1.0", "1" * 64, None)


def made(platform: str) -> bytes:
    folder = containers_folder() / "cpu"
    lock, definition = read_lock(folder / "lock.json"), read_definition(folder / "image.toml")
    return bill_of_materials(lock, platform, WHEEL, definition)


@pytest.mark.parametrize("platform", ["linux/amd64", "linux/arm64"])
def test_it_is_valid(platform: str) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(made(platform).decode()) is None


def test_it_lists_every_package_with_version_hash_and_url() -> None:
    lock = read_lock(containers_folder() / "cpu" / "lock.json")
    bill = json.loads(made("linux/amd64"))
    listed = {one["purl"]: (one["name"], one["version"], one["hashes"][0]["content"]) for one in bill["components"]}
    packages = [*lock.debian("linux/amd64"), *lock.python("linux/amd64")]
    assert sorted(listed.values()) == sorted(
        [("apertus-nemo", "0.1.0", "1" * 64), *((one.name, one.version, one.sha256) for one in packages)]
    )
    assert "pkg:deb/debian/bash@5.2.15-2%2Bb13?arch=amd64&distro=debian-bookworm" in listed
    assert "pkg:pypi/megatron-core@0.15.3" in listed
    (root,) = [one for one in bill["dependencies"] if one["ref"] == bill["metadata"]["component"]["bom-ref"]]
    assert sorted(root["dependsOn"]) == sorted(listed)


def test_the_same_packages_give_the_same_bytes() -> None:
    assert made("linux/amd64") == made("linux/amd64")
    assert json.loads(made("linux/amd64"))["metadata"]["timestamp"] == "2026-11-25T00:00:00+00:00"
    assert json.loads(made("linux/amd64"))["serialNumber"] != json.loads(made("linux/arm64"))["serialNumber"]

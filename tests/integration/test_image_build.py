"""The whole cpu image: twice the same digest, read by other tools, published, pulled and made into a squashfs file."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from apertus_nemo.image.layout import Layout
from apertus_nemo.image.oci import Platform
from apertus_nemo.image.publish import built
from tests.integration import images

pytestmark = [pytest.mark.full, pytest.mark.timeout(2 * images.LIMIT_S)]


def test_built_again_from_nothing_it_has_the_same_digest(
    built_cpu_image: Path, image_checkout: Path, tmp_path: Path
) -> None:
    """Another umask, time zone, language, user name, folder and processor; no layer of the cache."""
    circumstances = {"TZ": "Asia/Tokyo", "LC_ALL": "C", "LANG": "C", "USER": "somebody", "LOGNAME": "somebody"}
    before = ["taskset", "-c", "0", "sh", "-c", 'umask 0077; exec "$@"', "sh"]
    again = images.build(image_checkout, tmp_path / "again", "cpu", "--no-cache", before=before, **circumstances)
    image = Layout.open(built_cpu_image).image(Platform.parse(images.PLATFORM), "cpu-1.0.0")
    assert again["platforms"][images.PLATFORM]["manifest_digest"] == image.descriptor.digest
    assert [layer["kept"] for layer in again["platforms"][images.PLATFORM]["layers"]] == [False] * 4


def test_it_can_be_published_as_it_is(built_cpu_image: Path) -> None:
    _, papers = built(Layout.open(built_cpu_image))
    assert list(papers) == [images.PLATFORM]
    bill = json.loads(papers[images.PLATFORM].sbom)
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")


def test_skopeo_reads_it(built_cpu_image: Path) -> None:
    name = f"oci:{built_cpu_image}:cpu-1.0.0-{images.PLATFORM.rpartition('/')[2]}"
    done = subprocess.run(["skopeo", "inspect", name], check=True, capture_output=True, timeout=120)
    image = Layout.open(built_cpu_image).image(Platform.parse(images.PLATFORM), "cpu-1.0.0")
    assert json.loads(done.stdout)["Digest"] == image.descriptor.digest

"""The whole cpu image: twice the same digest, read by other tools, published, pulled and made into a squashfs file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from apertus_nemo.image.layout import Layout
from apertus_nemo.image.oci import Platform
from apertus_nemo.image.publish import built
from tests.integration import images
from tests.unit.image.servers import docker_registry
from tests.unit.image.tools import needs

pytestmark = [pytest.mark.full, pytest.mark.timeout(2 * images.LIMIT_S)]


def test_built_again_from_nothing_it_has_the_same_digest(
    built_cpu_image: Path, image_checkout: Path, tmp_path: Path
) -> None:
    """Another umask, time zone, language, user name and folder; no layer of the cache."""
    circumstances = {"TZ": "Asia/Tokyo", "LC_ALL": "C", "LANG": "C", "USER": "somebody", "LOGNAME": "somebody"}
    before = ["sh", "-c", 'umask 0077; exec "$@"', "sh"]
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


def test_published_pulled_and_made_into_a_squashfs_file(built_cpu_image: Path, tmp_path: Path) -> None:
    needs("docker-registry", "mksquashfs")
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "PYTHONPATH": str(images.ROOT)}

    def command(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", images.RUN, "image", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    image = Layout.open(built_cpu_image).image(Platform.parse(images.PLATFORM), "cpu-1.0.0")
    (tmp_path / "releases").mkdir()
    with docker_registry(tmp_path / "registry") as host:
        command("publish", str(built_cpu_image), f"{host}/apertus/cpu", "--releases", str(tmp_path / "releases"))
        pulled = json.loads(
            command("pull", f"{host}/apertus/cpu:1.0.0", "--output", str(tmp_path / "pulled"), "--json")
        )
    releases = json.loads((tmp_path / "releases" / "releases.json").read_text())
    assert releases["1.0.0"][images.PLATFORM]["manifest_digest"] == image.descriptor.digest
    assert pulled["manifest_digest"] == image.descriptor.digest
    assert {one["artifact_type"] for one in pulled["referrers"]} == {
        "application/vnd.apertus-nemo.image.lock.v1+json",
        "application/vnd.cyclonedx+json",
    }
    listed = subprocess.run(
        ["unsquashfs", "-l", pulled["file"]], check=True, capture_output=True, text=True, timeout=120
    )
    assert "squashfs-root/opt/apertus-nemo/bin/apertus-nemo\n" in listed.stdout

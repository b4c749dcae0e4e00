"""The whole cpu image at work: its self-test, and runs inside it that are the same twice and pin it in their locks."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.audit.compare import compare
from apertus_nemo.audit.relaunch import Record, differences, here
from apertus_nemo.cli.main import main
from apertus_nemo.image.inside import opened
from apertus_nemo.image.layout import Image, Layout
from apertus_nemo.image.oci import CONFIG, LAYER, MANIFEST, Manifest, Platform
from apertus_nemo.image.sqsh import describe, hashes, write_sidecar
from apertus_nemo.image.squashfs import find_tool, make_squashfs
from apertus_nemo.record.lock import look
from apertus_nemo.record.step_log import read_steps
from tests.integration.runs import SQUEEZED
from tests.unit.image.images import entry, tar
from tests.unit.image.tools import needs

LIMIT_S = 900
pytestmark = [pytest.mark.full, pytest.mark.timeout(2 * LIMIT_S)]

PREFIX = "/opt/apertus-nemo"
ENVIRONMENT = {"PATH": f"{PREFIX}/bin:/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}


@dataclass(frozen=True)
class Built:
    """The image, and the squashfs file that a pull would make of it."""

    image: Image
    path: Path


@pytest.fixture(scope="module")
def built(built_cpu_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return squashfs(built_cpu_image, tmp_path_factory.mktemp("squashfs"))


def squashfs(layout: Path, folder: Path, name: str | None = "cpu-1.0.0") -> Built:
    """With its sidecar."""
    found = Layout.open(layout)
    image = found.image(Platform.of_machine(os.uname().machine), name)
    path = folder / "cpu.sqsh"
    made = make_squashfs(found.blobs, image, path, tool=find_tool(os.environ))
    write_sidecar(path, describe(hashes(path), image, made, contents="enroot", reference="registry.example/cpu:1.0.0"))
    return Built(image, path)


def verified(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """Exit code of `image verify`, and name -> (state, reason) of its checks."""
    code = main(["image", "verify", "--json", "--time-limit", str(LIMIT_S), *arguments])
    tree = json.loads(capsys.readouterr().out)
    return code, {check["name"]: (check["state"], check["reason"]) for check in tree["checks"]}


def test_its_self_test_passes(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    code, checks = verified(capsys, str(built.path))
    assert code == 0, checks
    must = ("file", "python", "python packages", "python files", "debian packages", "imports", "training step")
    assert [checks[name][0] for name in (*must, "all-reduce gloo")] == ["ok"] * 8


def with_another_numpy(layout: Path, folder: Path) -> Path:
    """The same image with one package changed, as a layer on top."""
    found = Layout.create(folder)
    ours = Layout.open(layout)
    image = ours.image(Platform.of_machine(os.uname().machine), "cpu-1.0.0")
    for descriptor in (*image.manifest.layers, image.manifest.config):
        os.link(ours.blobs.path(descriptor.digest), found.blobs.path(descriptor.digest))
    site = f"opt/apertus-nemo/lib/python{image_python(image)}/site-packages"
    changed = tar(
        [
            entry(f"{site}/.wh.numpy-1.26.4.dist-info", b""),
            entry(f"{site}/numpy-1.26.3.dist-info"),
            entry(f"{site}/numpy-1.26.3.dist-info/RECORD", b""),
        ]
    )
    layer = found.blobs.write(changed, LAYER)
    config = json.loads(found.fetch(image.manifest.config, 2**20))
    config["rootfs"]["diff_ids"].append(f"sha256:{hashlib.sha256(changed).hexdigest()}")
    manifest = Manifest(found.blobs.write(json.dumps(config).encode(), CONFIG), (*image.manifest.layers, layer))
    found.tag(found.blobs.write(manifest.to_bytes(), MANIFEST), "changed")
    return folder


def image_python(image: Image) -> str:
    """The Python of the cpu image."""
    assert image.config.labels["ai.apertus.image.family"] == "cpu"
    return "3.11"


def test_one_package_changed_is_named(
    built_cpu_image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = with_another_numpy(built_cpu_image, tmp_path / "layout")
    code, checks = verified(capsys, "--only", "packages", str(layout))
    assert code == 1
    assert checks["python packages"] == ("failed", "numpy is 1.26.3, the lock says 1.26.4")
    assert checks["lock"][0] == "ok"


def script(*runs: str) -> str:
    """Train the tiny recipe in /tmp/RUN for each, do the last one again from its record, and print all but weights."""
    train = f"apertus-nemo train --quiet {shlex.join(SQUEEZED)} --run-dir /tmp"
    steps = [f"{train}/{run} >&2" for run in runs]
    steps += [f"apertus-nemo relaunch --quiet /tmp/{runs[-1]} --run-dir /tmp/again >&2"]
    return " && ".join([*steps, f"tar -C /tmp --exclude=checkpoints -c {' '.join(runs)} again"])


def unpacked(data: bytes, folder: Path) -> Path:
    """What a script has printed."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def runs(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs inside the image, and a relaunch of the second there."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "work").mkdir()
    with opened(built.path, work=folder / "work") as root:
        done = root.run(["/bin/sh", "-c", script("first", "second")], environment=ENVIRONMENT, limit_s=LIMIT_S)
    assert done.code == 0, done.errors.decode(errors="replace")[-2000:]
    assert b"identical" in done.errors
    return unpacked(done.output, folder)


def test_two_runs_inside_it_are_one(runs: Path) -> None:
    logs = [list(read_steps(runs / name / "steps")) for name in ("first", "second", "again")]
    assert len(logs[0]) == 13
    assert logs[0] == logs[1] == logs[2]
    assert (runs / "first/lock.json").read_bytes() == (runs / "second/lock.json").read_bytes()
    assert (runs / "again/lock.json").read_bytes() == (runs / "second/lock.json").read_bytes()
    assert compare(runs / "first", runs / "second").exit_code == 0


def test_their_lock_pins_the_image(built: Built, runs: Path) -> None:
    tree = json.loads((runs / "first/lock.json").read_bytes())
    assert tree["image"] == {
        "lock_digest": built.image.config.labels["ai.apertus.image.lock"],
        "manifest_digest": built.image.descriptor.digest,
        "name": "cpu-1.0.0",
        "stated_by": "the image",
    }
    assert tree["source"]["commit"] == built.image.config.labels["org.opencontainers.image.revision"]
    assert tree["source"]["dirty"] is False


def test_this_machine_is_not_that_image(runs: Path) -> None:
    """A relaunch on the host names the image among what is not as it was."""
    record = Record.read(runs / "first")
    lock = here(record, surroundings=look(), data=None, shell=os.environ)
    fields = [item.field for item in differences(record.lock, lock)]
    assert "image" in fields


@pytest.fixture
def mounted(built: Built, tmp_path: Path) -> Iterator[Path]:
    """The image's root, as the kernel mounts it."""
    needs("podman", "runc")
    if os.geteuid() != 0:
        pytest.skip("only root mounts")
    folder = tmp_path / "root"
    folder.mkdir()
    subprocess.run(["mount", "-t", "squashfs", "-o", "loop,ro", built.path, folder], check=True, timeout=60)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True, timeout=60)


def podman(folder: Path) -> dict[str, str]:
    """The environment of a podman that keeps everything in `folder`, and asks for no more than a container may."""
    (folder / "containers.conf").write_text(
        '[containers]\ndefault_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]\n'
        '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\n'
    )
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/graph"\nrunroot = "{folder}/run"\n'
    )
    return {
        **os.environ,
        "CONTAINERS_CONF": str(folder / "containers.conf"),
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
    }


def test_an_engine_gives_the_same_run(mounted: Path, runs: Path, tmp_path: Path) -> None:
    """podman with runc starts the same root, without a network, and the step log is the same."""
    command = ["podman", "run", "--rm", "--network", "none", "--no-hosts", "--read-only", "--tmpfs", "/tmp"]
    command += [word for name, text in ENVIRONMENT.items() for word in ("--env", f"{name}={text}")]
    command += ["--rootfs", f"{mounted}:O", "/bin/sh", "-c", script("third")]
    try:
        done = subprocess.run(command, env=podman(tmp_path), capture_output=True, timeout=LIMIT_S)
    finally:
        shutil.rmtree(tmp_path / "graph", ignore_errors=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    unpacked(done.stdout, tmp_path / "out")
    third: Any = list(read_steps(tmp_path / "out/third/steps"))
    assert third == list(read_steps(runs / "first/steps"))
    assert (tmp_path / "out/third/lock.json").read_bytes() == (runs / "first/lock.json").read_bytes()

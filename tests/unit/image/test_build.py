"""Small images, built for real: one digest under other circumstances, what a change costs, what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from apertus_nemo.image.layout import Layout
from apertus_nemo.image.oci import Platform
from apertus_nemo.image.publish import built
from tests.crash.small_disk import small_disk
from tests.unit.image.small import PLATFORM, Small, needs_all, sha256
from tests.unit.image.tools import needs

EPOCH = 1795564800  # 2026-11-25
_CONFIGURATION = {"CONF": "containers.conf", "STORAGE_CONF": "storage.conf"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    needs_all()
    return Small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def first(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first build; its layers are in the cache then."""
    output = tmp_path_factory.mktemp("first") / "image"
    result = small.build(output)
    assert [part["what"] for part in result["platforms"][PLATFORM]["layers"]] == ["base", "torch", "python", "package"]
    return output


def digests(layout: Path) -> list[str]:
    """Of the manifest, and of each layer."""
    image = Layout.open(layout).image(Platform.parse(PLATFORM), "small-0.1.0")
    return [image.descriptor.digest, *(layer.digest for layer in image.manifest.layers)]


def test_one_digest_whoever_builds_where_and_when(small: Small, first: Path, tmp_path: Path) -> None:
    """Another umask, time zone, language, user, folder and processor, another builder's storage, and a later clock."""
    circumstances = {"TZ": "Asia/Tokyo", "LC_ALL": "C", "LANG": "C", "USER": "somebody", "HOME": str(tmp_path)}
    before = ["taskset", "-c", "0", "sh", "-c", 'umask 0077; exec "$@"', "sh"]
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    again = small.build(tmp_path / "elsewhere/again", "--no-cache", before=before, **circumstances)
    assert [part["kept"] for part in again["platforms"][PLATFORM]["layers"]] == [False] * 4
    assert digests(tmp_path / "elsewhere/again") == digests(first)
    assert (tmp_path / "elsewhere/again/index.json").read_bytes() == (first / "index.json").read_bytes()


def test_a_change_of_ours_is_one_small_layer(small: Small, first: Path, tmp_path: Path) -> None:
    module = small.root / "apertus_nemo" / "__init__.py"
    text = module.read_text()
    try:
        module.write_text(f"{text}# changed\n")
        refused = small.run(tmp_path / "refused")
        assert refused.returncode == 2
        assert refused.stderr == (
            f"apertus-nemo: {small.root} has changes that are not committed (apertus_nemo/__init__.py): commit them, "
            "or build with --allow-dirty, an image that cannot be published\n"
        )
        assert not (tmp_path / "refused").exists()
        changed = small.build(tmp_path / "changed", "--allow-dirty")
    finally:
        module.write_text(text)
    parts = changed["platforms"][PLATFORM]["layers"]
    assert [part["kept"] for part in parts] == [True, True, True, False]
    old, new = digests(first), digests(tmp_path / "changed")
    assert old[1:4] == new[1:4]
    assert old[4] != new[4]
    assert changed["commit"] is None


def test_what_is_in_it(first: Path) -> None:
    layout = Layout.open(first)
    _, papers = built(layout)
    bill = json.loads(papers[PLATFORM].sbom)
    assert {(one["name"], one["version"]) for one in bill["components"]} >= {("small-python", "1.0"), ("thing", "1.0")}
    image = papers[PLATFORM].image
    assert image.config.command == ("apertus-nemo", "--help")
    assert dict(one.split("=", 1) for one in image.config.environment) == {
        "LANG": "C.UTF-8",
        "PATH": "/opt/apertus-nemo/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    }
    found: dict[str, tarfile.TarInfo] = {}
    for layer in image.manifest.layers:
        with tarfile.open(layout.blobs.path(layer.digest)) as tar:
            for member in tar:
                found[member.name] = member
                if member.name.endswith(".pyc") and "/opt/" in f"/{member.name}":
                    stream = tar.extractfile(member)
                    assert stream is not None
                    assert stream.read(8)[4] == 3, f"{member.name}: not checked by the hash of its source"  # PEP 552
    assert {member.mtime for member in found.values()} == {EPOCH}
    assert {member.uid for member in found.values()} == {0}
    assert found["opt/apertus-nemo/bin/apertus-nemo"].mode & 0o777 == 0o755
    assert found["etc/apertus-nemo/lock.json"].mode & 0o777 == 0o644
    assert "opt/apertus-nemo/lib/python3.11/site-packages/thing.py" in found
    for name in ("etc/machine-id", "var/cache/ldconfig/aux-cache", "root/.cache", "package"):
        assert name not in found
    for name in ("etc/hostname", "etc/hosts", "etc/resolv.conf"):
        assert name not in found or found[name].size == 0
    assert [name for name in found if name.startswith(("tmp/", "run/", "var/log/"))] == []


def test_other_tools_read_it(first: Path, tmp_path: Path) -> None:
    needs("skopeo", "umoci")
    name = f"{first}:small-0.1.0-{PLATFORM.rpartition('/')[2]}"
    done = subprocess.run(["skopeo", "inspect", f"oci:{name}"], check=True, capture_output=True, timeout=60)
    assert json.loads(done.stdout)["Digest"] == digests(first)[0]
    subprocess.run(["umoci", "unpack", "--image", name, tmp_path / "u"], check=True, capture_output=True, timeout=120)
    command = ["/usr/sbin/chroot", tmp_path / "u/rootfs", "/opt/apertus-nemo/bin/apertus-nemo", "--version"]
    done = subprocess.run(command, check=True, capture_output=True, timeout=60, env={"PATH": "/bin"})
    assert done.stdout.startswith(b"apertus-nemo ")


def test_podman_runs_it(first: Path, tmp_path: Path) -> None:
    needs("podman", "runc")
    (tmp_path / "containers.conf").write_text(
        '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=32768:32768"]\nnetns = "host"\n'
        '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\n'
    )
    (tmp_path / "storage.conf").write_text(
        f'[storage]\ndriver = "vfs"\ngraphroot = "{tmp_path}/storage"\nrunroot = "{tmp_path}/run"\n'
    )
    where = {f"CONTAINERS_{name}": str(tmp_path / file) for name, file in _CONFIGURATION.items()}
    name = f"oci:{first}:small-0.1.0-{PLATFORM.rpartition('/')[2]}"
    command = ["podman", "run", "--rm", "--network", "none", name]
    done = subprocess.run(
        command, env={**os.environ, **where}, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: apertus-nemo VERB ")


@pytest.mark.full
def test_two_at_once(small: Small, first: Path, tmp_path: Path) -> None:
    running = [
        subprocess.Popen(
            small.command("--output", str(tmp_path / name)),
            cwd=tmp_path,
            env=small.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for name in ("a", "b")
    ]
    for process in running:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
    assert digests(tmp_path / "a") == digests(tmp_path / "b") == digests(first)


@pytest.mark.full
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_build_leaves_nothing_half(small: Small, first: Path, tmp_path: Path, kind: int) -> None:
    command = small.command("--output", str(tmp_path / "image"), "--no-cache")
    with open(tmp_path / "said", "wb") as said:
        process = subprocess.Popen(command, cwd=tmp_path, env=small.environment(), stderr=said, stdout=said)
        while b"Python packages, as two layers" not in (tmp_path / "said").read_bytes():
            assert process.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.02)
        time.sleep(0.5)
        process.send_signal(kind)
        process.wait(timeout=60)
    assert process.returncode in (128 + kind, -kind), (tmp_path / "said").read_text()
    assert not (tmp_path / "image").exists()
    if kind == signal.SIGKILL:  # the next build sweeps up
        small.build(tmp_path / "image")
    assert [name for name in os.listdir(small.cache) if name.startswith(".build-")] == []
    assert [name for name in os.listdir(tmp_path) if name not in ("said", "image")] == []
    assert str(small.cache) not in Path("/proc/self/mountinfo").read_text()


def test_what_a_mirror_does_not_have_is_named(small: Small, first: Path, tmp_path: Path) -> None:
    deb = small.cache / "debian" / f"{small.debs[0].sha256}.deb"
    kept = deb.read_bytes()
    deb.write_bytes(kept[:-1])  # damaged: it is fetched again
    try:
        done = small.run(tmp_path / "image", "--debian-mirror", tmp_path.as_uri())
    finally:
        deb.write_bytes(kept)
    assert done.returncode == 3
    assert done.stderr == (
        f"apertus-nemo: small-python=1.0 ({PLATFORM.rpartition('/')[2]}): the mirror no longer offers it; take the "
        "published image, which stays as it is, or resolve anew with `image lock`\n"
    )
    assert os.listdir(tmp_path) == []


def test_a_lock_that_does_not_fit_is_refused(small: Small, tmp_path: Path) -> None:
    file = small.family / "lock.json"
    kept = file.read_text()
    tree = json.loads(kept)
    try:
        file.write_text(json.dumps({**tree, "definition_digest": f"sha256:{'0' * 64}"}))
        stale = small.run(tmp_path / "image")
        file.write_text(json.dumps({**tree, "base": {**tree["base"], "release": {"unknown": "nobody was asked"}}}))
        unresolved = small.run(tmp_path / "image")
    finally:
        file.write_text(kept)
    assert (stale.returncode, unresolved.returncode) == (2, 2)
    again = "run `apertus-nemo image lock small`"
    assert stale.stderr == f"apertus-nemo: {file} is stale: the definition has changed since; {again}\n"
    assert unresolved.stderr == f"apertus-nemo: {file} is not resolved: base.release: nobody was asked; {again}\n"


def test_what_a_program_said_is_kept_where_it_failed(small: Small, first: Path, tmp_path: Path) -> None:
    thing = next(one for one in small.python if one.name == "thing")
    lock, data = (small.family / "lock.json").read_bytes(), b"no archive"
    file = small.cache / "python" / sha256(data) / thing.file
    file.parent.mkdir()
    file.write_bytes(data)
    try:
        small.write_lock(small.debs, [*small.python[:1], replace(thing, sha256=sha256(data))])
        done = small.run(tmp_path / "image", "--allow-dirty")
    finally:
        (small.family / "lock.json").write_bytes(lock)
    assert done.returncode == 3
    (said,) = done.stderr.splitlines()
    assert said.startswith(f"apertus-nemo: building stack for {PLATFORM}: buildah ended with ")
    log = Path(said.rpartition("; all of it is in ")[2])
    assert log.parent == small.cache / "logs"
    assert "thing-1.0-py3-none-any.whl" in log.read_text()
    assert os.listdir(tmp_path) == []


def test_what_is_there_stays(small: Small, first: Path) -> None:
    done = small.run(first)
    assert done.returncode == 2
    assert done.stderr == f"apertus-nemo: {first} is there already: remove it, or give another folder with --output\n"


def test_a_platform_that_it_is_not_for(small: Small, tmp_path: Path) -> None:
    done = small.run(tmp_path / "image", "--platform", "linux/riscv64")
    assert done.returncode == 2
    assert done.stderr == f"apertus-nemo: small-0.1.0 is not for linux/riscv64; it is for {PLATFORM}\n"


def test_a_disk_that_is_full_while_packages_come(small: Small, first: Path, tmp_path: Path) -> None:
    deb = small.debs[0]
    mirror = tmp_path / "mirror" / deb.file
    mirror.parent.mkdir(parents=True)
    shutil.copyfile(small.cache / "debian" / f"{deb.sha256}.deb", mirror)
    with small_disk(tmp_path / "disk", size_bytes=2**24) as disk:
        options = ["--cache", str(disk.mount_point), "--debian-mirror", (tmp_path / "mirror").as_uri()]
        done = small.run(tmp_path / "image", *options, before=disk.inside)
        kept = disk.mount_point / "debian" / f"{deb.sha256}.deb"
        assert done.returncode == 3
        assert done.stderr == (
            f"apertus-nemo: could not write {kept}: the disk is full; free some space, then run the command again\n"
        )
        assert [path for path in disk.folder.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "image").exists()


def test_a_disk_that_is_too_small_is_said_before_anything_is_made(small: Small, first: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size_bytes=2**28) as disk:
        for part in ("debian", "python"):
            shutil.copytree(small.cache / part, disk.folder / part)
        done = small.run(tmp_path / "image", "--cache", str(disk.mount_point), before=disk.inside)
        assert done.returncode == 3
        said = (
            rf"building small-0.1.0 for {PLATFORM} wants \d\.\d GiB below {disk.mount_point}, where 0\.\d GiB are free"
        )
        again = "free some space, or give another folder with --cache"
        assert re.fullmatch(f"apertus-nemo: {said}: {again}\n", done.stderr), done.stderr
    assert not (tmp_path / "image").exists()

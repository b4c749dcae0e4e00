"""`image lock` from end to end: mirror, index and registry are the test's, apt and uv the real ones."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from apertus_nemo.cli.main import main
from apertus_nemo.errors import UnfitEnvironment
from apertus_nemo.image import checkout, debian
from apertus_nemo.image.definition import read_definition
from apertus_nemo.image.families import containers_folder
from apertus_nemo.image.lock import read_lock
from apertus_nemo.image.oci import INDEX, Descriptor, Index, Platform
from apertus_nemo.image.reference import Reference
from apertus_nemo.image.registry import Repository
from tests.unit.image.images import add_image, entry, layout_with, tar
from tests.unit.image.servers import free_port
from tests.unit.image.test_debian import make_deb
from tests.unit.image.tools import needs

ARM = Platform("linux", "arm64")
# name -> {version: tag of its wheel}
WHEELS = {
    "pip": {"1.0": "py3-none-any"},
    "common": {"1.0": "py3-none-any"},
    "binary": {"1.0": "cp312-cp312-manylinux_2_28_aarch64", "2.0": "cp312-cp312-manylinux_2_28_x86_64"},
    "numpy": {"1.26.4": "py3-none-any"},
}


def make_wheel(folder: Path, name: str, version: str, tag: str) -> str:
    """A wheel of nothing; its SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        about = f"{name}-{version}.dist-info"
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{about}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """(address of an index of Python packages, name==version -> SHA-256)."""
    root = tmp_path_factory.mktemp("index")
    hashes = {}
    for name, versions in WHEELS.items():
        links = ""
        for version, tag in versions.items():
            found = hashes[f"{name}=={version}"] = make_wheel(root / name, name, version, tag)
            file = f"{name}-{version}-{tag}.whl"
            links += f'<a href="/{name}/{file}#sha256={found}">{file}</a>\n'
        (root / "simple" / name).mkdir(parents=True)
        (root / "simple" / name / "index.html").write_text(f"<!DOCTYPE html><html><body>{links}</body></html>")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/simple", hashes
    server.shutdown()
    server.server_close()
    thread.join(10)


@pytest.fixture
def root(tmp_path: Path, index: tuple[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a family of each kind; only what the tests serve is asked."""
    needs("uv")
    address, hashes = index
    root = tmp_path / "checkout"
    (root / "requirements").mkdir(parents=True)

    def pinned(*wanted: str) -> str:
        return "".join(f"{one} --hash=sha256:{hashes[one]}\n" for one in wanted)

    (root / "requirements/bootstrap.txt").write_text(pinned("pip==1.0"))
    (root / "requirements/some.txt").write_text(pinned("common==1.0"))
    (root / "requirements/linux-aarch64.txt").write_text(pinned("common==1.0", "binary==1.0"))
    (root / "pyproject.toml").write_text(
        '[project]\nname = "x"\nversion = "1"\nrequires-python = ">=3.11"\n'
        'dependencies = ["common", "numpy<2", "binary==1.0"]\n'
    )
    monkeypatch.setattr(checkout, "checkout", lambda: root)
    for name in list(os.environ):
        if name.upper().startswith(("UV_", "PIP_")) or name.upper().endswith("_PROXY"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("UV_DEFAULT_INDEX", address)
    monkeypatch.setenv("PIP_INDEX_URL", address)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return root


def family(root: Path, name: str, text: str) -> Path:
    """Its folder."""
    folder = root / "containers" / name
    folder.mkdir(parents=True)
    (folder / "image.toml").write_text(text)
    read_definition(folder / "image.toml")
    return folder


# On Debian


def mirror(folder: Path, *debs: tuple[str, str, str]) -> str:
    """A mirror of (name, version, depends), whose first is essential; its address."""
    pool = folder / "debian/pool"
    lists = folder / "debian/dists/bookworm/main/binary-amd64"
    for one in (pool, lists):
        one.mkdir(parents=True, exist_ok=True)
    stanzas = ""
    for number, (name, version, depends) in enumerate(debs):
        deb = make_deb(pool, name, version, depends=depends, essential=number == 0)
        data = deb.read_bytes()
        stanzas += f"Package: {name}\nVersion: {version}\nArchitecture: amd64\n"
        stanzas += ("Essential: yes\n" if number == 0 else "") + (f"Depends: {depends}\n" if depends else "")
        stanzas += f"Filename: pool/{deb.name}\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n\n"
    (lists / "Packages").write_text(stanzas)
    digest, size = hashlib.sha256(stanzas.encode()).hexdigest(), len(stanzas)
    (folder / "debian/dists/bookworm/Release").write_text(
        "Suite: bookworm\nCodename: bookworm\nComponents: main\nArchitectures: amd64\nSHA256:\n"
        f" {digest} {size} main/binary-amd64/Packages\n"
    )
    return folder.as_uri()


@pytest.fixture
def on_debian(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a family on Debian; its mirror is not signed."""
    needs("apt-get", "dpkg-deb")
    monkeypatch.setattr(debian, "KEYRING", root / "none")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")  # the same .deb when it is made again
    (root / "pyproject.toml").write_text(
        '[project]\nname = "x"\nversion = "1"\nrequires-python = ">=3.11"\ndependencies = ["common"]\n'
    )
    text = (containers_folder() / "cpu/image.toml").read_text()
    begin, end = text.index("suites ="), text.index("[python]")
    text = f'{text[:begin]}suites = [["debian", "bookworm"]]\n\n[debian]\npackages = ["thing"]\n\n{text[end:]}'
    begin, end = text.index("source_only"), text.index("[environment]")
    text = f'{text[:begin]}\n[python.requirements]\n"linux/amd64" = ["requirements/some.txt"]\n\n{text[end:]}'
    return family(
        root, "small", text.replace('"linux/amd64", "linux/arm64"', '"linux/amd64"').replace('"cpu"', '"small"')
    )


def test_lock_then_check(on_debian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--check compares and writes nothing; what the mirror no longer offers is named, whoever asks for it."""
    address = mirror(
        tmp_path / "mirror", ("base-thing", "1", ""), ("libthing", "1.0", ""), ("thing", "2.0", "libthing")
    )
    command = ["image", "lock", "small", "--debian-mirror", address]
    assert main(command) == 0
    lock = read_lock(on_debian / "lock.json")
    assert capsys.readouterr().out.splitlines() == [
        "small-1.0.0 linux/amd64: 3 Debian packages, 2 Python packages",
        f"image lock {lock.digest}",
    ]
    assert [(one.name, one.version) for one in lock.debian("linux/amd64")] == [
        ("base-thing", "1"), ("libthing", "1.0"), ("thing", "2.0")
    ]  # fmt: skip
    assert [one.file for one in lock.python("linux/amd64")] == [
        "common-1.0-py3-none-any.whl", "pip-1.0-py3-none-any.whl"
    ]  # fmt: skip
    assert lock.unresolved == []
    written = (on_debian / "lock.json").read_bytes()
    assert main(command) == 0  # again: the same bytes
    assert (on_debian / "lock.json").read_bytes() == written
    capsys.readouterr()
    for more in ([], ["--offline"]):
        assert main([*command, "--check", *more]) == 0
        assert capsys.readouterr().out == "the lock of small is what `image lock small` would write\n"

    # The mirror goes on: a version goes, another comes.
    (tmp_path / "mirror/debian/pool/libthing_1.0_amd64.deb").unlink()
    mirror(tmp_path / "mirror", ("base-thing", "1", ""), ("libthing", "1.1", ""), ("thing", "2.0", "libthing"))
    assert main([*command, "--check"]) == 1
    said = capsys.readouterr()
    assert said.out == "platforms.linux/amd64.debian.libthing: 1.0 -> 1.1\n"
    assert said.err == "the lock of small is not what `image lock small` would write\n"
    assert (on_debian / "lock.json").read_bytes() == written
    assert main([*command, "--check", "--offline"]) == 0  # which does not ask the mirror
    archives = debian.archives_below(address, (("debian", "bookworm"),))
    with pytest.raises(
        UnfitEnvironment, match=r"^libthing=1\.0 \(amd64\): the mirror no longer offers it; take the published"
    ):
        debian.fetch(lock.debian("linux/amd64"), archives, tmp_path / "debs")

    # The definition changes: stale, without a network too.
    text = (on_debian / "image.toml").read_text()
    (on_debian / "image.toml").write_text(text.replace('["thing"]', '["thing", "libthing"]'))
    capsys.readouterr()
    assert main([*command, "--check", "--offline"]) == 1
    assert capsys.readouterr().out == "the definition has changed since\n"
    assert (on_debian / "lock.json").read_bytes() == written


def test_what_cannot_be_resolved_on_debian(on_debian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A package, a file, a mirror that is not there: named, and no lock is written."""
    address = mirror(tmp_path / "mirror", ("base-thing", "1", ""))
    assert main(["image", "lock", "small", "--debian-mirror", address]) == 3
    said = capsys.readouterr().err
    assert "resolving Debian packages for amd64: apt-get ended with 100: " in said
    assert "Unable to locate package thing" in said
    mirror(tmp_path / "mirror", ("base-thing", "1", ""), ("thing", "2.0", ""))
    requirements = on_debian.parents[1] / "requirements"
    good = (requirements / "some.txt").read_text()
    (requirements / "some.txt").write_text((requirements / "linux-aarch64.txt").read_text())
    assert main(["image", "lock", "small", "--debian-mirror", address]) == 3
    said = capsys.readouterr().err
    assert "asking for the files of Python packages: uv ended with 1: error: No solution found" in said
    assert "binary==1.0 has no wheels" in said
    (requirements / "some.txt").write_text(f"common==1.0 --hash=sha256:{'0' * 64}\n")
    assert main(["image", "lock", "small", "--debian-mirror", address]) == 2
    assert capsys.readouterr().err == (
        "apertus-nemo: common==1.0: no file that was locked suits linux/amd64, Python 3.11\n"
    )
    (requirements / "some.txt").write_text(good)
    assert main(["image", "lock", "small", "--debian-mirror", (tmp_path / "nothing").as_uri()]) == 3
    assert "resolving Debian packages for amd64: apt-get ended with 100: " in capsys.readouterr().err
    assert not (on_debian / "lock.json").exists()
    assert main(["image", "lock", "small", "--check", "--offline"]) == 2
    assert capsys.readouterr().err.startswith(f"apertus-nemo: could not read {on_debian}/lock.json")


# On an image


BASE = {"Env": ["PATH=/bin", "CUDA_VERSION=13.0.2"]}


def on_image(root: Path, reference: str, digest: str) -> Path:
    """A family on a base that provides NumPy."""
    return family(
        root,
        "based",
        f"""
schema_version = 1
family = "based"
version = "1.0.0"
date = 2026-11-25
title = "A test"
machine = "none"
platforms = ["linux/arm64"]
[base]
kind = "image"
reference = "{reference}"
digest = "{digest}"
licence = "none"
[base.environment]
CUDA_VERSION = "13.0"
[base.provides]
numpy = {{}}
[python]
version = "3.12"
prefix = "/opt/x"
installer = "requirements/bootstrap.txt"
[python.requirements]
"linux/arm64" = ["containers/based/requirements.txt"]
[selftest]
imports = ["numpy"]
""",
    )


def pushed(registry: str, folder: Path, environment: list[str]) -> tuple[str, str, Descriptor]:
    """(reference, digest of an index, descriptor of its image) of a base."""
    layout = layout_with(folder, tar([entry("x", b"x")]))
    one = add_image(layout, [tar([entry("x", b"x")])], tag=None, platform=ARM, config={"Env": environment})
    index = Index((Descriptor(one.media_type, one.digest, one.size_bytes, platform=ARM),))
    name = f"{registry}/base/{folder.parent.name.lower().replace('_', '-')}"
    with Repository(Reference.parse(name), environment={}) as remote:
        remote.push(layout, layout.blobs.write(index.to_bytes(), INDEX), tag="25.11-py3")
    return f"{name}:25.11-py3", Descriptor.of(index.to_bytes(), INDEX).digest, one


def test_a_base_that_is_reached(root: Path, registry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which digest it is, its environment and packages are written; ours are resolved below its versions."""
    reference, digest, one = pushed(registry, tmp_path / "l", BASE["Env"])
    folder = on_image(root, reference, digest)
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([{"name": "NumPy", "version": "1.26.4"}, {"name": "common", "version": "1.0"}]))
    assert main(["image", "lock", "based", "--base-packages", str(listed)]) == 0
    assert "unresolved" not in capsys.readouterr().out
    lock = read_lock(folder / "lock.json")
    assert lock.tree["base"]["digest_is_of"] == "index"
    assert lock.tree["base"]["environment"] == {"CUDA_VERSION": "13.0.2"}
    assert lock.tree["base"]["provides"] == {"common": "1.0", "numpy": "1.26.4"}
    assert lock.tree["platforms"]["linux/arm64"]["base"]["manifest_digest"] == one.digest
    # What the base provides is its own; the wheel of ours is the one for aarch64.
    assert [item.file for item in lock.python("linux/arm64")] == [
        "binary-1.0-cp312-cp312-manylinux_2_28_aarch64.whl", "pip-1.0-py3-none-any.whl"
    ]  # fmt: skip
    assert main(["image", "lock", "based", "--base-packages", str(listed), "--check"]) == 0


def test_a_base_that_is_not_reached(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is made up: unknown, each with its reason, and not a word of this machine."""
    folder = on_image(root, f"127.0.0.1:{free_port()}/base:1", "sha256:" + "1" * 64)
    assert main(["image", "lock", "based"]) == 0
    said = capsys.readouterr().out
    lock = read_lock(folder / "lock.json")
    reason = f"{lock.tree['base']['reference'].partition('/')[0]} could not be reached from where this was resolved"
    assert lock.unresolved == [
        f"base.digest_is_of: {reason}",
        f"base.environment: {reason}",
        f"base.packages: {lock.tree['base']['packages']['unknown']}",
        "base.provides.numpy: no list of the base's packages was given",
        f"platforms.linux/arm64.base: {reason}",
    ]
    assert lock.tree["base"]["packages"]["unknown"] == (
        "the base's own list of Python packages was not given: inside the base, `pip list --format json`, then "
        "`image lock --base-packages FILE`"
    )
    assert all(f"unresolved: {line}\n" in said for line in lock.unresolved)
    assert lock.tree["platforms"]["linux/arm64"]["base"] == {"unknown": reason}


def test_a_base_that_is_another(root: Path, registry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other versions than the definition or our package wants are conflicts; no base at all is an error."""
    reference, digest, _ = pushed(registry, tmp_path / "l", ["CUDA_VERSION=12.8.1"])
    folder = on_image(root, reference, digest)
    listed = tmp_path / "list.json"
    listed.write_text('[{"name": "numpy", "version": "2.1.0"}]')
    assert main(["image", "lock", "based", "--base-packages", str(listed)]) == 0
    assert read_lock(folder / "lock.json").unresolved == [
        "conflict: apertus-nemo wants numpy <2, the base has 2.1.0",
        "conflict: linux/arm64: the base has CUDA_VERSION '12.8.1', the definition says '13.0'",
    ]
    assert "unresolved: conflict: apertus-nemo wants numpy <2, the base has 2.1.0\n" in capsys.readouterr().out
    written = (folder / "lock.json").read_bytes()
    for text, message in (
        ('[{"name": "scipy", "version": "1"}]', "lists no numpy, which the base is said to provide"),
        ("[]", "is not what `pip list --format json` prints"),
        ("numpy 1.26", "is not JSON"),
    ):
        listed.write_text(text)
        assert main(["image", "lock", "based", "--base-packages", str(listed)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"apertus-nemo: {listed}: ")
        assert message in said
    text = (folder / "image.toml").read_text()
    (folder / "image.toml").write_text(text.replace(digest, "sha256:" + "0" * 64))
    assert main(["image", "lock", "based"]) == 2
    assert f"apertus-nemo: the base {reference}@sha256:{'0' * 64}: " in capsys.readouterr().err
    assert (folder / "lock.json").read_bytes() == written

"""Debian packages from a mirror in a folder, made by the test: resolved by apt itself, fetched, made into a base."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from apertus_nemo.errors import UnfitEnvironment
from apertus_nemo.image import debian
from tests.unit.image.tools import needs

SUITES = (("debian", "bookworm"),)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_deb(folder: Path, name: str, version: str, *, depends: str = "", essential: bool = False) -> Path:
    """A real .deb, by dpkg-deb: one file."""
    root = folder / f"{name}-{version}"
    (root / "DEBIAN").mkdir(parents=True)
    (root / f"usr/share/{name}").mkdir(parents=True)
    (root / f"usr/share/{name}/version").write_text(f"{version}\n")
    control = f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: nobody <nobody@example.org>\n"
    control += "Essential: yes\n" if essential else ""
    control += f"Depends: {depends}\n" if depends else ""
    (root / "DEBIAN/control").write_text(f"{control}Description: for a test\n")
    deb = folder / f"{name}_{version.rpartition(':')[2]}_amd64.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", root, deb], check=True, capture_output=True, timeout=60)
    shutil.rmtree(root)
    return deb


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mirror of one archive: two versions of a library, a program that needs it, one essential package."""
    needs("apt-get", "dpkg-deb")
    root = tmp_path_factory.mktemp("mirror") / "debian"
    pool = root / "pool" / "main"
    pool.mkdir(parents=True)
    debs = [
        make_deb(pool, "base-thing", "12.4", essential=True),
        make_deb(pool, "libthing", "1.0-1"),
        make_deb(pool, "libthing", "1:0.9-1+b2"),  # an epoch: newer than 1.0
        make_deb(pool, "thing", "2.0~rc1-1", depends="libthing (>= 1:0)"),
        make_deb(pool, "unwanted", "1"),
    ]
    stanzas = []
    for deb in debs:
        control = subprocess.run(["dpkg-deb", "-f", deb], check=True, capture_output=True, text=True).stdout.strip()
        data = deb.read_bytes()
        stanzas.append(f"{control}\nFilename: pool/main/{deb.name}\nSize: {len(data)}\nSHA256: {sha256(data)}\n")
    lists = root / "dists/bookworm/main/binary-amd64"
    lists.mkdir(parents=True)
    packages = "\n".join(stanzas).encode()
    (lists / "Packages").write_bytes(packages)
    (root / "dists/bookworm/Release").write_text(
        "Suite: bookworm\nCodename: bookworm\nComponents: main\nArchitectures: amd64\nSHA256:\n"
        f" {hashlib.sha256(packages).hexdigest()} {len(packages)} main/binary-amd64/Packages\n"
    )
    return root


@pytest.fixture
def served(mirror: Path) -> Iterator[dict[str, str]]:
    """The mirror over HTTP on loopback."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(mirror.parent)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield {"debian": f"http://127.0.0.1:{server.server_port}/debian"}
    server.shutdown()
    server.server_close()
    thread.join(10)


def resolved(archives: dict[str, str], work: Path) -> list[debian.DebianPackage]:
    return debian.resolve(["thing"], SUITES, "amd64", archives, work=work, keyring=None)


def test_apt_resolves_what_is_essential_what_is_asked_and_what_that_needs(
    mirror: Path, served: dict[str, str], tmp_path: Path
) -> None:
    found = resolved(served, tmp_path)
    assert [(one.name, one.version) for one in found] == [
        ("base-thing", "12.4"),
        ("libthing", "1:0.9-1+b2"),
        ("thing", "2.0~rc1-1"),
    ]
    for one in found:
        data = (mirror.parent / one.file).read_bytes()
        assert (one.sha256, one.size_bytes) == (sha256(data), len(data))
    assert os.listdir(tmp_path) == []


def test_a_mirror_in_a_folder_gives_the_same(mirror: Path, served: dict[str, str], tmp_path: Path) -> None:
    in_folder = {"debian": mirror.as_uri()}
    assert resolved(in_folder, tmp_path) == resolved(served, tmp_path)
    files = debian.fetch(resolved(in_folder, tmp_path), in_folder, tmp_path / "cache")
    assert [path.stem for path in files] == [one.sha256 for one in resolved(in_folder, tmp_path)]


def test_an_unsigned_mirror_is_refused_unless_it_is_trusted(served: dict[str, str], tmp_path: Path) -> None:
    if not debian.KEYRING.is_file():
        pytest.skip("Debian's keyring is not installed")
    with pytest.raises(UnfitEnvironment, match="resolving Debian packages for amd64: apt-get ended with 100"):
        debian.resolve(["thing"], SUITES, "amd64", served, work=tmp_path)


def test_a_package_that_does_not_exist_is_named(served: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UnfitEnvironment, match="Unable to locate package nothing-such"):
        debian.resolve(["nothing-such"], SUITES, "amd64", served, work=tmp_path, keyring=None)


def test_what_the_mirror_dropped_or_changed_is_named_and_the_rest_is_kept(
    mirror: Path, served: dict[str, str], tmp_path: Path
) -> None:
    found = resolved(served, tmp_path)
    gone, changed = mirror.parent / found[1].file, mirror.parent / found[2].file
    kept, old = gone.read_bytes(), changed.read_bytes()
    try:
        gone.unlink()
        changed.write_bytes(old[:-1] + bytes([old[-1] ^ 1]))
        with pytest.raises(UnfitEnvironment) as caught:
            debian.fetch(found, served, tmp_path / "cache")
        lines = str(caught.value).splitlines()
        assert lines[0].startswith(
            "libthing=1:0.9-1+b2 (amd64): the mirror no longer offers it; take the published image"
        )
        assert lines[1].startswith("thing=2.0~rc1-1 (amd64): the mirror gives other bytes than were locked, sha256 ")
        assert len(lines) == 2
        assert os.listdir(tmp_path / "cache") == [f"{found[0].sha256}.deb"]
    finally:
        gone.write_bytes(kept)
        changed.write_bytes(old)
    files = debian.fetch(found, served, tmp_path / "cache")
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in files] == [one.sha256 for one in found]


def test_a_damaged_file_in_the_cache_is_fetched_again(served: dict[str, str], tmp_path: Path) -> None:
    found = resolved(served, tmp_path)
    (first, *_) = debian.fetch(found, served, tmp_path / "cache")
    first.write_bytes(b"damaged")
    assert debian.fetch(found, served, tmp_path / "cache")[0] == first
    assert hashlib.sha256(first.read_bytes()).hexdigest() == found[0].sha256


def test_a_mirror_that_is_not_there_is_said(tmp_path: Path) -> None:
    package = debian.DebianPackage("a", "1", "amd64", "debian/pool/a.deb", "0" * 64, 1)
    with pytest.raises(UnfitEnvironment, match=r"^a=1 \(amd64\): the mirror cannot be reached: .*refused"):
        debian.fetch([package], {"debian": "http://127.0.0.1:9/debian"}, tmp_path / "cache")
    with pytest.raises(
        UnfitEnvironment, match=r"no mirror of the archive debian-security .only debian.; give one with"
    ):
        debian.resolve([], (("debian-security", "x"),), "amd64", {"debian": "file:/x"}, work=tmp_path)


def test_mirrors_are_those_of_apt(tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text(
        "# deb http://old/debian x main\ndeb [arch=amd64] http://m.example/debian/ bookworm main\n"
    )
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d/a.sources").write_text(
        "Types: deb\nURIs: http://m.example/debian-security\nSuites: bookworm-security\n"
    )
    assert debian.find_archives(tmp_path) == {
        "debian": "http://m.example/debian",
        "debian-security": "http://m.example/debian-security",
    }
    with pytest.raises(UnfitEnvironment, match="names no mirror of Debian; give one with --debian-mirror URL"):
        debian.find_archives(tmp_path / "sources.list.d/none")


def test_a_base_is_a_function_of_its_packages(served: dict[str, str], tmp_path: Path) -> None:
    needs("mmdebstrap")
    files = debian.fetch(resolved(served, tmp_path), served, tmp_path / "cache")
    hashes = []
    for name in ("first", "second"):
        work = tmp_path / name
        work.mkdir(mode=0o755)
        debian.make_base(files, work / "base.tar", architecture="amd64", epoch=1764028800, work=work, configure=False)
        hashes.append(hashlib.sha256((work / "base.tar").read_bytes()).hexdigest())
    assert hashes[0] == hashes[1]
    with tarfile.open(tmp_path / "first" / "base.tar") as tar:
        names = {member.name.removeprefix("./") for member in tar}
        assert {f"usr/share/{name}/version" for name in ("base-thing", "libthing", "thing")} <= names
        assert {"etc/machine-id", "etc/resolv.conf", "etc/hostname", "etc/apt/sources.list"}.isdisjoint(names)
        assert max(member.mtime for member in tar) <= 1764028800


def test_a_failing_base_says_why(tmp_path: Path) -> None:
    needs("mmdebstrap", "dpkg-deb")
    deb = make_deb(tmp_path, "needy", "1", depends="nothing-such")
    with pytest.raises(
        UnfitEnvironment, match=r"making the base for amd64: mmdebstrap ended with .*; all of it is in .*base.log"
    ):
        debian.make_base([deb], tmp_path / "base.tar", architecture="amd64", epoch=0, work=tmp_path, configure=False)

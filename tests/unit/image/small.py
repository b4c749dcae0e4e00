"""A small family of images, built as the real ones are: a base of one .deb, pip, one package, and this package.

    small = Small(tmp_path)              # a checkout in git with containers/small, and a cache that holds its packages
    small.build(output)                  # what `image build small --json` prints

The .deb holds this machine's own Debian Python and busybox, so nothing comes from anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.image.debian import DebianPackage
from apertus_nemo.image.definition import read_definition
from apertus_nemo.image.lock import ImageLock, make_lock, platform_entry
from apertus_nemo.image.oci import Platform
from apertus_nemo.image.python_packages import PythonPackage
from apertus_nemo.record.files import file_sha256
from tests.unit.image.tools import needs

ROOT = Path(__file__).resolve().parents[3]
PLATFORM = str(Platform.of_machine(os.uname().machine))
ARCHITECTURE = PLATFORM.rpartition("/")[2]
PYTHON = Path("/usr/bin/python3.11")
RUN = "import sys; from apertus_nemo.cli.main import main; sys.exit(main(sys.argv[1:]))"
DEFINITION = f"""
schema_version = 1
family = "small"
version = "0.1.0"
date = 2026-11-25
title = "Small"
machine = "any"
platforms = ["{PLATFORM}"]
[base]
kind = "debian"
release = "bookworm"
suites = [["debian", "bookworm"]]
[debian]
packages = ["small-python"]
[python]
version = "3.11"
prefix = "/opt/apertus-nemo"
installer = "requirements/bootstrap.txt"
[python.requirements]
"{PLATFORM}" = ["requirements/small.txt"]
[environment]
LANG = "C.UTF-8"
"""


def needs_all() -> None:
    """Skip where a small image cannot be built."""
    needs("mmdebstrap", "buildah", "dpkg-deb", "git")
    if os.geteuid() != 0:
        pytest.skip("images are built by root")
    for path in (PYTHON, Path("/bin/busybox")):
        if not path.is_file():
            pytest.skip(f"{path} is not there")
    _pip()


def _pip() -> Path:
    """A wheel of pip: the one that comes with Python."""
    places = (Path(sys.base_prefix) / "lib/python3.11/ensurepip/_bundled", Path("/usr/share/python-wheels"))
    found = [path for place in places for path in sorted(place.glob("pip-*.whl"))]
    if not found:
        pytest.skip("this Python comes without the wheel of pip")
    return found[0]


class Small:
    """A checkout, and a cache."""

    def __init__(self, folder: Path, checkout: str = "checkout") -> None:
        self.root, self.cache = folder / checkout, folder / "cache"
        self.family = self.root / "containers" / "small"
        self._work = folder / "work"
        self._work.mkdir()
        self._copy()
        debs, python = [self._deb()], [self._keep(_pip(), "pip"), self._keep(_wheel(self._work), "thing")]
        (self.root / "requirements/small.txt").write_text(_pinned(python[1:]))
        (self.root / "requirements/bootstrap.txt").write_text(_pinned(python[:1]))
        self.family.mkdir()
        (self.family / "image.toml").write_text(DEFINITION)
        self.write_lock(debs, python)
        self._git("init", "-q")
        self.commit("first")

    def _copy(self) -> None:
        """This package, without what it depends on."""
        shutil.copytree(ROOT / "apertus_nemo", self.root / "apertus_nemo", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("LICENSE", "NOTICE", "README.md", ".gitignore"):
            shutil.copyfile(ROOT / name, self.root / name)
        text = re.sub(
            r"(?s)\ndependencies = \[\n.*?\n\]\n", "\ndependencies = []\n", (ROOT / "pyproject.toml").read_text()
        )
        (self.root / "pyproject.toml").write_text(text)
        for name in ("containers", "edf", "recipes", "requirements"):
            (self.root / name).mkdir()
            (self.root / name / "README").write_text(name)

    def write_lock(self, debs: Sequence[DebianPackage], python: Sequence[PythonPackage]) -> ImageLock:
        """The lock of just these."""
        self.debs, self.python = debs, python
        files = {
            name: file_sha256(self.root / name) for name in ("requirements/small.txt", "requirements/bootstrap.txt")
        }
        lock = make_lock(
            read_definition(self.family / "image.toml"),
            base={"kind": "debian", "release": "bookworm"},
            platforms={PLATFORM: platform_entry(base=None, debian=debs, python=python, requirements=files)},
            conflicts=[],
        )
        (self.family / "lock.json").write_bytes(lock.to_bytes())
        return lock

    def _keep(self, path: Path, name: str) -> PythonPackage:
        sha256 = file_sha256(path)
        target = self.cache / "python" / sha256 / path.name
        target.parent.mkdir(parents=True)
        shutil.copyfile(path, target)
        return PythonPackage(name, path.name.split("-")[1], path.name, sha256)

    def _deb(self) -> DebianPackage:
        deb = _python_deb(self._work)
        sha256 = file_sha256(deb)
        (self.cache / "debian").mkdir(parents=True)
        size = deb.stat().st_size
        shutil.move(deb, self.cache / "debian" / f"{sha256}.deb")
        return DebianPackage("small-python", "1.0", ARCHITECTURE, f"debian/pool/{deb.name}", sha256, size)

    def _git(self, *arguments: str) -> None:
        who = {
            f"GIT_{one}_{what}": value
            for one in ("AUTHOR", "COMMITTER")
            for what, value in (("NAME", "tests"), ("EMAIL", "tests@example.org"), ("DATE", "2026-01-01T00:00:00Z"))
        }
        subprocess.run(["git", "-C", self.root, *arguments], check=True, env={**os.environ, **who}, timeout=60)

    def commit(self, message: str) -> None:
        """All that is there; the same tree and history give the same commit."""
        self._git("add", "--force", ".")
        self._git("commit", "-q", "--no-verify", "-m", message)

    def command(self, *options: str) -> list[str]:
        """`image build small`."""
        return [sys.executable, "-c", RUN, "image", "build", "small", "--cache", str(self.cache), *options]

    def environment(self, **more: str) -> dict[str, str]:
        """That finds the checkout's own code."""
        return {**os.environ, "PYTHONPATH": str(self.root), **more}

    def run(
        self, output: Path, *options: str, before: Sequence[str] = (), **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """The command, to its end."""
        return subprocess.run(
            [*before, *self.command("--json", "--output", str(output), *options)],
            cwd=output.parent,
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            timeout=240,
        )

    def build(self, output: Path, *options: str, before: Sequence[str] = (), **environment: str) -> Any:
        """What it prints."""
        done = self.run(output, *options, before=before, **environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def _pinned(packages: Sequence[PythonPackage]) -> str:
    return "".join(f"{one.name}=={one.version} --hash=sha256:{one.sha256}\n" for one in packages)


def _wheel(folder: Path) -> Path:
    """Pure Python, one module."""
    path = folder / "thing-1.0-py3-none-any.whl"
    files = {
        "thing.py": "names = {'a', 'b', 'c', 'd'}\ndef known(name):\n    return name in {'x', 'y', 'z', 'w'}\n",
        "thing-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n",
        "thing-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr("thing-1.0.dist-info/RECORD", "".join(f"{name},,\n" for name in files))
    return path


def _python_deb(folder: Path) -> Path:
    """This machine's Debian Python with the libraries that it loads, and busybox as everything else."""
    root = folder / "deb"
    library = Path("/usr/lib/python3.11")
    shutil.copytree(
        library,
        root / "usr/lib/python3.11",
        symlinks=True,
        ignore=shutil.ignore_patterns("__pycache__", "test", "config-*", "lib2to3", "pydoc_data", "dist-packages"),
    )
    (root / "bin").mkdir()
    (root / "usr/bin").mkdir()
    shutil.copy(PYTHON, root / "usr/bin/python3.11")
    shutil.copy("/bin/busybox", root / "bin/busybox")
    for name in ("sh", "mkdir", "cp", "ls"):
        (root / "bin" / name).symlink_to("busybox")
    loaded = [PYTHON, *sorted((library / "lib-dynload").glob("*.so"))]
    listed = subprocess.run(["ldd", *loaded], check=True, capture_output=True, text=True, timeout=60).stdout
    for name in sorted(set(re.findall(r"(/lib\S+) \(0x", listed))):
        (root / name[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, root / name[1:])
    (root / "DEBIAN").mkdir()
    (root / "DEBIAN/control").write_text(
        f"Package: small-python\nVersion: 1.0\nArchitecture: {ARCHITECTURE}\nMaintainer: nobody <nobody@example.org>\n"
        "Description: for a test\n"
    )
    deb = folder / "small-python.deb"
    command = ["dpkg-deb", "--root-owner-group", "-Znone", "-b", root, deb]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    shutil.rmtree(root)
    return deb


def sha256(data: bytes) -> str:
    """64 hex digits."""
    return hashlib.sha256(data).hexdigest()

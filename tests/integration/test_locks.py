"""The locks hold what they promise, as far as that shows without a network; `scripts/lock --check` does the rest."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "requirements"
CPUS = ("x86_64", "aarch64")
LOCKS = sorted(path.name for path in FOLDER.glob("*.txt"))

# Packages whose versions may differ between the two processors, and why.
MAY_DIFFER = {
    "torch": "no wheel of 2.13.0 for aarch64 without CUDA is on the ordinary index; 2.10.0 is the last",
}
INSTALLERS = {"pip", "uv"}  # put packages in place; no result depends on them
SOURCE_ONLY = {"antlr4-python3-runtime", "wget"}  # as in scripts/lib.sh


def read(name: str) -> dict[str, tuple[str, list[str]]]:
    """Package -> (version, hashes) of one lock; fails on any line that is none of requirement, hash and comment."""
    found: dict[str, tuple[str, list[str]]] = {}
    hashes: list[str] = []
    for number, raw in enumerate((FOLDER / name).read_text().splitlines(), 1):
        line = raw.removesuffix("\\").strip()
        if not line or line.startswith("#"):
            continue
        if match := re.fullmatch(r"--hash=sha256:([0-9a-f]{64})", line):
            hashes.append(match[1])
            continue
        match = re.fullmatch(r"([a-z0-9][a-z0-9-]*)==([0-9][0-9a-z.+]*)", line)
        assert match, f"{name}:{number} is no exact pin: {raw!r}"
        assert match[1] not in found, f"{name}:{number} pins {match[1]} twice"
        hashes = []
        found[match[1]] = (match[2], hashes)
    return found


def everything(cpu: str) -> dict[str, str]:
    """Package -> version of all that scripts/test installs on a processor."""
    names = (f"torch-linux-{cpu}.txt", f"linux-{cpu}.txt", f"dev-linux-{cpu}.txt", "bootstrap.txt")
    return {package: version for name in names for package, (version, _) in read(name).items()}


def test_the_locks_are_all_there() -> None:
    assert set(LOCKS) == {
        "bootstrap.txt",
        "torch-cuda-linux-x86_64.txt",
        *(f"{kind}linux-{cpu}.txt" for kind in ("", "dev-", "torch-") for cpu in CPUS),
    }


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_is_pinned_and_hashed(name: str) -> None:
    pins = read(name)
    assert pins
    for package, (_, hashes) in pins.items():
        assert hashes, f"{package} has no hash"
        assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize("name", LOCKS)
def test_no_address_and_no_path(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert not re.search(
        r"https?:|file:|git\+|@ |--(extra-)?index|--find-links|--trusted|/(home|root|tmp|opt|work)/", text
    )
    assert not re.search(r"\b[a-z0-9-]+\.(org|com|net|io|ch)\b", text)


def test_one_package_one_version() -> None:
    for cpu in CPUS:
        versions: dict[str, set[str]] = {}
        for name in (f"linux-{cpu}.txt", f"dev-linux-{cpu}.txt", "bootstrap.txt"):
            for package, (version, _) in read(name).items():
                versions.setdefault(package, set()).add(version)
        assert {package: found for package, found in versions.items() if len(found) > 1} == {}


def test_both_processors_have_the_same_versions() -> None:
    x86, arm = (everything(cpu) for cpu in CPUS)
    assert {package for package in x86.keys() | arm.keys() if x86.get(package) != arm.get(package)} == set(MAY_DIFFER)


def test_what_is_declared_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = [
        *project["project"]["dependencies"],
        *project["dependency-groups"]["dev"],
        *project["dependency-groups"]["bootstrap"],
        *project["build-system"]["requires"],
    ]
    for cpu in CPUS:
        locked = everything(cpu)
        for requirement in map(Requirement, declared):
            name = canonicalize_name(requirement.name)
            assert requirement.specifier.contains(Version(locked[name])), f"{requirement} on {cpu}: {locked[name]}"


@pytest.mark.parametrize("cpu", CPUS)
def test_versions_that_matter(cpu: str) -> None:
    locked = {package: Version(version) for package, version in everything(cpu).items()}
    assert locked["hydra-core"] >= Version("1.3.4")  # older ones call any `_target_`
    assert locked["numpy"] < Version("2")
    assert locked["nemo-toolkit"] == Version("2.7.3")
    assert locked["megatron-core"] == Version("0.15.3")
    assert locked["transformers"] in Requirement("x>=4.57,<4.58").specifier


@pytest.mark.parametrize("cpu", CPUS)
def test_no_cuda_libraries_by_default(cpu: str) -> None:
    """cuda-bindings and cuda-pathfinder are small, and nemo-toolkit requires them."""
    cuda = {package for package in everything(cpu) if package.startswith(("nvidia-", "cuda-", "triton"))}
    assert cuda <= {"cuda-bindings", "cuda-pathfinder"}


def test_source_only_packages_are_named_to_pip() -> None:
    """pip is told to take wheels only, but for these; both locks must hold them."""
    assert f"source_only={','.join(sorted(SOURCE_ONLY))}\n" in (ROOT / "scripts" / "lib.sh").read_text()
    assert set(read("linux-x86_64.txt")) >= SOURCE_ONLY


def test_this_environment_is_the_locked_one() -> None:
    locked = everything(platform.machine())
    wrong = {}
    for package in locked.keys() - INSTALLERS:
        version = locked[package]
        try:
            found: str | None = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = None
        if package == "torch" and found is not None:  # "2.13.0" with --allow-cuda
            found, version = Version(found).public, Version(version).public
        if found != version:
            wrong[package] = f"locked {version}, installed {found}"
    assert wrong == {}, "run scripts/test, which installs what the locks say"

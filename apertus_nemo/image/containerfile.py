"""The Containerfiles of an image, generated from its definition: three layers below our package, and that one.

    stack_file(definition, platform)           # base, then torch, then the other Python packages
    package_file(definition, wheel)            # our package and its papers, one layer that stands on any such stack
    requirements(lock, platform)               # {"torch.txt": ..., "others.txt": ...}, what pip is given beside files

What changes often lies highest, so an update of our package is a layer of a few megabytes. Packages are installed by
the image's own Python, from files that were fetched and checked before; there is no network inside. Bytecode is
compiled with the hashes of its sources, which times of files do not change.
"""

from __future__ import annotations

from apertus_nemo.errors import InputError
from apertus_nemo.image.definition import Definition
from apertus_nemo.image.lock import ImageLock
from apertus_nemo.image.python_packages import PythonPackage

BASE = "localhost/base"  # what the package is installed on: the lowest layer
FILES = "/run/files"  # where a build finds what it installs
PAPERS = "etc/apertus-nemo"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_FIRST = ("pip", "setuptools", "torch")  # the first layer above the base; the next one is built with these


def requirements(lock: ImageLock, platform: str) -> dict[str, str]:
    """File name -> hashed requirements of a layer."""
    first = [one for one in lock.python(platform) if one.name in _FIRST]
    others = [one for one in lock.python(platform) if one.name not in _FIRST]
    return {"torch.txt": _pinned(first), "others.txt": _pinned(others)}


def _pinned(packages: list[PythonPackage]) -> str:
    return "".join(f"{one.name}=={one.version} --hash=sha256:{one.sha256}\n" for one in packages)


def installer(lock: ImageLock, platform: str) -> str:
    """The file name of the pip that installs. Raises InputError where the lock holds none."""
    for one in lock.python(platform):
        if one.name == "pip" and one.file.endswith(".whl"):
            return one.file
    raise InputError(
        f"the lock of {lock.name} holds no wheel of pip for {platform}: it must be in the installer's file"
    )


def stack_file(definition: Definition, lock: ImageLock, platform: str) -> str:
    """The Containerfile of everything below our package; a stage is a layer."""
    if definition.base.kind == "debian":
        base = "FROM scratch AS base\nADD base.tar /\n"
    else:
        name = definition.base.reference.rpartition(":")[0]
        base = f"FROM {name}@{lock.tree['platforms'][platform]['base']['manifest_digest']} AS base\n"
    first = [_venv(definition), _pip(definition, lock, platform, "-r", f"{FILES}/torch.txt")]
    others = [_pip(definition, lock, platform, "-r", f"{FILES}/others.txt")]
    return (
        f"# {lock.name} for {platform}: what stands below our package.\n"
        f"{base}\nFROM base AS torch\n{_run(definition, first)}\nFROM torch AS stack\n{_run(definition, others)}"
    )


def package_file(definition: Definition, lock: ImageLock, platform: str, wheel: str) -> str:
    """The Containerfile of our own layer, from the wheel's file name; `papers/` of its context is copied as it is."""
    prefix = definition.prefix
    site = f"{prefix}/lib/python{definition.python_version}/site-packages"
    kept = f"{site}/apertus_nemo {site}/apertus_nemo-*.dist-info {prefix}/bin/apertus-nemo"
    steps = [
        _venv(definition),
        _pip(definition, lock, platform, f"{FILES}/{wheel}"),
        "mkdir /package",
        f'for path in {kept}; do mkdir -p "/package${{path%/*}}"; cp -R "$path" "/package${{path%/*}}/"; done',
    ]
    return (
        f"# {lock.name} for {platform}: our package, on the base alone; its files are the layer on top of the stack.\n"
        f"FROM {BASE} AS installed\n{_run(definition, steps)}COPY papers/ /package/\n\n"
        "FROM scratch AS package\nCOPY --from=installed /package/ /\n"
    )


def environment(definition: Definition, base: dict[str, str]) -> dict[str, str]:
    """What the image sets: the base's own, PATH with our commands first, and what the definition says."""
    path = base.get("PATH", SYSTEM_PATH)
    return {**base, "PATH": f"{definition.prefix}/bin:{path}", **definition.environment}


def papers(definition: Definition, *, toml: bytes, lock: bytes, sbom: bytes) -> dict[str, bytes]:
    """Path inside the image -> content of what comes with our package."""
    profile = f'# Login shells set PATH anew.\nPATH="{definition.prefix}/bin:$PATH"\nexport PATH\n'
    return {
        f"{PAPERS}/image.toml": toml,
        f"{PAPERS}/lock.json": lock,
        f"{PAPERS}/sbom.cdx.json": sbom,
        "etc/profile.d/apertus-nemo.sh": profile.encode(),
    }


def _venv(definition: Definition) -> str:
    sees = " --system-site-packages" if definition.base.kind == "image" else ""
    return f"python{definition.python_version} -m venv --without-pip{sees} {definition.prefix}"


def _pip(definition: Definition, lock: ImageLock, platform: str, *what: str) -> str:
    hashed = "--require-hashes " if what[0] == "-r" else ""
    return (
        f"{definition.prefix}/bin/python3 {FILES}/{installer(lock, platform)}/pip install --quiet --no-input "
        "--no-index --no-deps --no-cache-dir --no-build-isolation --disable-pip-version-check "
        f"--root-user-action ignore --find-links {FILES} {hashed}{' '.join(what)}"
    )


def _run(definition: Definition, steps: list[str]) -> str:
    """One RUN: the settings hold for it alone, and leave nothing in the image."""
    settings = (
        f"export LC_ALL=C.UTF-8 TZ=UTC HOME=/tmp TMPDIR=/tmp PYTHONHASHSEED=0 SOURCE_DATE_EPOCH={definition.epoch}"
    )
    mount = f"--mount=type=bind,source=files,target={FILES}"
    return f"RUN {mount} \\\n    set -e; umask 022; {settings}; \\\n    " + "; \\\n    ".join(steps) + "\n"

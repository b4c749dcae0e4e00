"""Debian packages of an image: resolved by apt, pinned by the SHA-256 of each .deb, and made into a base.

    archives = find_archives()                                   # {"debian": "http://...", ...}, of this machine
    packages = resolve(["python3"], suites, "arm64", archives, work)
    files = fetch(packages, archives, cache)                     # what a mirror no longer has is named
    make_base(files, base_tar, architecture="arm64", epoch=..., work=work)

Mirrors drop versions after a point release, so a lock may outlive its packages; the image in a registry is then what is
left. The base is a function of the .debs alone: mmdebstrap gets a repository that holds just them, and no other.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from apertus_nemo.errors import UnfitEnvironment
from apertus_nemo.image.programs import plain_environment, run
from apertus_nemo.record.files import file_sha256, writing

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_DOWNLOADS = 4  # at once
_TIMEOUT_S = 60.0
_BLOCK_BYTES = 2**20
# Left out of every base: manuals, translations, documents but for copyrights, as Debian's own small images do.
_LEFT_OUT = ("/usr/share/man/*", "/usr/share/locale/*", "/usr/share/doc/*", "/usr/share/info/*", "/usr/share/lintian/*")
_KEPT = ("/usr/share/doc/*/copyright",)
# Of this machine or this moment, or of an apt that is not there.
_REMOVED = (
    "etc/apt/sources.list",
    "etc/hostname",
    "etc/machine-id",
    "etc/resolv.conf",
    "var/cache/apt",
    "var/cache/debconf/*-old",
    "var/cache/ldconfig/aux-cache",
    "var/lib/apt",
    "var/lib/dbus/machine-id",
    "var/lib/dpkg/*-old",
    "var/log/*",
)

_GONE = (
    "the mirror no longer offers it; take the published image, which stays as it is, or resolve anew with `image lock`"
)


@dataclass(frozen=True, order=True)
class DebianPackage:
    """One .deb."""

    name: str
    version: str
    architecture: str  # of the package: "amd64", "arm64", "all"
    file: str  # below the mirror: "debian/pool/main/..."
    sha256: str
    size_bytes: int


def find_archives(apt: Path = Path("/etc/apt")) -> dict[str, str]:
    """Archive ("debian", "debian-security") -> its URL, from apt's own sources of this machine.

    Raises UnfitEnvironment where there are none.
    """
    found: dict[str, str] = {}
    for path in sorted([*apt.glob("sources.list"), *apt.glob("sources.list.d/*")]):
        try:
            text = path.read_text(errors="replace")
        except OSError:
            continue
        for line in text.splitlines():
            if line.startswith(("deb ", "URIs:")):
                for url in re.findall(r"(?:https?|file):/\S+", line):
                    found.setdefault(url.rstrip("/").rpartition("/")[2], url.rstrip("/"))
    if not found:
        raise UnfitEnvironment(f"{apt} names no mirror of Debian; give one with --debian-mirror URL")
    return found


def archives_below(mirror: str, suites: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The same for a mirror that holds every archive by its name."""
    return {archive: f"{mirror.rstrip('/')}/{archive}" for archive, _ in suites}


def resolve(
    packages: Sequence[str],
    suites: Sequence[tuple[str, str]],
    architecture: str,
    archives: Mapping[str, str],
    *,
    work: Path,
    keyring: Path | None = KEYRING,
) -> list[DebianPackage]:
    """What apt would install into nothing: Debian's essential packages, `packages`, and all that they need; sorted.

    `keyring` verifies the archives; None trusts them. Raises UnfitEnvironment where apt fails, with its words.
    """
    archives = {archive: url.replace("file:///", "file:/") for archive, url in archives.items()}  # as apt writes it
    root = Path(tempfile.mkdtemp(dir=work))
    try:
        for folder in ("lists/partial", "cache/archives/partial"):
            (root / folder).mkdir(parents=True)
        (root / "status").touch()
        how = "trusted=yes" if keyring is None else f"signed-by={keyring}"
        (root / "sources.list").write_text(
            "".join(f"deb [{how}] {_url(archives, archive)} {suite} main\n" for archive, suite in suites)
        )
        options = {
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "",
            "Acquire::GzipIndexes": "false",
            "Acquire::Languages": "none",
            "Dir::Cache": str(root / "cache"),
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::parts": "/dev/null",
            "Dir::Etc::sourcelist": str(root / "sources.list"),
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State": str(root),
            "Dir::State::lists": str(root / "lists"),
            "Dir::State::status": str(root / "status"),
        }
        apt = ["apt-get", "-qq", *(part for name, value in options.items() for part in ("-o", f"{name}={value}"))]
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        what = f"resolving Debian packages for {architecture}"
        run([*apt, "-o", "APT::Update::Error-Mode=any", "update"], what=what, environment=environment, limit_s=600)
        said = run([*apt, "-y", "--print-uris", "install", "?essential", *packages], what=what, environment=environment)
        wanted = {_below(match[1], archives) for match in re.finditer(r"^'([^']+)' ", said, re.MULTILINE)}
        known = dict(_listed(root / "lists", archives))
        return sorted(known[file] for file in wanted)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _url(archives: Mapping[str, str], archive: str) -> str:
    if archive not in archives:
        there = ", ".join(sorted(archives))
        raise UnfitEnvironment(
            f"this machine's apt has no mirror of the archive {archive} (only {there}); "
            "give one with --debian-mirror URL"
        )
    return archives[archive]


def _below(url: str, archives: Mapping[str, str]) -> str:
    """The path of a file below its mirror, beginning with the archive."""
    for archive, base in archives.items():
        if url.startswith(f"{base}/"):
            return f"{archive}/{unquote(url.removeprefix(f'{base}/'))}"
    raise UnfitEnvironment(f"apt wants {url}, which is of no archive that was named")


def _listed(lists: Path, archives: Mapping[str, str]) -> Iterator[tuple[str, DebianPackage]]:
    """(file, package) of everything in apt's lists."""
    for path in sorted(lists.glob("*_Packages")):
        # apt names a list by its URL, with / written as _ and _ as %5f.
        name = unquote(path.name.replace("_", "/")).lstrip("/")
        archive = next(key for key, url in archives.items() if name.startswith(f"{url.partition(':')[2].strip('/')}/"))
        for stanza in path.read_text(errors="replace").split("\n\n"):
            fields = dict(re.findall(r"^([A-Za-z0-9-]+): (.*)$", stanza, re.MULTILINE))
            if "Filename" in fields:
                file = f"{archive}/{fields['Filename'].removeprefix('./')}"
                yield (
                    file,
                    DebianPackage(
                        fields["Package"],
                        fields["Version"],
                        fields["Architecture"],
                        file,
                        fields["SHA256"],
                        int(fields["Size"]),
                    ),
                )


def fetch(packages: Sequence[DebianPackage], archives: Mapping[str, str], cache: Path) -> list[Path]:
    """The .deb of each package, in their order, from `cache` or the mirror; every one checked against its hash.

    Raises UnfitEnvironment that names, one a line, what the mirror does not have or gives with other bytes.
    """
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)

    def one(package: DebianPackage) -> Path | str:
        path = cache / f"{package.sha256}.deb"
        if path.is_file() and file_sha256(path) == package.sha256:
            return path
        return _download(package, archives, path)

    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        found = list(pool.map(one, packages))
    missed = [item for item in found if isinstance(item, str)]
    if missed:
        raise UnfitEnvironment("\n".join(missed))
    return [item for item in found if isinstance(item, Path)]


def _download(package: DebianPackage, archives: Mapping[str, str], path: Path) -> Path | str:
    """The path when done; else one line that says why not."""
    archive, _, below = package.file.partition("/")
    shown = f"{package.name}={package.version} ({package.architecture})"
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    digest, size = hashlib.sha256(), 0
    try:
        url = f"{_url(archives, archive)}/{quote(below, safe='/+~:')}"
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer, open(partial, "wb") as stream:
            while (block := answer.read(_BLOCK_BYTES)) and size <= package.size_bytes:
                digest.update(block)
                size += len(block)
                with writing(path):
                    stream.write(block)
        if digest.hexdigest() != package.sha256:
            return f"{shown}: the mirror gives other bytes than were locked, sha256 {digest.hexdigest()}"
        with writing(path):
            os.rename(partial, path)
        return path
    except urllib.error.HTTPError as error:
        return f"{shown}: {_GONE if error.code in (404, 410) else f'the mirror answers {error.code}'}"
    except urllib.error.URLError as error:
        gone = isinstance(error.reason, FileNotFoundError)  # a mirror in a folder
        return f"{shown}: {_GONE if gone else f'the mirror cannot be reached: {error.reason}'}"
    except OSError as error:
        return f"{shown}: the mirror cannot be reached: {error}"
    finally:
        partial.unlink(missing_ok=True)


def make_base(
    debs: Sequence[Path], target: Path, *, architecture: str, epoch: int, work: Path, configure: bool = True
) -> None:
    """Install `debs` into an empty root file system and write it to `target`, a tar: same .debs, same bytes.

    Maintainer scripts run (for another architecture by emulation), unless `configure` is False: then the packages are
    only unpacked. Raises UnfitEnvironment.
    """
    repository = Path(tempfile.mkdtemp(dir=work, prefix="debs-"))
    try:
        repository.chmod(0o755)  # apt reads it as another user
        names = _make_repository(debs, repository)
        removed = " ".join(f'"$1"/{name}' for name in _REMOVED)
        options = [f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT]
        options += [f"--dpkgopt=path-include={pattern}" for pattern in _KEPT]
        command: list[str | Path] = [
            "mmdebstrap",
            f"--variant={'custom' if configure else 'extract'}",
            "--format=tar",
            f"--architectures={architecture}",
            f"--include={','.join(names)}",
            '--aptopt=Acquire::Languages "none"',
            *options,
            # It would make var/lib/apt/lists/partial once more, of whoever it could download as: root or _apt.
            "--skip=cleanup/apt",
            # The one kind of hook that runs last in each variant.
            f"--{'customize' if configure else 'extract'}-hook=rm -rf {removed}",
            "bookworm",
            target,
            f"deb [trusted=yes] copy:{repository} ./",
        ]
        environment = plain_environment(epoch, TMPDIR=str(work))
        run(
            command,
            what=f"making the base for {architecture}",
            environment=environment,
            log=work / "base.log",
            apart=True,
        )
    finally:
        shutil.rmtree(repository, ignore_errors=True)


def _make_repository(debs: Sequence[Path], folder: Path) -> list[str]:
    """A repository of just these packages, for apt; returns their names."""
    names, stanzas = [], []
    for number, deb in enumerate(debs):
        file = folder / f"{number}.deb"
        with writing(file):
            shutil.copyfile(deb, file)
        control = run(["dpkg-deb", "-f", file], what=f"reading {deb}").strip()
        names.append(str(re.search(r"^Package: (\S+)$", control, re.MULTILINE)[1]))  # type: ignore[index]
        stanzas.append(
            f"{control}\nFilename: ./{file.name}\nSize: {file.stat().st_size}\nSHA256: {file_sha256(file)}\n"
        )
    (folder / "Packages").write_text("\n".join(stanzas))
    return names

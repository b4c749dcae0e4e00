"""Our own source: what it is, and an archive of it that a run keeps, so that it can be run again without a repository.

    found = find_source(allow_dirty=False)       # raises InputError for a checkout with changes
    found.tree                                   # the field `source` of the lock
    found.archive, found.patch                   # bytes of source.tar, and of source.patch for a changed checkout
    unpack(archive, folder)                      # the package and its recipes again, importable from `folder`

The archive holds the package, `recipes/` and `requirements/`, laid out alike from a checkout, from a wheel and from an
archive, and `source.json`, which says where it came from. Equal source is equal bytes.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apertus_nemo.errors import InputError
from apertus_nemo.record import git
from apertus_nemo.record.canonical import dumps, loads_canonical, sha256_hex, unknown
from apertus_nemo.record.files import reading
from apertus_nemo.record.secrets import access_key_in

# {"commit", "dirty", "patch", "tree"}: in an archive beside the package, in the wheel of an image among its resources.
ORIGIN = "source.json"
MAX_ARCHIVE_BYTES = 64 * 2**20
PARTS = ("apertus_nemo", "recipes", "requirements")  # folders of an archive, and of a checkout
NAMES = ("commit", "dirty", "patch", "tree")

_SUFFIXES = (".css", ".html", ".js", ".json", ".py", ".txt", ".typed", ".yaml")
_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*\Z")
_VERSION = re.compile(r"""^__version__ = ["']([^"'\n]+)["']$""", re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """Our source as found."""

    tree: Mapping[str, Any]  # the field `source` of a lock
    archive: bytes
    patch: bytes | None  # what a changed checkout has over its commit; None without changes, or where git is missing


def find_source(package: Path | None = None, *, allow_dirty: bool = True) -> Source:
    """Our source, of the package that runs or of the one in the folder `package`.

    Raises InputError for a git checkout with changes, unless `allow_dirty`; then too where the changes hold what looks
    like a secret.
    """
    folder = Path(__file__).resolve().parents[1] if package is None else Path(package)
    origin, patch = _origin(folder, allow_dirty=allow_dirty)
    files = dict(_files(folder))
    archive = _pack({**files, ORIGIN: dumps(origin)})
    return Source(describe(files, origin, archive), archive, patch)


def describe(files: Mapping[str, bytes], origin: Mapping[str, Any], archive: bytes) -> dict[str, Any]:
    """The field `source` of a lock: of an archive's files but `source.json`, of that file's content, and of its bytes.

    `files_digest` is SHA-256 over the canonical JSON of [[path, SHA-256], ...] of the package's files, sorted; recipes
    are no part of it, since the lock holds the resolved one.
    """
    package = sorted([name, sha256_hex(data)] for name, data in files.items() if name.startswith(f"{PARTS[0]}/"))
    version = _VERSION.search(files.get(f"{PARTS[0]}/__init__.py", b"").decode(errors="replace"))
    return {
        "archive_sha256": sha256_hex(archive),
        "files_digest": sha256_hex(dumps(package)),
        "package_version": version[1] if version else unknown("the package does not say"),
        **{name: origin[name] for name in NAMES},
    }


def _origin(package: Path, *, allow_dirty: bool) -> tuple[dict[str, Any], bytes | None]:
    """Commit, tree and changes of a checkout; of an archive or a wheel of an image, what it says; else unknown."""
    root = package.parent
    for path in (root / ORIGIN, package / "resources" / ORIGIN):
        if path.is_file():
            return read_origin(path.read_bytes(), what=str(path)), None
    if not (root / ".git").exists():
        return dict.fromkeys(NAMES, unknown("not a git checkout")), None
    try:
        commit, tree = git.read(root, "rev-parse", "HEAD", "HEAD^{tree}").decode().split()
        changed = git.changes(root, PARTS)
    except (OSError, ValueError) as error:
        return dict.fromkeys(NAMES, unknown(str(error))), None
    if not changed:
        return {"commit": commit, "dirty": False, "patch": None, "tree": tree}, None
    if not allow_dirty:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise InputError(
            f"the checkout has changes that are in no commit ({changed[0]}{more}): commit them, "
            "or let the record keep them as a patch with --allow-dirty"
        )
    patch = git.patch(root, PARTS)
    _refuse_secrets(patch)
    return {"commit": commit, "dirty": True, "patch": {"sha256": sha256_hex(patch)}, "tree": tree}, patch


def read_origin(data: bytes, *, what: str) -> dict[str, Any]:
    """The content of a `source.json`; raises InputError where it is none."""
    tree = loads_canonical(data, what=what)
    if not isinstance(tree, dict) or sorted(tree) != sorted(NAMES):
        raise InputError(f"{what}: does not say where a source came from")
    return tree


def _refuse_secrets(patch: bytes) -> None:
    name = "a file"
    for line in patch.decode(errors="replace").splitlines():
        if line.startswith("diff --git "):
            name = line.rsplit(" b/", 1)[-1]
        elif line.startswith("+") and (found := access_key_in(line)):
            raise InputError(f"the change of {name} holds what looks like a secret ({found}): no record may keep it")


def _files(package: Path) -> Iterator[tuple[str, bytes]]:
    """(path in the archive, bytes); recipes and requirements stand beside the package, or in a wheel inside it."""
    for part in PARTS:
        folder = package if part == PARTS[0] else package / "resources" / part
        folder = folder if folder.is_dir() else package.parent / part
        for here, folders, names in os.walk(folder):
            folders[:] = sorted(name for name in folders if name not in ("__pycache__", "resources"))
            for name in sorted(names):
                path = Path(here) / name
                inside = f"{part}/{path.relative_to(folder).as_posix()}"
                if name.endswith(_SUFFIXES) and _SAFE.match(inside):
                    with reading(path):
                        yield inside, path.read_bytes()


def _pack(files: Mapping[str, bytes]) -> bytes:
    """An uncompressed tar: sorted, without times, owners and permissions."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in sorted(files):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(files[name]), 0o644
            archive.addfile(member, io.BytesIO(files[name]))
    return stream.getvalue()


def read_archive(data: bytes, *, what: str) -> dict[str, bytes]:
    """Path -> bytes of an archive. Raises InputError for anything that `find_source` does not write."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isreg() and not member.issparse() else None
                if stream is None or not _SAFE.match(member.name) or member.name in found:
                    raise InputError(f"{what}: holds {member.name!r}, which an archive of source does not")
                found[member.name] = stream.read()
    except (tarfile.TarError, ValueError, OSError, EOFError) as error:
        raise InputError(f"{what}: is not an archive of source: {error}") from error
    if ORIGIN not in found or f"{PARTS[0]}/__init__.py" not in found:
        raise InputError(f"{what}: is not an archive of source: it lacks {ORIGIN} or the package")
    if _pack(found) != data:
        raise InputError(f"{what}: is not in the form in which source is archived")
    return found


def source_of_archive(data: bytes, *, what: str) -> dict[str, Any]:
    """The field `source` of the lock that an archive stands for. Raises InputError where it is none."""
    files = read_archive(data, what=what)
    origin = read_origin(files.pop(ORIGIN), what=f"{what}: {ORIGIN}")
    return describe(files, origin, data)


def unpack(data: bytes, folder: Path, *, what: str) -> None:
    """Write an archive's files below `folder`, which is empty; or check that the folder holds just them.

    Python adds byte code of its own to such a folder: that is taken away, since it would run in place of the files.
    Raises InputError where the archive is none, or the folder holds something else.
    """
    files = read_archive(data, what=what)
    present = set()
    for here, folders, names in os.walk(folder):
        for name in [name for name in folders if name == "__pycache__"]:
            folders.remove(name)
            shutil.rmtree(Path(here) / name)
        present |= {(Path(here) / name).relative_to(folder).as_posix() for name in names}
    if present:
        for name in sorted(present | set(files)):
            path = folder / name
            if name not in files or path.is_symlink() or not path.is_file() or path.read_bytes() != files[name]:
                raise InputError(f"{path} is not what {what} holds; remove {folder}, then run the command again")
        return
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as stream:
            stream.write(content)

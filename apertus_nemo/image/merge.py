"""The layers of an image as one tree, and that tree as one tar stream: nothing is unpacked, and memory is bounded.

    tree = read_tree(store, image)                 # first pass: who wins each path, whiteouts applied
    write_tree(store, image, tree, output)         # second pass: the winners' contents, parents first

Semantics are those of the OCI image specification 1.1 (layer.md): entries in order, later ones win; `.wh.NAME` removes
NAME of lower layers, `.wh..wh..opq` all that lower layers have in a folder, wherever in the layer they stand. Names
are relative to the image's root. A name with `..` is refused; a folder that is a symbolic link is followed inside the
root, as a container would, and never out of it. A hard link needs a target that is there.

The first pass keeps a number for each file (layer and entry), and all of each folder. Contents go through in the
second one, layer by layer; the names of an inode that has several are written together.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import IO, Protocol, overload

from apertus_nemo.errors import InputError
from apertus_nemo.image.blobs import BlobStore
from apertus_nemo.image.layers import (
    MAX_DEPTH,
    MAX_NAME_BYTES,
    Layer,
    encoded,
    mtime_of,
    open_layer,
    xattrs_of,
)
from apertus_nemo.image.layout import Image

MAX_ENTRIES = 2_000_000  # paths of an image
_MAX_LINKS = 40  # symbolic links on the way to one name; what Linux allows
_SHIFT = 40  # a node is layer << 40 | number of the entry
_BLOCK_BYTES = 2**20
_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_LEAVES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE)
_OTHERS = (tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
_ALL = (*_LEAVES, *_OTHERS, tarfile.DIRTYPE, tarfile.LNKTYPE)


class Output(Protocol):
    """Where a tar stream goes; all of `data` is taken."""

    def write(self, data: bytes, /) -> int: ...


class Link:
    """A symbolic link: the one kind of file whose content decides where names lead."""

    __slots__ = ("node", "target")

    def __init__(self, node: int, target: bytes) -> None:
        self.node, self.target = node, target


@dataclass(slots=True)
class Folder:
    """A folder; without an entry of its own it is root's, with mode 0755 and time 0."""

    layer: int  # that last said something of it
    children: dict[bytes, Folder | Link | int] = field(default_factory=dict)
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    xattrs: dict[str, str] = field(default_factory=dict)


@dataclass
class Tree:
    """What an image holds."""

    root: Folder
    shared: dict[int, list[bytes]] = field(
        default_factory=dict
    )  # node -> its paths, where they are not just its entry's
    entries: int = 0
    devices: int = 0
    refused_xattrs: int = 0  # that squashfs cannot hold


def read_tree(store: BlobStore, image: Image) -> Tree:
    """First pass. Raises InputError for what no image may hold, Differs where a layer is not as its digests say."""
    builder = _Builder()
    for number in range(len(image.manifest.layers)):
        with _opened(store, image, number, hashed=True) as layer:
            builder.add(number, layer)
    return builder.finish()


def write_tree(store: BlobStore, image: Image, tree: Tree, output: Output) -> None:
    """Second pass: a tar archive without its end, so that more can follow; raises as `read_tree` does."""
    for path, folder in walk_folders(tree.root):
        info = _info(path, tarfile.DIRTYPE, folder.mode, folder.uid, folder.gid, folder.mtime)
        _put(output, info, folder.xattrs)
    for number in range(len(image.manifest.layers)):
        with _opened(store, image, number, hashed=False) as layer:
            _write_layer(number, layer, tree, output)


def _write_layer(number: int, layer: Layer, tree: Tree, output: Output) -> None:
    for ordinal, entry in enumerate(layer.entries()):
        if entry.type not in _LEAVES + _OTHERS:
            continue
        node = number << _SHIFT | ordinal
        paths = tree.shared.get(node)
        if paths is None:
            path = b"/".join(_parts(entry.name))
            if _literal(tree.root, path) != node:
                continue
            paths = [path]
        if paths:
            _put_leaf(output, layer, entry, paths)


def _opened(store: BlobStore, image: Image, number: int, *, hashed: bool) -> AbstractContextManager[Layer]:
    descriptor = image.manifest.layers[number]
    return open_layer(
        store,
        descriptor,
        image.compressions[number],
        diff_id=image.config.diff_ids[number] if hashed else None,
        what=f"layer {number + 1} ({descriptor.digest[:19]})",
    )


def _parts(name: str) -> list[bytes]:
    parts = [part for part in encoded(name).split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise InputError(f"{name!r:.200} leads out of the image")
    if len(parts) > MAX_DEPTH:
        raise InputError(f"{name!r:.80}... is more than {MAX_DEPTH} folders deep")
    for part in parts:
        if len(part) > MAX_NAME_BYTES:
            raise InputError(f"{name!r:.80}... has a part of more than {MAX_NAME_BYTES} bytes")
    return parts


def _node(child: Folder | Link | int | None) -> int | None:
    return child.node if isinstance(child, Link) else child if isinstance(child, int) else None


def _literal(root: Folder, path: bytes) -> int | None:
    """The node of a path that leads through no symbolic link."""
    here: Folder | Link | int | None = root
    for part in path.split(b"/"):
        if not isinstance(here, Folder):
            return None
        here = here.children.get(part)
    return _node(here)


class _Builder:
    def __init__(self) -> None:
        self._root = Folder(layer=-1)
        self._tree = Tree(self._root)
        self._shared: set[int] = set()

    def add(self, number: int, layer: Layer) -> None:
        """Apply a layer."""
        for ordinal, entry in enumerate(layer.entries()):
            self._tree.entries += 1
            if self._tree.entries > MAX_ENTRIES:
                raise InputError(f"the image has more than {MAX_ENTRIES} entries")
            try:
                self._apply(number, ordinal, entry)
            except InputError as error:
                text = str(error)
                text = text if text.isprintable() else ascii(text)[1:-1]
                raise InputError(f"layer {number + 1}, entry {ordinal + 1}: {text}") from None

    def finish(self) -> Tree:
        """The tree, with the paths of every node that has not just that of its entry."""
        paths: dict[int, list[bytes]] = {node: [] for node in self._shared}
        if paths:
            for prefix, folder in [(b"", self._root), *walk_folders(self._root)]:
                for name, child in folder.children.items():
                    node = _node(child)
                    if node in paths:
                        paths[node].append(prefix + b"/" + name if prefix else name)
        self._tree.shared = {node: sorted(found) for node, found in paths.items()}
        return self._tree

    def _apply(self, number: int, ordinal: int, entry: tarfile.TarInfo) -> None:
        if entry.type not in _ALL:
            raise InputError(f"{entry.name!r:.200} is of the unknown kind {entry.type!r}")
        parts = _parts(entry.name)
        if not parts:
            if entry.type == tarfile.DIRTYPE:
                self._describe(self._root, number, entry)
                return
            raise InputError("the root of the image is not a folder")
        parent, literal = self._parent(parts[:-1], number)
        name = parts[-1]
        if name == _OPAQUE:
            _hide(parent, number)
        elif name.startswith(_WHITEOUT):
            self._whiteout(parent, name.removeprefix(_WHITEOUT), number, entry)
        elif entry.type == tarfile.DIRTYPE:
            found = parent.children.get(name)
            if not isinstance(found, Folder):
                found = parent.children[name] = Folder(number)
            self._describe(found, number, entry)
        else:
            node = number << _SHIFT | ordinal
            self._leaf(parent, name, node, entry)
            if not literal and entry.type != tarfile.LNKTYPE:
                self._shared.add(node)

    def _leaf(self, parent: Folder, name: bytes, node: int, entry: tarfile.TarInfo) -> None:
        if entry.type == tarfile.LNKTYPE:
            target = self._target(entry)
            if target is parent.children.get(name):  # a link to itself: the file is there
                return
            shared = _node(target)
            assert shared is not None
            self._shared.add(shared)
            parent.children[name] = target
        elif entry.type == tarfile.SYMTYPE:
            if not entry.linkname:
                raise InputError(f"the symbolic link {entry.name!r:.200} has no target")
            parent.children[name] = Link(node, encoded(entry.linkname))
        else:
            self._tree.devices += entry.type in (tarfile.CHRTYPE, tarfile.BLKTYPE)
            parent.children[name] = node
        self._tree.refused_xattrs += sum(1 for key in entry.pax_headers if key.startswith("SCHILY.xattr.system."))

    def _target(self, entry: tarfile.TarInfo) -> Link | int:
        """What a hard link leads to, in this layer or a lower one."""
        parts = _parts(entry.linkname)
        found: Folder | Link | int | None = self._root
        if parts:
            parent, _ = self._parent(parts[:-1], None)
            found = parent.children.get(parts[-1]) if parent else None
        if found is None:
            raise InputError(f"the hard link {entry.name!r:.200} leads to {entry.linkname!r:.200}, which is not there")
        if isinstance(found, Folder):
            raise InputError(f"the hard link {entry.name!r:.200} leads to the folder {entry.linkname!r:.200}")
        return found

    def _describe(self, folder: Folder, number: int, entry: tarfile.TarInfo) -> None:
        folder.layer = number
        folder.mode, folder.uid, folder.gid = entry.mode & 0o7777, entry.uid, entry.gid
        folder.mtime, folder.xattrs = mtime_of(entry), xattrs_of(entry)

    def _whiteout(self, parent: Folder, name: bytes, number: int, entry: tarfile.TarInfo) -> None:
        if name.startswith(b".wh."):
            return  # aufs' own files (".wh..wh.plnk"): no part of an image
        if name in (b"", b".", b".."):
            raise InputError(f"the whiteout {entry.name!r:.200} names nothing")
        found = parent.children.get(name)
        if isinstance(found, Folder) and found.layer == number:
            _hide(found, number)  # this layer has a folder of that name itself
        elif found is not None and _layer(found) < number:
            if isinstance(found, Folder) and _hide(found, number):
                return  # it holds what this layer put there
            del parent.children[name]

    @overload
    def _parent(self, parts: list[bytes], number: int) -> tuple[Folder, bool]: ...
    @overload
    def _parent(self, parts: list[bytes], number: None) -> tuple[Folder | None, bool]: ...
    def _parent(self, parts: list[bytes], number: int | None) -> tuple[Folder | None, bool]:
        """The folder that `parts` lead to, and whether through no symbolic link; missing ones are made.

        `number` None: nothing is made, for the target of a hard link; None where there is no such folder.
        """
        here, literal, links = self._root, True, 0
        pending, trail = list(reversed(parts)), [self._root]
        while pending:
            part = pending.pop()
            if part == b"..":  # only from the target of a link
                if len(trail) > 1:
                    trail.pop()
                here = trail[-1]
                continue
            found = here.children.get(part)
            if isinstance(found, Link):
                links += 1
                literal = False
                if links > _MAX_LINKS:
                    raise InputError("its folder is a symbolic link that leads through more than 40 others")
                if found.target.startswith(b"/"):
                    here, trail = self._root, [self._root]
                steps = [step for step in found.target.split(b"/") if step not in (b"", b".")]
                pending += reversed(steps)
                continue
            if not isinstance(found, Folder):
                if number is None:
                    return None, literal
                found = here.children[part] = Folder(number)
            here = found
            trail.append(found)
        return here, literal


def _layer(child: Folder | Link | int) -> int:
    if isinstance(child, Folder):
        return child.layer
    return (child.node if isinstance(child, Link) else child) >> _SHIFT


def _hide(folder: Folder, number: int) -> bool:
    """Remove what layers below `number` have in a folder; whether anything is left."""
    for name, child in list(folder.children.items()):
        if isinstance(child, Folder):
            if not _hide(child, number) and child.layer < number:
                del folder.children[name]
        elif _layer(child) < number:
            del folder.children[name]
    return bool(folder.children)


def walk_folders(root: Folder) -> Iterator[tuple[bytes, Folder]]:
    """Every folder below the root with its path, parents first, sorted by name."""
    pending = [(b"", root)]
    while pending:
        prefix, folder = pending.pop()
        if prefix:
            yield prefix, folder
        below = [(name, child) for name, child in folder.children.items() if isinstance(child, Folder)]
        for name, child in sorted(below, key=lambda pair: pair[0], reverse=True):
            pending.append((prefix + b"/" + name if prefix else name, child))


def _put_leaf(output: Output, layer: Layer, entry: tarfile.TarInfo, paths: list[bytes]) -> None:
    """A file with all its names: a regular one has them as hard links, of others each name is a file."""
    regular = entry.type in _LEAVES
    kind = tarfile.REGTYPE if regular else entry.type
    xattrs = xattrs_of(entry)
    for number, path in enumerate(paths):
        if regular and number:
            info = _info(path, tarfile.LNKTYPE, entry.mode, entry.uid, entry.gid, mtime_of(entry))
            info.linkname = _text(paths[0])
            _put(output, info, {})
            continue
        info = _info(path, kind, entry.mode, entry.uid, entry.gid, mtime_of(entry))
        if regular:
            info.size = entry.size
        elif kind == tarfile.SYMTYPE:
            info.linkname, info.mode = entry.linkname, 0o777
        elif kind != tarfile.FIFOTYPE:
            info.devmajor, info.devminor = entry.devmajor, entry.devminor
        _put(output, info, xattrs)
        if regular:
            _put_data(output, layer.data(entry), entry)


def _put_data(output: Output, data: IO[bytes], entry: tarfile.TarInfo) -> None:
    missing = entry.size
    while missing:
        block = data.read(min(missing, _BLOCK_BYTES))
        if not block:
            raise InputError(f"{entry.name!r:.200} ends {missing} bytes early")
        output.write(block)
        missing -= len(block)
    if padding := -entry.size % tarfile.BLOCKSIZE:
        output.write(bytes(padding))


def _text(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")


def _info(path: bytes, kind: bytes, mode: int, uid: int, gid: int, mtime: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(_text(path))
    info.type, info.mode, info.uid, info.gid, info.mtime = kind, mode & 0o7777, uid, gid, mtime
    return info


def _put(output: Output, info: tarfile.TarInfo, xattrs: dict[str, str]) -> None:
    """A header: GNU's form, whose names are bytes; PAX where there are extended attributes."""
    if xattrs:
        info.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in sorted(xattrs.items())}
        output.write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
    else:
        output.write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))


def put_file(output: Output, path: bytes, data: bytes, *, mode: int = 0o644) -> None:
    """A small file of root's, with time 0."""
    info = _info(path, tarfile.REGTYPE, mode, 0, 0, 0)
    info.size = len(data)
    _put(output, info, {})
    output.write(data + bytes(-len(data) % tarfile.BLOCKSIZE))

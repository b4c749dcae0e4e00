"""Layers merged: against umoci, which unpacks them; what leads out of the image is refused or stays inside."""

from __future__ import annotations

import os
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.errors import Differs, InputError
from apertus_nemo.image import layers as layers_module
from apertus_nemo.image.layout import Layout
from apertus_nemo.image.merge import read_tree
from apertus_nemo.image.squashfs import find_tool, make_squashfs
from tests.unit.image.images import PLATFORM, entry, layout_with, link, tar
from tests.unit.image.servers import needs

Listing = dict[str, tuple[Any, ...]]
LONG = "n" * 250
CAPABILITY = b"\x01\x00\x00\x02\x00\x04" + bytes(14)
ODD = b"\xff\xfe\x00\n=".decode("utf-8", "surrogateescape")


def xattrs(**values: str) -> dict[str, str]:
    return {f"SCHILY.xattr.{key.replace('__', '.')}": value for key, value in values.items()}


def listing(root: Path) -> Listing:
    """Everything below a folder: kind, mode, owner, group, time, content, target, device, attributes, inode's names."""
    inodes: dict[int, list[str]] = {}
    found: Listing = {}
    for parent, folders, files in os.walk(os.fsencode(root)):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            short = os.fsdecode(os.path.relpath(path, os.fsencode(root)))
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            content: bytes = b""
            if stat.S_ISREG(kind):
                with open(path, "rb") as file:
                    content = file.read()
                inodes.setdefault(status.st_ino, []).append(short)
            elif stat.S_ISLNK(kind):
                content = os.readlink(path)
            device = status.st_rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
            mode = status.st_mode if not stat.S_ISLNK(kind) else kind
            attributes = {key: os.getxattr(path, key, follow_symlinks=False) for key in _attributes(path)}
            found[short] = (mode, status.st_uid, status.st_gid, int(status.st_mtime), content, device, attributes)
    for names in inodes.values():
        for name in names:
            found[name] += (tuple(sorted(names)),)
    return found


def _attributes(path: bytes) -> list[str]:
    return [key for key in os.listxattr(path, follow_symlinks=False) if not key.startswith("user.rootlesscontainers")]


def ours(layout: Layout, folder: Path) -> Listing:
    """What our squashfs file holds, by unsquashfs."""
    needs("mksquashfs", "unsquashfs")
    image = layout.image(PLATFORM)
    target = folder / "ours.sqsh"
    make_squashfs(layout.blobs, image, target, tool=find_tool(os.environ), contents="plain")
    command = ["unsquashfs", "-quiet", "-no-progress", "-strict-errors", "-d", str(folder / "ours"), str(target)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return listing(folder / "ours")


def theirs(layout: Layout, folder: Path) -> Listing:
    """What umoci unpacks."""
    needs("umoci")
    subprocess.run(
        ["umoci", "unpack", "--image", f"{layout.root}:1", str(folder / "theirs")],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return listing(folder / "theirs" / "rootfs")


ROOT = [entry("./", mode=0o755), entry("a/"), entry("a/b", b"b" * 70_000), entry("a/c", b"c")]
CASES: dict[str, list[bytes]] = {
    "one": [tar(ROOT)],
    "later wins": [tar(ROOT), tar([entry("a/c", b"second", mode=0o4711, uid=7, gid=70000)])],
    "whiteout": [tar(ROOT), tar([entry("a/.wh.b", b"")])],
    "whiteout of a folder": [tar(ROOT), tar([entry(".wh.a", b"")])],
    "whiteout, then new": [tar(ROOT), tar([entry(".wh.a", b"")]), tar([entry("a"), entry("a/new", b"n")])],
    "opaque": [tar(ROOT), tar([entry("a", mode=0o700), entry("a/.wh..wh..opq", b""), entry("a/new", b"n")])],
    "opaque of deep folders": [
        tar([entry("a"), entry("a/b"), entry("a/b/c"), entry("a/b/c/d", b"d"), entry("a/x", b"x")]),
        tar([entry("a"), entry("a/.wh..wh..opq", b""), entry("a/b"), entry("a/b/new", b"n")]),
    ],
    "file becomes folder": [tar(ROOT), tar([entry("a/c"), entry("a/c/d", b"d")])],
    "folder becomes file": [tar(ROOT), tar([entry("a", b"now a file")])],
    "folder becomes link": [tar(ROOT), tar([link("a", "elsewhere")])],
    "hard links": [tar([*ROOT, link("a/h", "a/b", hard=True), link("h2", "a/b", hard=True)])],
    "hard link across layers": [tar(ROOT), tar([link("h", "a/b", hard=True)])],
    "hard link outlives its target": [
        tar([*ROOT, link("h", "a/b", hard=True)]),
        tar([entry("a/.wh.b", b"")]),
        tar([entry("a/b", b"another file")]),
    ],
    "below a link to a folder": [
        tar([entry("usr"), entry("usr/lib"), link("lib", "usr/lib"), link("abs", "/usr/lib")]),
        tar([entry("lib/x", b"x"), entry("abs/y", b"y")]),
    ],
    "absolute names": [tar([entry("/etc"), entry("/etc/passwd", b"root")])],
    "attributes": [
        tar([entry("f", b"f", pax_headers=xattrs(security__capability=CAPABILITY.decode("latin1"), user__x=ODD))])
    ],
    "special files": [
        tar(
            [
                entry("null", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
                entry("disk", b"", type=tarfile.BLKTYPE, devmajor=300, devminor=70_000),
                entry("pipe", type=tarfile.FIFOTYPE, mode=0o600),
            ]
        )
    ],
    "names": [
        tar([entry(LONG), entry(f"{LONG}/{LONG}"), entry(f"{LONG}/{LONG}/f", b"f"), entry("é ü", b"")]),
        tar(
            [entry(b"\xff\xfe".decode("utf-8", "surrogateescape"), b"x"), entry("new\nline", b"")],
            format=tarfile.GNU_FORMAT,
        ),
    ],
    "long links": [tar([entry("t/" + "x" * 150, b"x"), link("s", "y" * 300), link("h", "t/" + "x" * 150, hard=True)])],
    "odd times": [tar([entry("f", b"", mtime=1_600_000_000.75), entry("z", b"", mtime=0)])],
    "twice in a layer": [
        tar([entry("f", b"first"), entry("f", b"second"), entry("d", mode=0o700), entry("d", mode=0o711)])
    ],
    "an empty layer": [tar(ROOT), tar([])],
    "large owners": [tar([entry("f", b"", uid=2**31, gid=2**32 - 2)])],
}


@pytest.mark.parametrize("kind", ["gzip"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_what_umoci_unpacks(case: str, kind: str, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("owners, devices and attributes are made by root only")
    layout = layout_with(tmp_path / "l", *CASES[case], kind=kind)
    mine, other = ours(layout, tmp_path), theirs(layout, tmp_path)
    assert mine.keys() == other.keys()
    # umoci gives a folder that no layer names the time of day; ours has 0.
    implied = {name for name, found in mine.items() if stat.S_ISDIR(found[0]) and found[3] == 0}
    for name, found in mine.items():
        expected = other[name]
        if name in implied:
            assert found[4:] == expected[4:]
        else:
            assert found == expected, name


@pytest.mark.parametrize("kind", ["none", "gzip", "zstd"])
def test_compressions(kind: str, tmp_path: Path) -> None:
    layout = layout_with(tmp_path / "l", *CASES["opaque"], kind=kind)
    assert ours(layout, tmp_path)["a/new"][4] == b"n"


def test_sparse_files(tmp_path: Path) -> None:
    """GNU tar's three forms of sparse files."""
    source = tmp_path / "source"
    source.mkdir()
    with open(source / "holes", "wb") as file:
        for offset in range(0, 30):
            file.seek(offset * 1_000_000)
            file.write(b"data %d" % offset)
        file.truncate(40_000_000)
    expected = (source / "holes").read_bytes()
    layers = []
    for number, options in enumerate(
        (["--format=gnu"], *(["--format=posix", f"--sparse-version={v}"] for v in ("0.0", "0.1", "1.0")))
    ):
        (source / "holes").rename(source / f"holes{number}")
        command = ["tar", "-c", "--sparse", *options, "-C", str(source), f"holes{number}"]
        layers.append(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
        (source / f"holes{number}").rename(source / "holes")
        assert len(layers[-1]) < 1_000_000
    found = ours(layout_with(tmp_path / "l", *layers), tmp_path)
    for number in range(4):
        assert found[f"holes{number}"][4] == expected


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry("../x", b"")], "layer 1, entry 1: '../x' leads out of the image"),
        ([entry("a/../../x", b"")], "layer 1, entry 1: 'a/../../x' leads out of the image"),
        ([entry("/..", b"")], "layer 1, entry 1: '/..' leads out of the image"),
        ([link("h", "../../etc/passwd", hard=True)], "layer 1, entry 1: '../../etc/passwd' leads out of the image"),
        ([link("h", "/etc/passwd", hard=True)], "leads to '/etc/passwd', which is not there"),
        ([entry("a"), link("h", "a", hard=True)], "entry 2: the hard link 'h' leads to the folder 'a'"),
        ([entry("f", b""), link("h", "f/x", hard=True)], "the hard link 'h' leads to 'f/x', which is not there"),
        ([link("a", "b"), link("b", "a"), entry("a/x", b"")], "leads through more than 40 others"),
        ([entry("d/" * 401 + "x", b"")], "is more than 400 folders deep"),
        ([entry("x" * 256, b"")], "has a part of more than 255 bytes"),
        ([entry("x/" * 2100, b"")], "layer 1 (sha256:"),
        ([link("s", "")], "the symbolic link 's' has no target"),
        ([entry("./", b"")], "the root of the image is not a folder"),
        ([entry("f", b"", type=b"Z")], "'f' is of the unknown kind b'Z'"),
        ([entry("f", b"", type=tarfile.CHRTYPE, uid=2**32)], "its owner 4294967296 is not a number of a user"),
        ([entry("\x1b[31m/../x", b"")], r"'\x1b[31m/../x' leads out"),
        ([entry(".wh.", b"")], "the whiteout '.wh.' names nothing"),
        ([entry(".wh...", b"")], "the whiteout '.wh...' names nothing"),
    ],
)
def test_layers_that_no_image_may_have(
    entries: list[tuple[tarfile.TarInfo, bytes | None]], message: str, tmp_path: Path
) -> None:
    layout = layout_with(tmp_path / "l", tar(entries))
    with pytest.raises(InputError) as caught:
        read_tree(layout.blobs, layout.image(PLATFORM))
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_link_out_of_the_image_stays_inside(tmp_path: Path) -> None:
    """As in a container: `/etc` is the image's, and `..` of the root is the root."""
    layout = layout_with(
        tmp_path / "l",
        tar([entry("etc"), link("up", "../../../../etc"), link("abs", "/etc"), link("loop", "abs")]),
        tar([entry("up/one", b"1"), entry("abs/two", b"2"), entry("loop/three", b"3")]),
    )
    assert {"etc/one", "etc/two", "etc/three"} <= ours(layout, tmp_path).keys()


def broken(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not a tar archive" * 100, "entry 1 cannot be read: "),
        (broken(tar(ROOT), 512, b"garbage"), "entry 2 cannot be read: bad checksum"),
        (tar(ROOT)[:40_000], "entry 4 cannot be read: unexpected end of data"),
        (tar(ROOT) + b"more", "something follows the end of its archive"),
    ],
)
def test_archives_that_cannot_be_read(data: bytes, message: str, tmp_path: Path) -> None:
    layout = layout_with(tmp_path / "l", data)
    with pytest.raises(InputError) as caught:
        read_tree(layout.blobs, layout.image(PLATFORM))
    assert message in str(caught.value)


def test_a_header_bomb(tmp_path: Path) -> None:
    """An extended header of a gigabyte, and ten thousand extended headers one within the other."""
    info = entry("f", b"")[0]
    large = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    large[124:136] = b"10000000000\0"  # octal: a gigabyte
    large[156:157] = b"x"
    large[148:156] = b" " * 8
    large[148:156] = b"%06o\0 " % sum(large)
    layout = layout_with(tmp_path / "large", bytes(large) + bytes(10_000))
    with pytest.raises(InputError, match="its header has more than 4194304 bytes"):
        read_tree(layout.blobs, layout.image(PLATFORM))
    deep = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    deep[156:157] = b"L"
    deep[148:156] = b" " * 8
    deep[148:156] = b"%06o\0 " % sum(deep)
    layout = layout_with(tmp_path / "deep", bytes(deep) * 3000 + bytes(1024))
    with pytest.raises(InputError, match="cannot be read: its headers are nested too deep"):
        read_tree(layout.blobs, layout.image(PLATFORM))


def test_digests_of_layers_are_checked(tmp_path: Path) -> None:
    zeros = "sha256:" + "0" * 64
    layout = layout_with(tmp_path / "l", tar(ROOT), diff_ids=[zeros])
    with pytest.raises(Differs, match=f"the configuration says {zeros}"):
        read_tree(layout.blobs, layout.image(PLATFORM))
    layout = layout_with(tmp_path / "m", tar(ROOT))
    image = layout.image(PLATFORM)
    path = layout.blobs.path(image.manifest.layers[0].digest)
    for position in (0, 15, path.stat().st_size // 2, -1):
        before = path.read_bytes()
        changed = bytearray(before)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(layers_module.CorruptBlob, match="it was changed; remove it and pull again"):
            read_tree(layout.blobs, image)
        path.write_bytes(before)
    read_tree(layout.blobs, image)


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_streams_that_do_not_decompress(kind: str, tmp_path: Path) -> None:
    from tests.unit.image.images import compressed

    data = tar(ROOT)
    early = "ends early" if kind == "gzip" else "entry 1 cannot be read: "
    for stored, message in ((b"nothing of the kind", f"it is not {kind}"), (compressed(data, kind)[:-20], early)):
        layout = layout_with(tmp_path / f"{kind}{len(stored)}", data, kind=kind)
        image = layout.image(PLATFORM)
        bad = layout.blobs.write(stored, image.manifest.layers[0].media_type)
        object.__setattr__(image.manifest, "layers", (bad,))
        with pytest.raises(InputError, match=message):
            read_tree(layout.blobs, image)

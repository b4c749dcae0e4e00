"""The superblock of a squashfs file (version 4.0; kernel: fs/squashfs/squashfs_fs.h), and the time of its root folder.

mksquashfs 4.5.1 gives the root of a file made from a tar archive the time of day, whatever `-root-time` says. Its
inode table is written uncompressed (`-noI`, some tens of bytes a file), so that the one number can be set afterwards.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from apertus_nemo.errors import ApertusError, InputError
from apertus_nemo.record.files import reading, writing

_FORMAT = "<IIIIIHHHHHHQQQQQQQQ"
_SIZE = struct.calcsize(_FORMAT)
_MAGIC = 0x73717368  # "hsqs"
_UNCOMPRESSED = 0x8000  # in the header of a metadata block
_FOLDERS = (1, 8)  # kinds of inodes: a folder, an extended one
_MTIME_OFFSET = 8  # after kind, mode, owner and group
COMPRESSORS = {1: "gzip", 2: "lzma", 3: "lzo", 4: "xz", 5: "lz4", 6: "zstd"}


@dataclass(frozen=True)
class Superblock:
    """What the first 96 bytes say."""

    inodes: int
    block_bytes: int
    compressor: str
    size_bytes: int  # without the padding to 4 KiB
    root_inode: int
    inode_table: int


def read_superblock(path: Path) -> Superblock:
    """Raises InputError where the file is no squashfs, or shorter than it says."""
    with reading(path), open(path, "rb") as file:
        data = file.read(_SIZE)
        size = file.seek(0, 2)
    if len(data) < _SIZE or struct.unpack_from("<I", data)[0] != _MAGIC:
        raise InputError(f"{path} is not a squashfs file")
    fields = struct.unpack(_FORMAT, data)
    major, minor, root_inode, used, _, _, inode_table = fields[9:16]
    if (major, minor) != (4, 0):
        raise InputError(f"{path}: squashfs {major}.{minor} is not read; 4.0 is")
    if used > size:
        raise InputError(f"{path} is cut off: it has {size} bytes and should have {used}")
    return Superblock(
        inodes=fields[1],
        block_bytes=fields[3],
        compressor=COMPRESSORS.get(fields[5], f"number {fields[5]}"),
        size_bytes=used,
        root_inode=root_inode,
        inode_table=inode_table,
    )


def set_root_time(path: Path, seconds: int) -> None:
    """Set the time of the root folder, in a file whose inode table is not compressed."""
    block = read_superblock(path)
    start = block.inode_table + (block.root_inode >> 16)
    inode = start + 2 + (block.root_inode & 0xFFFF)
    with writing(path), open(path, "r+b") as file:
        file.seek(start)
        (header,) = struct.unpack("<H", file.read(2))
        file.seek(inode)
        (kind,) = struct.unpack("<H", file.read(2))
        if not header & _UNCOMPRESSED or kind not in _FOLDERS:
            raise ApertusError(f"{path}: the root folder is not where the squashfs format has it")
        file.seek(inode + _MTIME_OFFSET)
        file.write(struct.pack("<I", seconds))

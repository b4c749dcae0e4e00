"""The way into an image, as a process: `python -m apertus_nemo.image.enter SPEC`; `image/inside.py` starts it.

It makes namespaces of its own (mounts, network, processes, IPC, host name; and users, where it is not root's), mounts
the image read-only as its root, and runs one command there, or reads files. What it mounts is gone with its last
process, however that ends, since nobody else sees it. Standard library alone, all loaded before the root changes.

SPEC is JSON: {"launcher": pid, "errors": descriptor, "image": descriptor or null, "folder": path, "command": [...],
"environment": {...}, "read": [...] or null}. `image` is an open squashfs file, which is mounted on `folder`; without
one, `folder` is the root itself. What cannot be set up is one line in `errors`.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import stat
import struct
import sys
from typing import Any

NOBODY = 65534
MAX_BYTES = 16 * 2**20  # of a file that is read

_LIBC = ctypes.CDLL(None, use_errno=True)
# linux/sched.h
_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
# linux/mount.h
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_DETACH = 2
# linux/prctl.h
_SET_PDEATHSIG, _CAPBSET_DROP, _SET_NO_NEW_PRIVS = 1, 24, 38
# linux/loop.h
_LOOP_SET_FD, _LOOP_CLR_FD, _LOOP_SET_STATUS64, _LOOP_CTL_GET_FREE = 0x4C00, 0x4C01, 0x4C04, 0x4C82
_LO_READ_ONLY, _LO_AUTOCLEAR = 1, 4
# linux/sockios.h, linux/if.h
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_DEVICES = ("full", "null", "random", "urandom", "zero")


class Refused(Exception):
    """The machine does not allow it."""


def main(text: str) -> int:
    """Set up, run, and end as the command ends."""
    spec: dict[str, Any] = json.loads(text)
    try:
        return _main(spec)
    except Refused as error:
        os.write(spec["errors"], str(error).encode())
    except OSError as error:
        os.write(spec["errors"], f"{error.strerror}{f': {error.filename}' if error.filename else ''}".encode())
    return 1


def _main(spec: dict[str, Any]) -> int:
    _prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != spec["launcher"]:
        return 1
    user, group, root = os.getuid(), os.getgid(), os.geteuid() == 0
    spaces = _NEWNS | _NEWNET | _NEWPID | _NEWIPC | _NEWUTS
    _call("namespaces are not allowed", _LIBC.unshare, spaces if root else spaces | _NEWUSER)
    if not root:
        for name, line in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    first = os.fork()  # the first process of the new namespace: all others die with it
    if first == 0:
        try:
            os._exit(_first(spec, root=root))
        except Refused as error:
            os.write(spec["errors"], str(error).encode())
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            os.write(spec["errors"], f"{error.strerror}{where}".encode())
        finally:
            os._exit(1)
    _, status = os.waitpid(first, 0)
    return os.waitstatus_to_exitcode(status)


def _first(spec: dict[str, Any], *, root: bool) -> int:
    _prctl(_SET_PDEATHSIG, signal.SIGKILL)
    _mount(None, "/", None, _REC | _PRIVATE)
    folder = spec["folder"]
    if spec["image"] is not None:
        _mount_squashfs(spec["image"], folder)
    else:
        _mount(folder, folder, None, _BIND | _REC)
        _mount(None, folder, None, _BIND | _REMOUNT | _RDONLY | _NOSUID | _NODEV)
    _furnish(folder)
    _loopback()
    with contextlib.suppress(OSError):
        socket.sethostname("image")
    os.chdir(folder)
    _call("the root cannot be changed", _LIBC.pivot_root, b".", b".")
    _call("the old root cannot be left", _LIBC.umount2, b".", _DETACH)
    os.chdir("/")
    if spec["read"] is not None:
        _read(spec["read"])
        return 0
    child = os.fork()
    if child == 0:
        _execute(spec, root=root)
    while True:  # what others leave behind is this process's to collect
        found, status = os.wait()
        if found == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _mount_squashfs(image: int, folder: str) -> None:
    """Mount an open file: a loop device that is free again once the mount is gone."""
    for _ in range(20):  # another process may take the device that was free
        with open("/dev/loop-control", "rb") as control:
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
        device = f"/dev/loop{number}"
        if not os.path.exists(device):
            raise Refused(f"there is no {device}")
        opened = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(opened, _LOOP_SET_FD, image)
        except OSError:
            os.close(opened)
            continue
        try:
            # struct loop_info64: lo_flags is its 14th of 32-bit words, after five of 64 and four of 32 bits.
            status = struct.pack("=QQQQQIIII64s64s32sQQ", *[0] * 8, _LO_READ_ONLY | _LO_AUTOCLEAR, b"", b"", b"", 0, 0)
            fcntl.ioctl(opened, _LOOP_SET_STATUS64, status)
            _mount(device, folder, "squashfs", _RDONLY | _NOSUID | _NODEV)
        except BaseException:
            with contextlib.suppress(OSError):
                fcntl.ioctl(opened, _LOOP_CLR_FD)
            raise
        finally:
            os.close(opened)
        return
    raise Refused("no loop device is free")


def _furnish(folder: str) -> None:
    """What a root needs beside its files: processes, a few devices, and memory to write into."""
    for name in ("dev", "proc", "tmp"):
        if os.path.islink(f"{folder}/{name}") or not os.path.isdir(f"{folder}/{name}"):
            raise Refused(f"the image has no folder /{name}")
    _mount("proc", f"{folder}/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
    if os.path.isdir(f"{folder}/sys") and not os.path.islink(f"{folder}/sys"):
        with contextlib.suppress(Refused):  # libraries read the processor's features there, or elsewhere
            _mount("sysfs", f"{folder}/sys", "sysfs", _RDONLY | _NOSUID | _NODEV | _NOEXEC)
    _mount("tmpfs", f"{folder}/tmp", "tmpfs", _NOSUID | _NODEV, "mode=1777")
    _mount("tmpfs", f"{folder}/dev", "tmpfs", _NOSUID | _NOEXEC, "mode=755,size=64k")
    for name in _DEVICES:
        os.close(os.open(f"{folder}/dev/{name}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        _mount(f"/dev/{name}", f"{folder}/dev/{name}", None, _BIND)
    os.mkdir(f"{folder}/dev/shm")
    _mount("tmpfs", f"{folder}/dev/shm", "tmpfs", _NOSUID | _NODEV | _NOEXEC, "mode=1777")
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(f"/proc/self/{target}", f"{folder}/dev/{name}")


def _loopback() -> None:
    """The one network device that there is: ranks meet over it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def _execute(spec: dict[str, Any], *, root: bool) -> None:
    """Become the command, with no right that it could use against this machine; never returns."""
    try:
        _prctl(_SET_NO_NEW_PRIVS, 1)
        for capability in range(64):
            if _LIBC.prctl(_CAPBSET_DROP, capability, 0, 0, 0) != 0:
                break
        if root:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        os.umask(0o022)
        for descriptor in (spec["errors"], spec["image"]):
            if descriptor is not None:
                os.set_inheritable(descriptor, False)
        command = spec["command"]
        os.execve(command[0], command, spec["environment"])
    except OSError as error:
        os.write(spec["errors"], f"{spec['command'][0]} cannot be run in the image: {error.strerror}".encode())
    finally:
        os._exit(127)


def _read(names: list[str]) -> None:
    """Print the content of regular files as JSON, base64; null for what is none, or too large."""
    found: dict[str, str | None] = {}
    for name in names:
        found[name] = None
        with contextlib.suppress(OSError):
            descriptor = os.open(f"/{name}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb") as file:
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    data = file.read(MAX_BYTES + 1)
                    found[name] = base64.b64encode(data).decode() if len(data) <= MAX_BYTES else None
    sys.stdout.write(json.dumps(found))
    sys.stdout.flush()


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    arguments = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    what = f"{kind or source or target} cannot be mounted"
    _call(what, _LIBC.mount, *arguments, ctypes.c_ulong(flags), options.encode() or None)


def _prctl(option: int, value: int) -> None:
    _call("the kernel refuses prctl", _LIBC.prctl, option, value, 0, 0, 0)


def _call(what: str, function: Any, *arguments: Any) -> None:
    if function(*arguments) != 0:
        raise Refused(f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

"""What `enroot import` adds to an image, so that a `.sqsh` starts with the image's environment and command.

Enroot keeps an image's configuration in the root file system: `/etc/environment` (its ENV), `/etc/fstab` (its volumes),
`/etc/rc` (labels, working directory, entrypoint, command) and `/etc/rc.local`; see NVIDIA/enroot, src/docker.sh,
`docker::configure`. Pyxis and the Container Engine start through them. Here they depend on the image alone: where
Enroot notes the address, this notes the manifest digest. An image of ours gets it as a file as well, for the locks of
runs (`record/image.py`): no image can hold its own.
"""

from __future__ import annotations

import shlex

from apertus_nemo.errors import InputError
from apertus_nemo.image.layout import Image
from apertus_nemo.image.oci import LOCK_LABEL
from apertus_nemo.record.image import FOLDER, MANIFEST

_RC_LOCAL = """\
# This file is sourced by /etc/rc when the container starts.
# It can be used to manipulate the entrypoint or the command of the container.
"""


def enroot_files(image: Image, *, what: str) -> dict[bytes, bytes]:
    """Path in the image -> content. Raises InputError where the configuration cannot be said in these files."""
    config = image.config
    for label, lines in (
        ("Env", config.environment),
        ("Volumes", config.volumes),
        ("WorkingDir", [config.working_dir]),
    ):
        if any("\n" in line or "\r" in line for line in lines):
            raise InputError(f"{what}: its configuration has a line break in {label}, which Enroot's files cannot hold")
    for line in config.environment:
        name, equals, _ = line.partition("=")
        if not equals or not name:
            raise InputError(f"{what}: its configuration has {line!r:.100} in Env, which is not NAME=value")
    environment = "".join(f"{line}\n" for line in config.environment)
    volumes = "".join(
        f"${{ENROOT_ROOTFS}}{volume} {volume} none x-create=dir,bind,rw,nosuid,nodev\n" for volume in config.volumes
    )
    files = {
        b"etc/environment": environment.encode(),
        b"etc/fstab": volumes.encode(),
        b"etc/rc": _rc(image).encode(),
        b"etc/rc.local": _RC_LOCAL.encode(),
    }
    if LOCK_LABEL in config.labels:
        files[f"{FOLDER.relative_to('/')}/{MANIFEST}".encode()] = f"{image.descriptor.digest}\n".encode()
    return files


def _rc(image: Image) -> str:
    config = image.config
    labels = "".join(
        f"# {key} {value}".replace("\n", " ").replace("\r", " ") + "\n" for key, value in sorted(config.labels.items())
    )
    folder = shlex.quote(config.working_dir or "/")
    entrypoint = "".join(f"{shlex.quote(word)} " for word in config.entrypoint)
    command = " ".join(shlex.quote(word) for word in config.command)
    if not entrypoint and not command:
        command = "/bin/sh"
    return f"""\
# enroot-provenance: {image.descriptor.digest}
{labels}
mkdir -p {folder} 2> /dev/null
cd {folder} && unset OLDPWD || exit 1

if [ -s /etc/rc.local ]; then
    . /etc/rc.local
fi

if [ $# -gt 0 ]; then
    exec {entrypoint}"$@"
else
    exec {entrypoint}{command}
fi
"""

"""podman, buildah and skopeo with a store of their own, which leaves nothing mounted behind.

Each command runs in a mount namespace of its own, with runc and without networks, so that it works on machines with
hybrid cgroups and without the right to raise limits.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.unit.image.servers import needs, needs_mounts

_ENGINE = """\
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]
netns = "host"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "none"
"""


@dataclass(frozen=True)
class Engines:
    """A store below `folder`."""

    folder: Path

    @classmethod
    def create(cls, folder: Path) -> Engines:
        """Needs root, and the tools."""
        needs("buildah", "podman", "skopeo", "runc")
        needs_mounts()
        (folder / "containers.conf").write_text(_ENGINE)
        (folder / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/graph"\nrunroot = "{folder}/run"\n'
        )
        return cls(folder)

    def run(self, *command: str | Path, limit_s: float = 60) -> str:
        """What a command prints; fails with what it says."""
        environment = {
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "HOME": str(self.folder),
            "CONTAINERS_CONF": f"{self.folder}/containers.conf",
            "CONTAINERS_STORAGE_CONF": f"{self.folder}/storage.conf",
        }
        done = subprocess.run(
            ["unshare", "--mount", *map(str, command)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

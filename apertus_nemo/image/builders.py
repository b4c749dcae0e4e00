"""Programs that build from a Containerfile: buildah, podman or docker, each in a storage of the build's own.

    builder = make_builder(find_builder(None), work)    # the first that is there
    builder.build(text, context, target, stage="stack", platform=platform, epoch=epoch, base=None)

What comes out is an OCI layout at `target` with one image, its layers compressed with gzip. Nothing of the machine's
own images, caches or settings is used or changed, and nothing has a network.
"""

from __future__ import annotations

import json
import os
import tarfile
from abc import ABC, abstractmethod
from pathlib import Path

from apertus_nemo.errors import InputError, UnfitEnvironment
from apertus_nemo.image.containerfile import BASE
from apertus_nemo.image.programs import find_program, plain_environment, run
from apertus_nemo.record.files import writing

BUILDERS = ("buildah", "podman", "docker")
_LIMIT_S = 4 * 3600.0  # emulated builds are slow
_POLICY = {"default": [{"type": "insecureAcceptAnything"}]}  # bases are named by digest; nothing else is pulled


def find_builder(name: str | None) -> str:
    """`name`, or the first that this machine has. Raises UnfitEnvironment, InputError."""
    if name is not None and name not in BUILDERS:
        raise InputError(f"there is no builder {name!r}; there are {', '.join(BUILDERS)}")
    for one in BUILDERS if name is None else (name,):
        try:
            find_program(one)
        except UnfitEnvironment:
            if name is not None:
                raise
        else:
            return one
    raise UnfitEnvironment("this machine has none of buildah, podman and docker; as root: apt-get install buildah")


def make_builder(name: str, work: Path) -> Builder:
    """One that works below `work`."""
    return Docker(work) if name == "docker" else Buildah(name, work)


class Builder(ABC):
    """What builds one image after the other, in a folder of its own."""

    name = ""

    def __init__(self, work: Path) -> None:
        self.work = work

    def version(self) -> str:
        """As the program says it."""
        return run([self.name, "--version"], what=f"asking {self.name} for its version").strip()

    @abstractmethod
    def build(
        self, text: str, context: Path, target: Path, *, stage: str, platform: str, epoch: int, base: Path | None
    ) -> None:
        """Build `stage` of a Containerfile; `base` is a layout whose image "base" stands for `containerfile.BASE`."""


class Buildah(Builder):
    """buildah, or podman, which is built on it."""

    def __init__(self, name: str, work: Path) -> None:
        super().__init__(work)
        self.name = name
        folder = work / "containers"
        (folder / "tmp").mkdir(parents=True)
        storage = f'driver = "{_driver()}"\ngraphroot = "{folder / "storage"}"\nrunroot = "{folder / "run"}"\n'
        (folder / "storage.conf").write_text(f"[storage]\n{storage}")
        engine = (
            f'runtime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\ntmp_dir = "{folder / "libpod"}"\n'
        )
        (folder / "containers.conf").write_text(f'[containers]\nnetns = "host"\n[engine]\n{engine}')
        (folder / "registries.conf").write_text("")
        (folder / "policy.json").write_text(json.dumps(_POLICY))
        self._folder = folder

    def _run(self, *arguments: str | Path, what: str, epoch: int, online: bool = False, log: bool = False) -> str:
        environment = plain_environment(
            epoch,
            CONTAINERS_CONF=str(self._folder / "containers.conf"),
            CONTAINERS_REGISTRIES_CONF=str(self._folder / "registries.conf"),
            CONTAINERS_STORAGE_CONF=str(self._folder / "storage.conf"),
            HOME=str(self._folder),
            TMPDIR=str(self._folder / "tmp"),
            XDG_RUNTIME_DIR=str(self._folder / "run"),
        )
        return run(
            [self.name, *arguments],
            what=what,
            environment=environment,
            folder=self._folder,
            limit_s=_LIMIT_S,
            log=self.work / f"{self.name}.log" if log else None,
            apart=not online,
        )

    def build(
        self, text: str, context: Path, target: Path, *, stage: str, platform: str, epoch: int, base: Path | None
    ) -> None:
        """As the class says; a stage is one layer."""
        what, image = f"building {stage} for {platform}", f"localhost/made-{stage}"
        policy: list[str | Path] = ["--signature-policy", self._folder / "policy.json"]
        if base is not None:
            # It becomes a name in the storage: a plain one, whatever the folder is called.
            (self._folder / "base").symlink_to(base)
            number = self._run("pull", "--quiet", *policy, "oci:base:base", what=what, epoch=epoch).split()[-1]
            self._run("tag", number, BASE, what=what, epoch=epoch)
        file = self._folder / f"Containerfile.{stage}"
        file.write_text(text)
        online = "FROM scratch" not in text  # the base is in a registry
        command: list[str | Path] = ["build", "--isolation", "chroot", "--no-cache", "--layers=false"]
        command += ["--format", "oci", "--identity-label=false", "--timestamp", str(epoch), "--platform", platform]
        command += [*policy, "--target", stage, "--tag", image, "--file", file]
        self._run(*command, context, what=what, epoch=epoch, online=online, log=True)
        push: list[str | Path] = ["push", "--quiet", *policy, "--format", "oci"]
        self._run(*push, image, f"oci:{target}:{stage}", what=what, epoch=epoch)


class Docker(Builder):
    """docker with buildx 0.13 or newer. Written by its documentation; it has not been run."""

    name = "docker"

    def build(
        self, text: str, context: Path, target: Path, *, stage: str, platform: str, epoch: int, base: Path | None
    ) -> None:
        """As the class says; an instruction that writes files is a layer."""
        what = f"building {stage} for {platform}"
        file, archive = self.work / f"Containerfile.{stage}", self.work / f"{stage}.tar"
        file.write_text(text)
        command: list[str | Path] = ["docker", "buildx", "build", "--no-cache", "--provenance=false", "--sbom=false"]
        command += ["--platform", platform, "--target", stage, "--file", file, "--progress", "plain"]
        command += ["--build-arg", f"SOURCE_DATE_EPOCH={epoch}"]
        command += ["--output", f"type=oci,dest={archive},name={stage},compression=gzip,rewrite-timestamp=true"]
        if base is not None:
            command += ["--build-context", f"{BASE}=oci-layout://{base}:base"]
        run([*command, context], what=what, limit_s=_LIMIT_S, log=self.work / "docker.log")
        with writing(target), tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")
        archive.unlink()


def _driver() -> str:
    """overlay for root, where the kernel has it; else vfs, which copies."""
    try:
        known = Path("/proc/filesystems").read_text()
    except OSError:
        known = ""
    return "overlay" if os.geteuid() == 0 and "\toverlay\n" in known else "vfs"

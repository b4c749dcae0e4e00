"""Places where an image is started: engine, processor, network, folders. Each row has its sources.

Facts were read in public documentation (cscs-docs of 2026-08), none on the machines: `docs/edf.md` says what to look at
before the first run.
"""

from __future__ import annotations

from dataclasses import dataclass

from apertus_nemo.edf.dialects import CE, Dialect
from apertus_nemo.errors import InputError

# Processors as `uname -m` prints them, and as images name them.
PLATFORMS = {"aarch64": "linux/arm64", "x86_64": "linux/amd64"}

# Layers of `settings.py`.
_GPU_LAYERS = ("slingshot", "framework", "python")


@dataclass(frozen=True)
class Site:
    """A cluster, or a kind of cluster."""

    name: str
    title: str
    engine: str  # "ce": reads EDFs; "pyxis": does not, and gets a shell file
    architecture: str  # as `uname -m` prints it; "" where a kind of cluster leaves it open
    slingshot: bool
    netstack_default: str  # com.hooks.netstack.source where an EDF says nothing; "" without the hooks
    netstack: tuple[str, str, str] | None  # source, version, name that rendered EDFs pin
    mounts: tuple[str, ...]
    notes: tuple[str, ...]
    sources: tuple[str, ...]


CLARIDEN = Site(
    name="clariden",
    title="Clariden (Alps, CSCS)",
    engine="ce",
    architecture="aarch64",
    slingshot=True,
    netstack_default="artifact",
    netstack=("artifact", "26.05.1", "gpu:cuda13,cxi:12.0.1,ofi:2.5.1,aws:1.18.0+dl"),
    mounts=(
        "/capstor/scratch/cscs/${USER}:/capstor/scratch/cscs/${USER}",
        "/iopsstor/scratch/cscs/${USER}:/iopsstor/scratch/cscs/${USER}",
    ),
    notes=("the network stack is the default documented for GH200 in 2026-05; the SHS of Clariden is not published",),
    sources=("cscs-docs, clusters/clariden.md, container-engine/resource-hook.md, platforms/mlp/index.md",),
)

DAINT = Site(
    name="daint",
    title="Daint (Alps, CSCS)",
    engine="ce",
    architecture="aarch64",
    slingshot=True,
    netstack_default="artifact",
    netstack=("artifact", "26.05.1", "gpu:cuda13,cxi:13.1.0,ofi:2.5.1,aws:1.18.0+dl"),
    mounts=("${SCRATCH}:${SCRATCH}",),
    notes=("the build for SHS 13.1.0, which Daint runs since 2026-06-17",),
    sources=("cscs-docs, clusters/daint.md, container-engine/resource-hook.md",),
)

BRISTEN = Site(
    name="bristen",
    title="Bristen (Alps, CSCS): A100",
    engine="ce",
    architecture="x86_64",
    slingshot=True,
    netstack_default="host",
    netstack=None,  # artifacts are supported on GH200 only
    mounts=("${SCRATCH}:${SCRATCH}",),
    notes=("network stack artifacts are supported on GH200 only; the host's libraries want glibc 2.38 in the image",),
    sources=("cscs-docs, clusters/bristen.md, container-engine/resource-hook.md",),
)

PYXIS = Site(
    name="pyxis",
    title="any cluster with Enroot and Pyxis",
    engine="pyxis",
    architecture="",
    slingshot=False,
    netstack_default="",
    netstack=None,
    mounts=(),
    notes=("no settings of a network: they belong to the cluster",),
    sources=("NVIDIA/pyxis 0.24.0 README", "NVIDIA/enroot v4.1.2 doc/configuration.md"),
)

PYXIS_SLINGSHOT = Site(
    name="pyxis-slingshot",
    title="GH200 and Slingshot with Enroot and Pyxis",
    engine="pyxis",
    architecture="aarch64",
    slingshot=True,
    netstack_default="",
    netstack=None,
    mounts=(),
    notes=(
        "no hook brings libfabric and NCCL's plugin: they are the image's, or are mounted; NCCL fails without them",
    ),
    sources=("NVIDIA/pyxis 0.24.0 README", "NVIDIA/enroot v4.1.2 doc/configuration.md"),
)

SITES = {site.name: site for site in (CLARIDEN, DAINT, BRISTEN, PYXIS, PYXIS_SLINGSHOT)}


@dataclass(frozen=True)
class Family:
    """What an EDF must know of an image family; `containers/` says the rest."""

    name: str
    architectures: tuple[str, ...]
    gpu: bool
    cuda_major: int | None
    netstack: str  # "site": the hooks bring it; "": none is used


FAMILIES = {
    family.name: family
    for family in (
        Family("gh200", ("aarch64",), True, 13, "site"),
        Family("cpu", ("x86_64", "aarch64"), False, None, ""),
    )
}


def site_named(name: str) -> Site:
    """A row of SITES. Raises InputError."""
    if name not in SITES:
        raise InputError(f"{name!r} is not a site; there are {', '.join(SITES)}")
    return SITES[name]


def layers(family: Family, site: Site, dialect: Dialect = CE) -> tuple[str, ...]:
    """The layers of settings that an image of the family gets at the site."""
    if not family.gpu:
        return ("python", "no-host-slurm") if site.engine == "ce" and dialect is CE else ("python",)
    return _GPU_LAYERS if site.slingshot else ("framework", "python")


def fit(family: Family, site: Site) -> str | None:
    """Why the family cannot run at the site, or None."""
    if site.architecture and site.architecture not in family.architectures:
        return f"{family.name} is built for {', '.join(family.architectures)}; {site.name} is {site.architecture}"
    return None

"""Two engines read EDFs and do not read them alike: what differs, with the reason and the source.

`CE` is the Container Engine in production (Enroot and CSCS's Pyxis), `SARUS` is Sarus Suite (Podman, raster), which is
to follow it and is in early access. Nothing else in this package asks which engine it is: it asks a field.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from apertus_nemo.errors import InputError


@dataclass(frozen=True)
class Dialect:
    """How one engine reads an EDF."""

    name: str
    title: str
    sqsh_image: bool
    short_mounts: bool
    sqsh_mounts: bool
    flag_separator: str
    expands_image: bool
    bash_variables: bool
    undefined_variable: str
    quoted_strings_only: bool
    entrypoint_default: bool | None
    splits_search_path: bool
    system_folder: str
    image_or_base_needed: bool
    devices: bool
    cxi_default: bool
    plugin_brings_cxi: bool
    netstack_selectable: bool
    hooks: tuple[str, ...]
    launch_option: str


CE = Dialect(
    name="ce",
    title="Container Engine",
    sqsh_image=True,
    short_mounts=True,
    sqsh_mounts=True,
    flag_separator="+",
    expands_image=True,
    bash_variables=False,
    undefined_variable="an error",
    quoted_strings_only=True,
    entrypoint_default=False,
    splits_search_path=True,
    system_folder="",
    image_or_base_needed=False,
    devices=False,
    cxi_default=True,
    plugin_brings_cxi=True,
    netstack_selectable=True,
    hooks=("aws_ofi_nccl", "cxi", "netstack", "nvidia_cuda_mps", "ssh"),
    launch_option="--environment",
)

SARUS = Dialect(
    name="sarus",
    title="Sarus Suite",
    sqsh_image=False,
    short_mounts=False,
    sqsh_mounts=False,
    flag_separator=",",
    expands_image=False,
    bash_variables=True,
    undefined_variable="the whole value becomes empty",
    quoted_strings_only=False,
    entrypoint_default=None,
    splits_search_path=False,
    system_folder="/etc/edf",
    image_or_base_needed=True,
    devices=True,
    cxi_default=False,
    plugin_brings_cxi=False,
    netstack_selectable=False,
    hooks=("aws_ofi_nccl", "cxi", "dcgm", "nvidia_cuda_mps", "slurm"),
    launch_option="--edf",
)

DIALECTS = {dialect.name: dialect for dialect in (CE, SARUS)}

_GUIDE = "cscs-docs, container-engine/sarus-suite/user-guide.md (2026-08)"
_REFERENCE = "cscs-docs, container-engine/edf.md (2026-08)"
_HOOKS = "cscs-docs, container-engine/resource-hook.md (2026-08)"
_RASTER = "sarus-suite/raster 20f75bd"

# field -> (what it is, reason, source)
DIFFERENCES: dict[str, tuple[str, str, str]] = {
    "sqsh_image": ("image may be a SquashFS file", "Podman starts images from its store only", _GUIDE),
    "short_mounts": (
        'a mount may be a source alone, "/capstor"',
        "works in production and stands in CSCS's tutorials, not in its reference; raster wants SOURCE:DESTINATION",
        f"cscs-docs, tutorials/ml/llm-inference.md; {_RASTER} src/schema/edf.json",
    ),
    "sqsh_mounts": ("mounts with the flag sqsh", "not supported yet by Sarus Suite", _GUIDE),
    "flag_separator": (
        "between the flags of a mount",
        "the reference documents +; raster splits at commas",
        f"{_REFERENCE}; {_RASTER} src/mount.rs",
    ),
    "expands_image": (
        "variables in image are expanded",
        "raster expands devices, env, annotations, workdir and mounts only",
        f"{_REFERENCE}; {_RASTER} src/lib.rs",
    ),
    "bash_variables": (
        "$VAR and other forms of bash, beside ${VAR} and ${VAR:-}; then $${VAR} is not the text ${VAR}",
        "Sarus Suite lets a restricted bash expand, without commands",
        f"{_REFERENCE}; {_GUIDE}; {_RASTER} src/common.rs",
    ),
    "undefined_variable": (
        "a variable that is not set is",
        "raster's bash ends at it, and raster does not look at bash's exit status",
        f"{_REFERENCE}; {_RASTER} src/common.rs",
    ),
    "quoted_strings_only": (
        "values of annotations must be strings",
        "raster turns others into text",
        f"{_HOOKS}; {_RASTER} src/lib.rs map2hashmap",
    ),
    "entrypoint_default": (
        "entrypoint, where it is not written",
        "raster's schema says false and its code says true",
        f"{_REFERENCE}; {_RASTER} src/lib.rs get_default_entrypoint, src/schema/edf.json",
    ),
    "splits_search_path": (
        "EDF_PATH may hold several folders",
        "raster takes all of EDF_PATH for one folder",
        f"cscs-docs, container-engine/run.md; {_RASTER} src/lib.rs get_user_search_paths",
    ),
    "system_folder": ("folder that is searched last", "a setting of raster's", f"{_RASTER} src/config.rs"),
    "image_or_base_needed": (
        "image or base_environment must stand in every file",
        "raster checks each file of a chain; without an image the Container Engine enters no container",
        f"{_REFERENCE}; {_RASTER} src/schema/edf.json",
    ),
    "devices": ("the key devices", "Podman mounts no devices by itself", _GUIDE),
    "cxi_default": ("hook cxi without an annotation", "no hook is on by default in Sarus Suite", f"{_HOOKS}; {_GUIDE}"),
    "plugin_brings_cxi": (
        "hook aws_ofi_nccl enables cxi",
        "each is enabled by itself in Sarus Suite",
        f"{_HOOKS}; {_GUIDE}",
    ),
    "netstack_selectable": (
        "com.hooks.netstack.* and the variant of the plugin have an effect",
        "Sarus Suite mounts one fixed network stack artifact",
        f"{_HOOKS}; {_GUIDE}",
    ),
    "hooks": ("hooks that annotations control", "the list of each engine's documentation", f"{_HOOKS}; {_GUIDE}"),
    "launch_option": ("option of srun", "two plugins of Slurm", _GUIDE),
}


def dialect_named(name: str) -> Dialect:
    """`CE` or `SARUS`. Raises InputError."""
    if name not in DIALECTS:
        raise InputError(f"{name!r} is not a dialect; there are {', '.join(DIALECTS)}")
    return DIALECTS[name]


def table() -> list[tuple[str, str, str, str, str]]:
    """(what, Container Engine, Sarus Suite, reason, source) of everything that differs."""
    return [
        (what, shown(getattr(CE, name)), shown(getattr(SARUS, name)), reason, source)
        for name, (what, reason, source) in DIFFERENCES.items()
    ]


def shown(value: object) -> str:
    """A field of a dialect, as text."""
    if value is None:
        return "documented false, true in the code"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, tuple) else str(value) or "none"


def undocumented() -> set[str]:
    """Fields without a row in DIFFERENCES; a test holds it empty."""
    return {entry.name for entry in fields(Dialect)} - {"name", "title"} - set(DIFFERENCES)

"""Write what starts an image at a site: an EDF, or a shell file where Pyxis reads none.

    for file in render("gh200-1.0.0", CLARIDEN, pin="/capstor/.../gh200-1.0.0-<sha256>.sqsh"): ...
    for file in render("gh200", CLARIDEN): ...     # the settings alone, for base_environment

An EDF that pins a digest which nobody built would be the worst defect of all: without a pin, an image of a version is
refused, and what the repository carries in `edf/` are the settings of each family and site, without an image.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass

from apertus_nemo.edf.check import View, check_document
from apertus_nemo.edf.described import Described
from apertus_nemo.edf.dialects import CE, SARUS, Dialect
from apertus_nemo.edf.document import parse_document
from apertus_nemo.edf.finding import ERROR, WARNING, short
from apertus_nemo.edf.settings import BY_NAME, variables
from apertus_nemo.edf.sites import FAMILIES, SITES, Family, Site, fit, layers
from apertus_nemo.errors import ApertusError, InputError
from apertus_nemo.image.families import find

_BY_DIGEST = re.compile(
    r"(?:[A-Za-z0-9.-]+(?::\d+)?[#/])?[a-z0-9]+(?:[._/-]+[a-z0-9]+)*(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?@sha256:[0-9a-f]{64}"
)
_BY_CONTENT = re.compile(r"/[A-Za-z0-9._/+-]*(?<![0-9a-f])[0-9a-f]{12,64}(?![0-9a-f])[A-Za-z0-9._+-]*\.sqsh")


@dataclass(frozen=True)
class Rendered:
    """One file, complete."""

    name: str
    text: str


def parse_image(image: str) -> tuple[Family, str | None]:
    """(family, version) of `gh200-1.0.0` or `gh200`. Raises InputError, also for a version that there is not."""
    found = find(image)
    if found.family not in FAMILIES:
        raise InputError(f"no settings are known for the family {found.family}; there are {', '.join(FAMILIES)}")
    return FAMILIES[found.family], None if image == found.family else found.version


def check_pin(pin: str, dialect: Dialect) -> None:
    """Refuse what does not fix an image's bytes. Raises InputError."""
    if _BY_DIGEST.fullmatch(pin):
        return
    if _BY_CONTENT.fullmatch(pin) and ".." not in pin:
        if not dialect.sqsh_image:
            raise InputError(f"--image {short(pin)}: {dialect.title} starts no files; give REFERENCE@sha256:...")
        return
    raise InputError(
        f"--image {short(pin)} does not pin an image: give REFERENCE@sha256: with 64 hexadecimal digits, or the "
        "absolute path of a .sqsh file with the hash of its content in its name"
    )


def render(
    image: str, site: Site, *, pin: str | None = None, dialect: Dialect = CE, facts: Described | None = None
) -> Rendered:
    """The file for an image (with `pin`) or a family (without) at a site; `facts` of the pinned file are written too.

    Raises InputError for a family that cannot run there, a pin that pins nothing, or a dialect that the site has not.
    """
    family, version = parse_image(image)
    reason = fit(family, site)
    if reason is not None:
        raise InputError(f"{short(image)} cannot run at {site.name}: {reason}")
    if pin is not None:
        check_pin(pin, dialect)
    if site.engine == "pyxis":
        if dialect is not CE:
            raise InputError(f"{site.name} reads no EDFs, so there is none for {dialect.title}")
        return _shell(image, family, version, site, pin, facts)
    return _edf(image, family, version, site, pin, dialect, facts)


def file_name(image: str, family: Family, version: str | None, site: Site, suffix: str) -> str:
    """No dots before the suffix: the Container Engine looks for NAME.toml, and a dot would read as another suffix."""
    stem = f"{family.name}-{site.name}" if version is None else image.replace(".", "-")
    return stem + suffix


def _header(image: str, family: Family, site: Site, dialect: Dialect, facts: Described | None) -> list[str]:
    option = "" if dialect is CE else f" --dialect {dialect.name}"
    notes = site.notes if family.gpu and dialect is CE else ()
    if family.gpu and not dialect.netstack_selectable:
        notes = (f"{dialect.title} mounts a network stack of its own choice: it cannot be pinned here",)
    pinned = []
    if facts is not None:
        pinned = [f"# Manifest digest {facts.manifest_digest}.", f"# SHA-256 of the file: {facts.sha256}."]
    return [
        f"# {image} at {site.title}.",
        *pinned,
        f"# Written by: apertus-nemo edf render {image} --site {site.name}{option}",
        "# What a line is for, who says so and who says otherwise: apertus-nemo edf explain NAME",
        *(f"# {note[0].upper()}{note[1:]}." for note in notes),
    ]


def _string(text: str) -> str:
    """A TOML basic string; JSON's escapes are TOML's."""
    return json.dumps(text, ensure_ascii=True)


def _edf(
    image: str,
    family: Family,
    version: str | None,
    site: Site,
    pin: str | None,
    dialect: Dialect,
    facts: Described | None,
) -> Rendered:
    name = file_name(image, family, version, site, ".toml")
    lines = _header(image, family, site, dialect, facts)
    launch = f"srun {dialect.launch_option}=/path/of/{name}" + (" --network=disable_rdzv_get" if family.gpu else "")
    if pin is None:
        lines += [
            "#",
            "# The settings alone: no image is pinned here. For an image of your own, inherit from this file:",
            "#",
            f'#     base_environment = "/path/of/{name}"',
            '#     image = "/path/of/image-SHA256.sqsh"',
        ]
        if dialect is SARUS:
            lines += ["", 'image = ""  # the file that inherits from this one names it']
    else:
        lines += ["#", f"#     {launch} ...", "", f"image = {_string(pin)}"]
    lines += ["", "entrypoint = false  # explicit: the engines' defaults differ", "writable = true", "mounts = ["]
    lines += [f"    {_string(mount)}," for mount in site.mounts]
    lines += ["]", "", "[annotations]"]
    lines += [f"{key} = {_string(value)}" for key, value in hook_annotations(family, site, dialect)]
    lines += ["", "[env]"]
    entries = [(key, value, BY_NAME[key].reason) for key, value in variables(layers(family, site, dialect)).items()]
    width = max(len(f"{key} = {_string(value)}") for key, value, _ in entries)
    lines += [f"{f'{key} = {_string(value)}':{width}}  # {reason}" for key, value, reason in entries]
    text = "\n".join(lines) + "\n"
    _prove(text, name, site, dialect, pin)
    return Rendered(name, text)


def hook_annotations(family: Family, site: Site, dialect: Dialect) -> list[tuple[str, str]]:
    """The annotations that a family gets at a site, in the order in which they are written."""
    if not family.gpu:
        return [("com.hooks.cxi.enabled", "false")]
    entries = [("com.hooks.cxi.enabled", "true"), ("com.hooks.aws_ofi_nccl.enabled", "true")]
    if dialect.netstack_selectable and site.netstack is not None:
        keys = ("source", "version", "name")
        entries += [(f"com.hooks.netstack.{key}", value) for key, value in zip(keys, site.netstack, strict=True)]
    elif dialect.netstack_selectable:
        entries += [
            ("com.hooks.netstack.source", "host"),
            ("com.hooks.aws_ofi_nccl.variant", f"cuda{family.cuda_major}"),
        ]
    return entries


def _prove(text: str, name: str, site: Site, dialect: Dialect, pin: str | None) -> None:
    """What we write passes our own rules."""
    report = check_document(parse_document(text.encode(), name), View(dialect, _Anything(), site))
    bad = [f for f in report.findings if f.severity in (ERROR, WARNING) and f.rule != "image-file"]
    if pin is None:
        bad = [f for f in bad if f.rule != "no-image"]
    if bad:
        raise ApertusError(f"a rendered EDF breaks a rule: {bad[0].text()}")


class _Anything(dict[str, str]):
    """An environment in which every variable is set."""

    def get(self, key: str, default: object = None) -> str:
        return f"/{key.lower()}"


def _shell(
    image: str, family: Family, version: str | None, site: Site, pin: str | None, facts: Described | None
) -> Rendered:
    name = file_name(image, family, version, site, ".sh")
    lines = _header(image, family, site, CE, facts)
    unnamed = "--container-image=/path/of/image-SHA256.sqsh " if pin is None else ""
    lines += [
        "#",
        "# Pyxis reads no EDF. Source this in the batch script: the variables are exported, and Pyxis is told to",
        "# let them win over the image's:",
        "#",
        f"#     . /path/of/{name}",
        f'#     srun "${{apertus_pyxis[@]}}" {unnamed}...',
        "",
    ]
    values = variables(layers(family, site))
    lines += [f"export {key}={shlex.quote(value)}  # {BY_NAME[key].reason}" for key, value in values.items()]
    unset = [s.name for s in BY_NAME.values() if s.value is None and s.layer in layers(family, site)]
    lines += [f"unset {key}  # {BY_NAME[key].reason}" for key in sorted(unset)]
    lines += ["", "apertus_pyxis=("]
    if pin is not None:
        lines.append(f"  --container-image={shlex.quote(pin)}")
    lines += [
        "  --container-env=" + ",".join(values),
        "  --no-container-mount-home  # packages and caches of the home stay outside",
        "  --no-container-remap-root",
        "  --no-container-entrypoint",
        "  --container-writable",
    ]
    if family.gpu and site.slingshot:
        lines.append("  --network=disable_rdzv_get  # FI_CXI_RDZV_PROTO=alt_read wants it")
    lines += [")"]
    return Rendered(name, "\n".join(lines) + "\n")


def carried() -> list[Rendered]:
    """The files of `edf/`: the settings of each family at each site where it can run."""
    return [
        render(family.name, site)
        for family in FAMILIES.values()
        for site in SITES.values()
        if fit(family, site) is None
    ]

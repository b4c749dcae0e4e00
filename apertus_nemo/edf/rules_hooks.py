"""Rules on hooks, the network stack, and the variables that depend on them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches

from apertus_nemo.edf.dialects import CE, SARUS
from apertus_nemo.edf.finding import ERROR, NOTE, WARNING, Finding, short
from apertus_nemo.edf.inherit import Origin
from apertus_nemo.edf.rules import Case, at
from apertus_nemo.edf.rules_image import cuda_major
from apertus_nemo.edf.settings import uses_ll128

# hook -> the keys of its annotations (cscs-docs container-engine/resource-hook.md, sarus-suite/user-guide.md)
ATTRIBUTES = {
    "aws_ofi_nccl": ("enabled", "variant"),
    "cxi": ("enabled",),
    "dcgm": ("enabled",),
    "netstack": ("source", "version", "name"),
    "nvidia_cuda_mps": ("enabled",),
    "slurm": ("enabled",),
    "ssh": ("enabled", "authorize_ssh_key", "port"),
}
NAMES = tuple(f"com.hooks.{hook}.{key}" for hook, keys in ATTRIBUTES.items() for key in keys)
VARIANTS = ("cuda12", "cuda13", "cuda-dl", "rocm5", "rocm6")
_AEI = re.compile(r"alps-(?:images|extended-images)/|-alps\d+(?![\w.])")


def check_hooks(case: Case) -> Iterator[Finding]:
    """All rules of this file."""
    yield from _names(case)
    yield from _values(case)
    yield from _not_enabled(case)
    yield from _entrypoint(case)
    image = case.merged.text("image") or ""
    if _AEI.search(image):
        yield from _own_netstack(case)
    else:
        yield from _site_netstack(case, image)
        yield from _ll128(case)
    yield from _net_plugin(case)


def _origin(case: Case, name: str) -> Origin:
    return case.merged.annotations[name].origin


def _names(case: Case) -> Iterator[Finding]:
    for name, value in case.merged.annotations.items():
        shown = short(name)
        if name in NAMES:
            hook = name.split(".")[2]
            if hook not in case.dialect.hooks and case.merged.annotation(name) != "false":
                other = SARUS if case.dialect is CE else CE
                why = f"the {case.dialect.title} does not document the hook {hook}; the {other.title} does"
                yield at(
                    value.origin,
                    NOTE,
                    "hook-unsupported",
                    f"{shown} has no effect",
                    why,
                    "remove it, or keep it for the other engine",
                )
            continue
        if name.startswith("com.hooks."):
            meant, why = _near(name), "no hook reads it: what this line asks for is not done, and nothing says so"
        elif name.startswith(("hooks.", "com.hook.", "hook.", "cscs.hooks.")):
            meant = short("com.hooks." + name.split("hooks.")[-1].split("hook.")[-1])
            why = "hooks look at com.hooks... only: what this line asks for is not done, and nothing says so"
        else:
            continue
        if meant:
            yield at(
                value.origin,
                ERROR,
                "annotation-unknown",
                f"{shown} is no annotation of a hook",
                why,
                f"write {meant}",
            )
        else:
            yield at(
                value.origin,
                WARNING,
                "annotation-unknown",
                f"{shown} is unknown",
                "no documented hook reads it (2026-08)",
                "look for it in the site's documentation",
            )


def _near(name: str) -> str:
    """The annotation that a misspelt one means, or nothing."""
    hook, _, key = name.removeprefix("com.hooks.").rpartition(".")
    hooks = get_close_matches(hook, ATTRIBUTES, n=1, cutoff=0.75)
    if not hooks:
        return ""
    keys = get_close_matches(key, ATTRIBUTES[hooks[0]], n=1, cutoff=0.6)
    return f"com.hooks.{hooks[0]}.{keys[0]}" if keys else ""


def _values(case: Case) -> Iterator[Finding]:
    for name, value in case.merged.annotations.items():
        if name not in NAMES or not isinstance(value.value, str):
            continue
        text, last = value.value, name.rsplit(".", 1)[1]
        if last == "enabled" and text not in ("true", "false"):
            right = "true" if text.lower() in ("true", "yes", "on", "1", "enabled") else "false"
            why = 'hooks compare with the text "true"'
            yield at(value.origin, ERROR, "annotation-value", f"{name} = {short(text)!r}", why, f'write "{right}"')
        elif last == "port" and not (text.isascii() and text.isdigit() and 0 < int(text[:6]) < 65536):
            yield at(
                value.origin,
                ERROR,
                "annotation-value",
                f"{name} = {short(text)!r}",
                "it must be a port",
                "write 1024 to 65535",
            )
        elif name == "com.hooks.netstack.source" and text not in ("host", "artifact"):
            why = "the source is host or artifact"
            yield at(value.origin, ERROR, "annotation-value", f"{name} = {short(text)!r}", why, 'write "artifact"')
        elif name == "com.hooks.aws_ofi_nccl.variant" and text not in VARIANTS and "$" not in text:
            why = f"documented are {', '.join(VARIANTS)}"
            yield at(value.origin, ERROR, "annotation-value", f"{name} = {short(text)!r}", why, 'write "cuda-dl"')
    if case.merged.single.get("writable") is not None and case.merged.single["writable"].value is False:
        for hook in ("ssh", "nvidia_cuda_mps"):
            name = f"com.hooks.{hook}.enabled"
            if case.merged.annotation(name) == "true":
                why = f"the hook {hook} writes into the container"
                origin = case.merged.single["writable"].origin
                yield at(
                    origin,
                    ERROR,
                    "hook-needs-writable",
                    f"writable = false beside {name}",
                    why,
                    "write writable = true",
                )


def _not_enabled(case: Case) -> Iterator[Finding]:
    """Annotations that tune a hook which is not on."""
    if not case.complete:
        return
    for hook in ("aws_ofi_nccl", "ssh"):
        if hook not in case.dialect.hooks or f"com.hooks.{hook}.enabled" in case.merged.annotations:
            continue
        names = [name for name in case.merged.annotations if name.startswith(f"com.hooks.{hook}.") and name in NAMES]
        if names:
            what, why = f"{names[0]} without com.hooks.{hook}.enabled", "the hook is off by default"
            do = f'add com.hooks.{hook}.enabled = "true", or remove the line'
            yield at(_origin(case, names[0]), WARNING, "hook-not-enabled", what, why, do)


def _entrypoint(case: Case) -> Iterator[Finding]:
    if not case.complete or "entrypoint" in case.merged.single or case.merged.text("image") is None:
        return
    if _AEI.search(case.merged.text("image") or ""):
        return  # has a rule of its own
    severity = NOTE if case.dialect.entrypoint_default is not None else WARNING
    why = "the reference says false, the code of Sarus Suite says true: the entrypoint may run or not"
    yield case.here(severity, "entrypoint-implicit", "entrypoint is not set", why, "write entrypoint = false, or true")


def _own_netstack(case: Case) -> Iterator[Finding]:
    origin = case.merged.single["image"].origin
    what = "the image carries its own network stack"
    if case.merged.annotation("com.hooks.aws_ofi_nccl.enabled") == "true":
        why = "the hook puts another plugin and libfabric in their place"
        place = _origin(case, "com.hooks.aws_ofi_nccl.enabled")
        yield at(place, ERROR, "own-netstack", f"aws_ofi_nccl is enabled, and {what}", why, "remove the annotation")
    if case.complete and case.dialect.cxi_default and case.merged.annotation("com.hooks.cxi.enabled") != "false":
        why = "the hook cxi is on by default and replaces its libfabric"
        yield at(origin, ERROR, "own-netstack", what, why, 'set com.hooks.cxi.enabled = "false"')
    elif case.merged.annotation("com.hooks.cxi.enabled") == "true":
        why = "the hook cxi replaces its libfabric"
        yield at(_origin(case, "com.hooks.cxi.enabled"), ERROR, "own-netstack", what, why, 'set it to "false"')
    entrypoint = case.merged.single.get("entrypoint")
    if case.complete and (entrypoint is None or entrypoint.value is not True):
        why = "its entrypoint sets the environment of NCCL and libfabric"
        yield at(
            entrypoint.origin if entrypoint else origin, WARNING, "own-netstack", what, why, "write entrypoint = true"
        )
    why = "its settings want it: the rendezvous protocol alt_read, and PMIx"
    yield at(origin, NOTE, "own-netstack", what, why, "start it with srun --network=disable_rdzv_get --mpi=pmix")


def _site_netstack(case: Case, image: str) -> Iterator[Finding]:
    merged, dialect = case.merged, case.dialect
    plugin = "com.hooks.aws_ofi_nccl.enabled"
    enabled = merged.annotation(plugin) == "true"
    if enabled and not dialect.plugin_brings_cxi and merged.annotation("com.hooks.cxi.enabled") != "true":
        why = "in Sarus Suite the plugin does not bring libfabric: NCCL falls back to TCP"
        yield at(
            _origin(case, plugin),
            ERROR,
            "plugin-without-cxi",
            "aws_ofi_nccl without cxi",
            why,
            'add com.hooks.cxi.enabled = "true"',
        )
    if enabled and merged.annotation("com.hooks.cxi.enabled") == "false":
        why = "the plugin needs the libfabric that the hook cxi mounts"
        yield at(
            _origin(case, "com.hooks.cxi.enabled"),
            ERROR,
            "annotation-value",
            "aws_ofi_nccl is enabled and cxi is not",
            why,
            "remove one of the two",
        )
    if not dialect.netstack_selectable:
        yield from _no_selection(case)
        return
    named = {key: merged.annotation(f"com.hooks.netstack.{key}") for key in ("source", "version", "name")}
    site_default = case.site.netstack_default if case.site is not None else ""
    source = named["source"] or site_default
    for key, moving in (("version", "latest"), ("name", "default")):
        if named[key] == moving:
            why = "it is a link that the site moves: the same file then means another network stack"
            do = f"write the {key} that it means today: ls -l of the artifacts' folder"
            yield at(
                _origin(case, f"com.hooks.netstack.{key}"),
                WARNING,
                "netstack-moving",
                f'netstack.{key} = "{moving}"',
                why,
                do,
            )
    if not enabled:
        return
    origin = _origin(case, plugin)
    missing = [key for key in ("source", "version", "name") if named[key] is None]
    if source == "host":
        missing = [key for key in missing if key == "source"]
    if missing and case.complete:
        keys = ", ".join(f"com.hooks.netstack.{key}" for key in missing)
        why = "the site's default of the day is used; Daint's went from host to artifact on 2026-06-17"
        do = f"set {keys}; `apertus-nemo edf explain com.hooks.netstack` says to what"
        yield at(origin, WARNING, "netstack-unpinned", "the network stack is not pinned", why, do)
    yield from _variant(case, image, source)


def _no_selection(case: Case) -> Iterator[Finding]:
    names = [
        n
        for n in case.merged.annotations
        if n.startswith("com.hooks.netstack.") or n == "com.hooks.aws_ofi_nccl.variant"
    ]
    for name in names:
        if name in NAMES and name.endswith("variant"):
            why = "Sarus Suite mounts one fixed network stack"
            yield at(
                _origin(case, name),
                NOTE,
                "hook-unsupported",
                f"{name} has no effect",
                why,
                "nothing; the stack cannot be pinned there yet",
            )


def _variant(case: Case, image: str, source: str) -> Iterator[Finding]:
    name = "com.hooks.aws_ofi_nccl.variant"
    variant, cuda = case.merged.annotation(name), cuda_major(image)
    if source == "artifact":
        if variant is not None and variant != "cuda-dl":
            why = "artifacts have one plugin, which finds CUDA at run time; the variant is ignored"
            yield at(
                _origin(case, name),
                NOTE,
                "plugin-variant",
                f"variant {short(variant)} has no effect",
                why,
                'remove it, or write "cuda-dl"',
            )
        return
    if variant is None:
        if case.complete and source == "host":
            why = "each plugin of the host is built for one CUDA"
            do = f"set {name} to " + (f"cuda{cuda}, or to cuda-dl" if cuda else "cuda12, cuda13 or cuda-dl")
            yield at(
                _origin(case, "com.hooks.aws_ofi_nccl.enabled"),
                WARNING,
                "plugin-variant",
                "no variant of the plugin",
                why,
                do,
            )
        return
    if cuda is not None and re.fullmatch(r"cuda\d+", variant) and variant != f"cuda{cuda}":
        what = f"variant {variant} for an image with CUDA {cuda}"
        why = "a numbered plugin is linked against its CUDA; NCCL does not find it and falls back to TCP, or fails"
        if source != "host":
            why += " (where the network stack is the host's)"
        yield at(
            _origin(case, name),
            ERROR if source == "host" else WARNING,
            "plugin-variant",
            what,
            why,
            f"write cuda-dl, or cuda{cuda}",
        )


def _net_plugin(case: Case) -> Iterator[Finding]:
    plugin = case.merged.env.get("NCCL_NET_PLUGIN")
    if plugin is None or not isinstance(plugin.value, str) or plugin.value == "":
        return
    hook = case.merged.annotation("com.hooks.aws_ofi_nccl.enabled") == "true"
    if case.merged.variable("NCCL_NET") or hook:
        other = "NCCL_NET" if case.merged.variable("NCCL_NET") else "the hook aws_ofi_nccl, which sets NCCL_NET"
        why = f"NCCL prefers it to {other}, looks for another library and ends with `network AWS Libfabric not found`"
        yield at(
            plugin.origin,
            ERROR,
            "net-plugin",
            f"NCCL_NET_PLUGIN = {short(plugin.value)!r}",
            why,
            'remove it, or write NCCL_NET_PLUGIN = ""',
        )


def _ll128(case: Case) -> Iterator[Finding]:
    merged = case.merged
    if case.site is not None and not (case.site.slingshot and case.site.architecture == "aarch64"):
        return
    hook = merged.annotation("com.hooks.aws_ofi_nccl.enabled") == "true"
    if any("rocm" in (text or "") for text in (merged.text("image"), *map(merged.annotation, NAMES))):
        return  # AMD's library
    slingshot = (
        hook
        or any(name.startswith("FI_CXI_") for name in merged.env)
        or (merged.variable("NCCL_NET") or "").lower().endswith(("libfabric", "ofi"))
    )
    if not slingshot:
        return
    second = all(merged.variable(name) == "0" for name in ("FI_CXI_RDZV_THRESHOLD", "FI_CXI_RDZV_GET_MIN"))
    protocol = merged.variable("NCCL_PROTO")
    wrong = "NCCL 2.27.3 and later add up wrongly with LL128 on GH200 and Slingshot, in about 30 % of runs and silently"
    do = 'set NCCL_PROTO = "^LL128", FI_CXI_RDZV_THRESHOLD = "0" and FI_CXI_RDZV_GET_MIN = "0" in [env]'
    if protocol and "$" in protocol:
        return
    if protocol and uses_ll128(protocol):
        origin = merged.env["NCCL_PROTO"].origin
        yield at(
            origin,
            WARNING if second else ERROR,
            "ll128",
            f"NCCL_PROTO = {short(protocol)!r} lets NCCL choose LL128",
            wrong,
            do,
        )
    elif not protocol and not second and case.complete:
        name = "com.hooks.aws_ofi_nccl.enabled"
        why = wrong + (
            "; the hook sets NCCL_PROTO only since Container Engine 26.06.1" if hook and not case.sarus else ""
        )
        if hook:
            yield at(_origin(case, name), WARNING, "ll128", "nothing keeps NCCL from LL128", why, do)
        else:
            yield case.here(WARNING, "ll128", "nothing keeps NCCL from LL128", why, do)

"""What a key, an annotation, a setting or a rule is for: one text a name, from the tables that the code reads."""

from __future__ import annotations

from apertus_nemo.edf.dialects import CE, DIFFERENCES, SARUS, shown
from apertus_nemo.edf.finding import short
from apertus_nemo.edf.rules import RULES
from apertus_nemo.edf.settings import BY_NAME, HOOK_SETS, SOURCES, Setting
from apertus_nemo.edf.sites import FAMILIES, SITES, Family, Site
from apertus_nemo.errors import InputError

_EDF = "cscs-docs, container-engine/edf.md (2026-08)"
_HOOK = "cscs-docs, container-engine/resource-hook.md (2026-08)"
_GUIDE = "cscs-docs, container-engine/sarus-suite/user-guide.md (2026-08)"

# key -> (type, default, meaning, source, fields of the dialects that bear on it)
KEYS: dict[str, tuple[str, str, str, str, tuple[str, ...]]] = {
    "base_environment": (
        "string, or array of strings",
        "none",
        (
            "EDFs to inherit from, evaluated left to right and before the file itself, 10 levels at most; single "
            "values are overwritten, mounts and devices appended, [env] and [annotations] merged by key"
        ),
        _EDF,
        ("splits_search_path", "system_folder", "image_or_base_needed"),
    ),
    "image": (
        "string",
        "none",
        "[USER@][REGISTRY#]IMAGE[:TAG], or the path of a SquashFS file",
        _EDF,
        ("sqsh_image", "expands_image", "image_or_base_needed"),
    ),
    "workdir": ("string", "the image's", "folder in which the container starts", _EDF, ()),
    "entrypoint": ("boolean", "see below", "whether the image's entrypoint runs", _EDF, ("entrypoint_default",)),
    "writable": ("boolean", "true", "false makes the container's file system read-only", _EDF, ()),
    "mounts": (
        "array of strings",
        "none",
        "SOURCE:DESTINATION[:FLAGS]; the flag sqsh alone mounts a SquashFS file",
        _EDF,
        ("short_mounts", "sqsh_mounts", "flag_separator"),
    ),
    "devices": ("array of strings", "none", "values of podman's --device", _GUIDE, ("devices",)),
    "env": (
        "table of strings",
        "none",
        "variables of the container; they win over the image's and the host's; an empty string unsets",
        _EDF,
        ("bash_variables", "undefined_variable"),
    ),
    "annotations": (
        "table, nested or with dotted keys, of strings",
        "none",
        "what hooks look at",
        _HOOK,
        ("quoted_strings_only", "hooks", "cxi_default"),
    ),
}

# annotation -> (values, meaning, source)
ANNOTATIONS: dict[str, tuple[str, str, str]] = {
    "com.hooks.cxi.enabled": (
        "true, false",
        "mounts libfabric with the provider for Slingshot (23.9 against 1.3 GB/s)",
        _HOOK,
    ),
    "com.hooks.aws_ofi_nccl.enabled": (
        "true, false",
        "mounts NCCL's plugin for libfabric and sets variables of NCCL and libfabric",
        _HOOK,
    ),
    "com.hooks.aws_ofi_nccl.variant": (
        "cuda12, cuda13, cuda-dl; rocm5, rocm6",
        (
            "the host's plugin; a numbered one must match the image's CUDA, cuda-dl wants libcudart.so in the image; "
            "ignored with network stack artifacts"
        ),
        _HOOK,
    ),
    "com.hooks.netstack.source": ("host, artifact", "where libfabric, CXI and the plugin come from", _HOOK),
    "com.hooks.netstack.version": ("as 26.05.1; latest", "release of the artifact; latest is a link that moves", _HOOK),
    "com.hooks.netstack.name": (
        "as gpu:cuda13,cxi:13.1.0,ofi:2.5.1,aws:1.18.0+dl; shs:13.1.0; default",
        "build of the artifact for a CUDA and a Slingshot software; shs:... and default are links that move",
        _HOOK,
    ),
    "com.hooks.ssh.enabled": ("true, false", "runs an SSH server; wants srun --pty and a writable container", _HOOK),
    "com.hooks.ssh.authorize_ssh_key": ("path", "file with the public key that may log in", _HOOK),
    "com.hooks.ssh.port": ("number", "port of the server, 15263 where not set", _HOOK),
    "com.hooks.nvidia_cuda_mps.enabled": ("true, false", "several processes a GPU; wants a writable container", _HOOK),
    "com.hooks.dcgm.enabled": ("true, false", "libraries of DCGM, for job reports", _GUIDE),
    "com.hooks.slurm.enabled": ("true, false", "Slurm's commands in the container, experimental", _GUIDE),
    "com.pyxis.pytorch_remap_vars": ("true, false", "whether Pyxis sets RANK and LOCAL_RANK; off on Alps", _HOOK),
    "com.pyxis.entrypoint_log": ("true, false", "prints what the entrypoint says", _HOOK),
}


def names() -> dict[str, list[str]]:
    """All that can be explained, by kind."""
    return {
        "keys": list(KEYS),
        "annotations": list(ANNOTATIONS),
        "settings": list(BY_NAME),
        "rules": list(RULES),
        "what differs between the engines": list(DIFFERENCES),
        "sites": list(SITES),
        "families": list(FAMILIES),
    }


def index() -> str:
    """The names, for somebody who has none yet."""
    parts = []
    for kind, entries in names().items():
        parts.append(f"{kind}:")
        line = "  "
        for entry in entries:
            if len(line) + len(entry) > 96:
                parts.append(line.rstrip())
                line = "  "
            line += entry + "  "
        parts.append(line.rstrip())
    return "\n".join(parts) + "\n"


def explain(name: str) -> str:
    """The text of one name; a prefix such as com.hooks.netstack gives all below it. Raises InputError."""
    texts = [text for kind in (_key, _annotation, _setting, _rule, _difference, _site, _family) if (text := kind(name))]
    if not texts:
        texts = [
            text for other in ANNOTATIONS if other.startswith(name.rstrip(".") + ".") and (text := _annotation(other))
        ]
    if not texts:
        texts = [
            text for other in BY_NAME if name.endswith("_") and other.startswith(name) and (text := _setting(other))
        ]
    if not texts:
        from difflib import get_close_matches

        known = [entry for entries in names().values() for entry in entries]
        near = get_close_matches(name, known, n=1, cutoff=0.6) or get_close_matches(
            name.upper(), known, n=1, cutoff=0.6
        )
        hint = f"did you mean {near[0]}?" if near else "`apertus-nemo edf explain` lists what there is"
        raise InputError(f"nothing is known of {short(name)!r}; {hint}")
    return "\n\n".join(texts) + "\n"


def _rows(title: str, rows: list[tuple[str, str]]) -> str:
    filled = [(name, text) for name, text in rows if text]
    return "\n".join([title, *(f"  {name:10} {text}" for name, text in filled)])


def _key(name: str) -> str:
    if name not in KEYS:
        return ""
    kind, default, meaning, source, fields = KEYS[name]
    rows = [("type", kind), ("default", default), ("meaning", meaning), ("source", source)]
    text = _rows(f"{name}, a key of an EDF", rows)
    return "\n".join([text, *(_difference(field) for field in fields)])


def _annotation(name: str) -> str:
    if name not in ANNOTATIONS:
        return ""
    values, meaning, source = ANNOTATIONS[name]
    pinned = ""
    if name.startswith("com.hooks.netstack."):
        index = ("source", "version", "name").index(name.rsplit(".", 1)[1])
        pinned = "; ".join(f"{site.name}: {site.netstack[index]}" for site in SITES.values() if site.netstack)
    rows = [("values", values), ("meaning", meaning), ("rendered", pinned), ("source", source)]
    return _rows(f"{name}, an annotation", rows)


def _setting(name: str) -> str:
    setting: Setting | None = BY_NAME.get(name)
    if setting is None:
        return ""
    value = "left unset on purpose" if setting.value is None else f'"{setting.value}"'
    rows = [
        ("value", value),
        ("reason", setting.reason),
        ("conflict", setting.conflict),
        ("hook", "set by aws_ofi_nccl since Container Engine 26.06.1" if name in HOOK_SETS else ""),
        *(("source", f"{key}: {SOURCES[key]}") for key in setting.sources),
    ]
    return _rows(f"{name}, a variable ({setting.layer})", rows)


def _rule(name: str) -> str:
    return _rows(f"{name}, a rule", [("finds", RULES[name][0]), ("source", RULES[name][1])]) if name in RULES else ""


def _difference(name: str) -> str:
    if name not in DIFFERENCES:
        return ""
    what, reason, source = DIFFERENCES[name]
    ce, sarus = shown(getattr(CE, name)), shown(getattr(SARUS, name))
    rows = [("ce", ce), ("sarus", sarus), ("reason", reason), ("source", source)]
    return _rows(f"{name}: {what}", rows)


def _site(name: str) -> str:
    site: Site | None = SITES.get(name)
    if site is None:
        return ""
    netstack = "" if site.netstack is None else ", ".join(site.netstack)
    rows = [
        ("engine", "reads EDFs" if site.engine == "ce" else "Enroot and Pyxis, which read no EDF"),
        ("processor", site.architecture),
        ("netstack", netstack or site.netstack_default),
        *(("mount", mount) for mount in site.mounts),
        *(("note", note) for note in site.notes),
        *(("source", source) for source in site.sources),
    ]
    return _rows(f"{name}: {site.title}", rows)


def _family(name: str) -> str:
    family: Family | None = FAMILIES.get(name)
    if family is None:
        return ""
    cuda = "" if family.cuda_major is None else str(family.cuda_major)
    stack = "the site's hooks" if family.netstack else "none"
    return _rows(
        f"{name}, an image family",
        [("processor", ", ".join(family.architectures)), ("CUDA", cuda), ("netstack", stack)],
    )

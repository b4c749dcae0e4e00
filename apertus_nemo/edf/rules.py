"""The rules of `edf check` by name: what each is about, and where its reason was read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from apertus_nemo.edf.dialects import Dialect
from apertus_nemo.edf.document import Document
from apertus_nemo.edf.expand import Expanded, expand
from apertus_nemo.edf.finding import Finding
from apertus_nemo.edf.inherit import Chain, Lookup, Merged, Origin
from apertus_nemo.edf.sites import Site

_EDF = "cscs-docs, container-engine/edf.md (2026-08)"
_HOOK = "cscs-docs, container-engine/resource-hook.md (2026-08)"
_ISSUES = "cscs-docs, container-engine/known-issue.md (2026-08)"
_RASTER = "sarus-suite/raster 20f75bd"

# rule -> (what it looks for, source)
RULES: dict[str, tuple[str, str]] = {
    "unreadable": ("a file that cannot be opened", "the file system"),
    "not-utf8": ("bytes that are no UTF-8", "TOML 1.0"),
    "not-toml": (
        "what TOML does not allow: a table opened twice, a comma after a key, text without quotes",
        f"TOML 1.0; {_HOOK}",
    ),
    "too-complex": ("keys of more than 32 parts, values nested deeper than 32", "a limit of ours"),
    "unknown-key": (
        "keys that no engine reads, misspelt or in the wrong table; the engines' own schema lets them pass",
        f"{_EDF}; {_RASTER} src/schema/edf.json",
    ),
    "wrong-type": ("a value of another type than the reference says", _EDF),
    "not-a-string": ("numbers and booleans in [env] and [annotations]", f"{_EDF}; {_HOOK}"),
    "annotations-apart": ("annotations both as dotted keys and in tables of their own", f"TOML 1.0; {_HOOK}"),
    "annotation-twice": ("one annotation under two spellings, dotted and quoted, with two values", _RASTER),
    "base-not-found": ("a base that the search does not find", "cscs-docs, container-engine/run.md"),
    "base-cycle": ("an EDF that inherits from itself", _EDF),
    "base-depth": ("more than 10 levels of inheritance", _EDF),
    "too-many-bases": ("more than 200 files in one chain", "a limit of ours"),
    "base-by-search": (
        "a base that is looked up: which file it is depends on EDF_PATH of who starts it",
        "cscs-docs, container-engine/run.md",
    ),
    "relative-to-caller": ("relative paths: they start where srun is called, not at the EDF", _EDF),
    "no-image": ("no image at all", f"{_EDF}; {_RASTER} src/schema/edf.json"),
    "image-tag": (
        "an image by tag: a tag can be moved, and a cached copy is never refreshed",
        "cscs-docs, container-engine/run.md",
    ),
    "image-latest": ("an image by `latest`, or without a tag", "cscs-docs, container-engine/run.md"),
    "image-path": ("a SquashFS file whose name does not say what is in it", "swiss-ai/model-launch docs: no rollback"),
    "image-digest": (
        "a digest that is none, or that the engine does not document",
        f"{_EDF}; NVIDIA/enroot src/docker.sh since 4.0.0",
    ),
    "image-format": ("an image that is neither a reference nor a path", _EDF),
    "image-file": (
        "a SquashFS file that is missing, unreadable, no SquashFS, or closed to others",
        'NVIDIA/pyxis: "Invalid image format"',
    ),
    "image-architecture": ("an image whose name says another processor than the site's", "cscs-docs, clusters"),
    "image-libc": ("musl, or glibc before 2.38, under hooks that mount the host's libraries", _ISSUES),
    "placeholder": ("text that was to be replaced: <user>, {arch}", "public EDFs"),
    "mount-format": ("a mount that is not SOURCE:DESTINATION[:FLAGS]", f"{_EDF}; {_RASTER} src/schema/edf.json"),
    "mount-short": ("a mount without a destination", f"{_EDF}; {_RASTER} src/schema/edf.json"),
    "mount-flags": (
        "flags joined by the wrong sign, unknown, or sqsh beside others",
        f"{_EDF}; {_RASTER} src/mount.rs",
    ),
    "mount-twice": ("two mounts at one destination", _EDF),
    "mount-shadows": ("a mount that hides what the image brings", "public EDFs"),
    "mount-home": (
        "the home, or /users, in the container: init scripts, caches and ~/.local come with it",
        f"{_ISSUES}; swiss-ai/nodes_test",
    ),
    "variable-unbraced": ("$VAR, which production does not expand", _EDF),
    "variable-undefined": ("a variable that is not set on this machine", _EDF),
    "variable-form": (
        "forms of bash that production does not document, and commands",
        f"{_EDF}; {_RASTER} src/common.rs",
    ),
    "variable-in-image": ("a variable in image under Sarus Suite", f"{_RASTER} src/lib.rs"),
    "env-self-reference": ("an entry of [env] that is made from another entry", _EDF),
    "path-from-host": (
        "PATH-like variables made from themselves: the documentation contradicts itself on whose value it is",
        _EDF,
    ),
    "secret": ("a token or password in the file", "public EDFs"),
    "entrypoint-implicit": (
        "entrypoint left out: documented false, true in Sarus Suite's code",
        f"{_EDF}; {_RASTER} src/lib.rs",
    ),
    "annotation-unknown": ("annotations of hooks that do not exist", _HOOK),
    "annotation-value": ("values that a hook does not take", _HOOK),
    "hook-not-enabled": ("annotations of a hook that nothing enables", _HOOK),
    "hook-needs-writable": ("hooks that need a writable container", _HOOK),
    "hook-unsupported": (
        "annotations and keys that this engine does not read",
        "cscs-docs, container-engine/sarus-suite/user-guide.md (2026-08)",
    ),
    "netstack-unpinned": (
        "a network stack that is the site's default of the day",
        f"{_HOOK}; cscs-docs, clusters/daint.md, 2026-06-17",
    ),
    "netstack-moving": ("version = latest, name = default", _HOOK),
    "plugin-variant": ("a variant of the NCCL plugin that does not fit the image's CUDA, or has no effect", _HOOK),
    "plugin-without-cxi": (
        "aws_ofi_nccl without cxi under Sarus Suite",
        "cscs-docs, container-engine/sarus-suite/user-guide.md (2026-08)",
    ),
    "own-netstack": (
        "an image with a network stack of its own (Alps Extended Images) under the hooks",
        "cscs-docs, software/alps-extended-images.md",
    ),
    "net-plugin": ("NCCL_NET_PLUGIN beside NCCL_NET", "cscs-docs, software/communication/nccl.md"),
    "ll128": (
        "NCCL on GH200 and Slingshot that may choose LL128: wrong sums, silently",
        "NVIDIA/nccl#2001, #2053; HewlettPackard/shs-ccl-docs#21",
    ),
}


@dataclass(frozen=True)
class Case:
    """All that a rule may look at."""

    document: Document
    chain: Chain
    merged: Merged
    lookup: Lookup
    site: Site | None

    @property
    def dialect(self) -> Dialect:
        return self.lookup.dialect

    @property
    def sarus(self) -> bool:
        return self.dialect.name == "sarus"

    @property
    def complete(self) -> bool:
        """Whether all bases were read: only then is something missing that is not there."""
        return not self.chain.faults

    def expanded(self, text: str) -> Expanded:
        return expand(text, self.lookup.environment, self.dialect)

    def documents(self) -> Iterator[Document]:
        """Each file of the chain once."""
        seen = set()
        for link in self.chain.links:
            if link.document.name not in seen:
                seen.add(link.document.name)
                yield link.document

    def here(self, severity: str, rule: str, what: str, why: str, do: str) -> Finding:
        """A finding on what is missing from the file that is checked: without a line."""
        return Finding(severity, rule, self.document.name, None, what, why, do)


def at(origin: Origin, severity: str, rule: str, what: str, why: str, do: str) -> Finding:
    """A finding at the place of a value."""
    return Finding(severity, rule, origin.file, origin.line, what, why, do)


def in_order(findings: list[Finding], first: str) -> list[Finding]:
    """Each once; the file itself first, then its bases; by line."""
    unique = list(dict.fromkeys(findings))
    return sorted(unique, key=lambda f: (f.file != first, f.file, f.line is None, f.line or 0))

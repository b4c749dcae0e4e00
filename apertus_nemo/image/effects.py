"""What a change of an image may do to the results of a run: nothing, speed or bits; tables, each row with its reason.

    effect_of_package("torch")       # Effect("bits", "kernels, and the order of their sums")

What is not in the table may change bits: the worst is assumed until someone has looked.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from apertus_nemo.record.lock import ENVIRONMENT
from apertus_nemo.record.software import NOT_PINNED

NOTHING, SPEED, BITS = "nothing", "speed", "bits"
ORDER = (NOTHING, SPEED, BITS)


@dataclass(frozen=True)
class Effect:
    """The most that a change can do, and why."""

    what: str
    reason: str


_UNKNOWN = Effect(BITS, "not in the table: the worst is assumed")

# Patterns of package names, the first that matches counts.
_PACKAGES: tuple[tuple[str, Effect], ...] = (
    ("torch", Effect(BITS, "kernels, and the order of their sums")),
    ("triton", Effect(BITS, "compiles kernels")),
    ("transformer-engine*", Effect(BITS, "fused kernels of layers and attention")),
    ("megatron-core", Effect(BITS, "layers, optimizer, order of communication")),
    ("nemo-toolkit", Effect(BITS, "strategy and checkpoints")),
    ("lightning", Effect(BITS, "the loop of training")),
    ("numpy", Effect(BITS, "order of samples, and references")),
    ("nvidia-*", Effect(BITS, "kernels, or what chooses among them")),
    ("tokenizers", Effect(BITS, "token ids of new data; built data are pinned by hash")),
    ("tensorstore", Effect(NOTHING, "stores checkpoints; states are compared by their tensors")),
    ("safetensors", Effect(NOTHING, "stores tensors as they are")),
    ("hydra-core", Effect(NOTHING, "composes recipes; the run's lock holds the result")),
    ("omegaconf", Effect(NOTHING, "composes recipes; the run's lock holds the result")),
    ("tensorboard*", Effect(NOTHING, "shows curves")),
    ("tqdm", Effect(NOTHING, "shows progress")),
    ("rich", Effect(NOTHING, "shows text")),
    ("certifi", Effect(NOTHING, "certificates of the network; a run fetches nothing")),
    ("pip", Effect(NOTHING, "installs, and stays outside")),
    ("setuptools", Effect(NOTHING, "builds packages; what it built is compared by file")),
    # Debian
    ("libc6", Effect(BITS, "mathematical functions of the C library")),
    ("libc-bin", Effect(NOTHING, "programs beside the C library")),
    ("libgomp1", Effect(BITS, "splits loops among threads")),
    ("libstdc++6", Effect(BITS, "random numbers and sorting of C++")),
    ("libgcc-s1", Effect(BITS, "arithmetic that processors lack")),
    ("python3*", Effect(BITS, "the interpreter; its documentation is the embedded text")),
    ("libpython3*", Effect(BITS, "the interpreter; its documentation is the embedded text")),
    ("ca-certificates", Effect(NOTHING, "certificates of the network; a run fetches nothing")),
    ("tzdata", Effect(NOTHING, "ranks run in UTC")),
    ("openssl", Effect(NOTHING, "a program that no run starts")),
    ("libssl3", Effect(NOTHING, "hashes and transport, exact by definition")),
    ("apt", Effect(NOTHING, "no run starts it")),
    ("bash", Effect(NOTHING, "a shell")),
    ("dash", Effect(NOTHING, "a shell")),
    ("debian-archive-keyring", Effect(NOTHING, "keys of Debian's archive")),
    ("dpkg", Effect(NOTHING, "no run starts it")),
    ("perl-base", Effect(NOTHING, "no run starts it")),
    ("tar", Effect(NOTHING, "no run starts it")),
    ("util-linux*", Effect(NOTHING, "no run starts its programs")),
)
_VARIABLES: tuple[tuple[str, Effect], ...] = (
    *((name, Effect(BITS, "a run's lock pins it: it enters arithmetic or order")) for name in ENVIRONMENT),
    ("NCCL_*", Effect(BITS, "chooses algorithms and protocols of collectives")),
    ("NVTE_*", Effect(BITS, "chooses kernels of Transformer Engine")),
    ("FI_*", Effect(SPEED, "the network's transport, below the sums")),
    ("LANG", Effect(NOTHING, "texts; ranks get their own locale")),
    ("PATH", Effect(BITS, "decides which Python runs")),
    ("PIP_*", Effect(NOTHING, "pip runs while an image is built, not in it")),
    ("LD_*", Effect(BITS, "decides which libraries are loaded")),
)
_SETTINGS: tuple[tuple[str, Effect], ...] = (
    ("user", Effect(NOTHING, "who the files belong to")),
    ("working directory", Effect(NOTHING, "runs have folders of their own")),
    ("volumes", Effect(NOTHING, "where other file systems may be mounted")),
    ("command", Effect(NOTHING, "started where no other is given")),
)
# Of paths below the root.
_FILES: tuple[tuple[str, Effect], ...] = (
    ("*/__pycache__/*", Effect(SPEED, "byte code, checked against its source")),
    ("*.dist-info/*", Effect(NOTHING, "an installer's notes")),
    ("etc/apertus-nemo/*", Effect(NOTHING, "the papers of the image")),
    ("usr/share/doc/*", Effect(NOTHING, "documents")),
    ("var/lib/dpkg/*", Effect(NOTHING, "Debian's own list of packages")),
    ("*/apertus_nemo/*", Effect(BITS, "our own package")),
)


def effect_of_package(name: str) -> Effect:
    """Of a Python or Debian package, by its name; what no run's lock pins does nothing."""
    found = _find(_PACKAGES, name)
    return Effect(NOTHING, NOT_PINNED[name]) if found is _UNKNOWN and name in NOT_PINNED else found


def effect_of_variable(name: str) -> Effect:
    """Of an environment variable that the image sets."""
    return _find(_VARIABLES, name)


def effect_of_setting(name: str) -> Effect:
    """Of what the image's configuration says beside its environment; an entrypoint may do anything."""
    return _find(_SETTINGS, name)


def effect_of_file(path: str) -> Effect:
    """Of a file, by its path below the root."""
    return _find(_FILES, path)


def _find(table: tuple[tuple[str, Effect], ...], name: str) -> Effect:
    return next((effect for pattern, effect in table if fnmatch.fnmatchcase(name, pattern)), _UNKNOWN)

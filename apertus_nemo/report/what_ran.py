"""What ran, from the lock and the observation: named values in groups, in the words of the recipe.

    groups(lock.tree, observed)          # {"Recipe": {"name": "tiny_pretrain", ...}, "Model": {...}, ...}

A value that is not there is left out; one that is known to be unknown says why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from apertus_nemo.record.canonical import dumps, is_unknown, sha256_hex
from apertus_nemo.record.places import printable
from apertus_nemo.report.marks import first_steps

# group -> name shown -> place in the lock
_PLACES: dict[str, dict[str, str]] = {
    "Recipe": {
        "name": "config.name",
        "overrides": "overrides",
        "reproducibility level": "level",
        "max steps": "config.trainer.max_steps",
        "train samples": "config.schedule.train_samples",
        "global batch size": "config.trainer.global_batch_size",
        "micro batch size": "config.trainer.micro_batch_size",
        "batch ramp": "config.schedule.batch_ramp",
        "sequence length": "config.data.seq_length",
        "precision": "config.trainer.precision",
        "seed": "config.trainer.seed",
    },
    "Model": {
        "layers": "config.model.num_layers",
        "hidden size": "config.model.hidden_size",
        "feed-forward size": "config.model.ffn_hidden_size",
        "attention heads": "config.model.num_attention_heads",
        "query groups": "config.model.num_query_groups",
        "vocabulary": "config.model.vocab_size",
    },
    "Optimizer": {
        "name": "config.optim.name",
        "learning rate": "config.optim.lr",
        "least learning rate": "config.optim.min_lr",
        "schedule": "config.schedule.style",
        "weight decay": "config.optim.weight_decay",
        "gradient clipping": "config.optim.clip_grad",
    },
    "Parallelism": {
        "ranks": "stages.0.topology.world_size",
        "tensor": "stages.0.topology.tensor_model_parallel_size",
        "pipeline": "stages.0.topology.pipeline_model_parallel_size",
        "context": "stages.0.topology.context_parallel_size",
        "data": "stages.0.topology.data_parallel_size",
        "sequence parallel": "stages.0.topology.sequence_parallel",
    },
    "Data": {
        "source": "data.source",
        "manifest digest": "data.manifest_digest",
        "tokenizer": "data.tokenizer.kind",
        "tokens in its vocabulary": "data.tokenizer.vocab_size",
        "files": "#data.files",
        "seed": "data.seed",
    },
    "Source": {
        "commit": "source.commit",
        "uncommitted changes": "source.dirty",
        "patch": "source.patch.sha256",
        "package version": "source.package_version",
        "digest of its files": "source.files_digest",
        "archive": "source.archive_sha256",
    },
    "Environment": {
        "image": "image",
        "packages": "#packages",
        "torch": "packages.torch",
        "NeMo": "packages.nemo-toolkit",
        "Megatron-core": "packages.megatron-core",
        "Python": "python.version",
        "C library": "python.libc",
        "variables": "environment",
    },
    "Machine": {
        "accelerator": "hardware.accelerator",
        "architecture": "hardware.architecture",
        "instruction set": "hardware.instruction_set",
        "threads a rank": "hardware.threads_per_rank",
        "processor": "observed.cpu_model",
        "GPU": "observed.gpu",
        "driver": "observed.driver",
        "host": "observed.host",
        "kernel": "observed.kernel",
    },
}
_MAX_ENTRIES = 40  # of a list or mapping in one value
_SHA256 = {"manifest digest", "patch", "digest of its files", "archive"}


def groups(lock: Mapping[str, Any] | None, observed: Mapping[str, Any] | None) -> dict[str, dict[str, str]]:
    """The groups that have something to show."""
    tree = {**(lock or {}), "observed": observed or {}}
    found = {
        group: {name: text for name, place in places.items() if (text := _at(tree, name, place)) is not None}
        for group, places in _PLACES.items()
    }
    found["Stages"] = _stages(tree.get("stages"))
    order = [name for group in _PLACES for name in ([group, "Stages"] if group == "Data" else [group])]
    return {group: found[group] for group in order if found[group]}


def _stages(stages: Any) -> dict[str, str]:
    """A line for each stage of the lock: its samples, and what they are made of. Odd ones are shown as they stand."""
    if not isinstance(stages, list):
        return {}
    found, steps = {}, first_steps(stages)
    for number, stage in enumerate(stages[:_MAX_ENTRIES], 1):
        try:
            data = stage["data"]
            said = [f"from step {steps[number - 1]:,}"] if steps is not None else []
            said += [f"samples {stage['from_sample']} to {stage['to_sample']}", f"batch {stage['global_batch_size']}"]
            said += [f"sequence {data['seq_length']}"] if "seq_length" in data else []
            said += [f"seed {data['seed']}", *map(_share, data.get("mixture") or [])]
            text = (f"{data['stage']}: " if "stage" in data else "") + ", ".join(said)
        except (KeyError, TypeError, AttributeError):
            text = value_text(stage)
        found[f"stage {number}"] = printable(text)
    if len(stages) > _MAX_ENTRIES:
        found["stages in all"] = list_text(stages)
    return found


def _share(part: Mapping[str, Any]) -> str:
    weight = part["weight"]
    return f"{part['source']} {weight:.6g}" if isinstance(weight, float) else f"{part['source']} {value_text(weight)}"


def _at(tree: Any, name: str, place: str) -> str | None:
    for part in place.removeprefix("#").split("."):
        if is_unknown(tree):
            break
        if isinstance(tree, list) and part.isdigit():
            tree = tree[int(part)] if int(part) < len(tree) else None
        else:
            tree = tree.get(part) if isinstance(tree, dict) else None
    if tree is None:
        return None
    if place.startswith("#") and not is_unknown(tree):
        return list_text(tree) if isinstance(tree, dict | list) else None
    if isinstance(tree, dict) and isinstance(tree.get("version"), str):
        tree = tree["version"]
    text = value_text(tree)
    return f"sha256:{text}" if name in _SHA256 and isinstance(tree, str) else text


def list_text(value: Mapping[str, Any] | list[Any]) -> str:
    """How many there are, and the digest of all: of lists that are too long to show."""
    return f"{len(value)}, digest of the list sha256:{sha256_hex(dumps(value))}"


def value_text(value: Any) -> str:
    """A value of a lock for people, on one line."""
    if is_unknown(value):
        return printable(f"unknown: {value['unknown']}")
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, dict):
        value = [f"{name}={value_text(item)}" for name, item in sorted(value.items())]
    if isinstance(value, list):
        if not value:
            return "none"
        more = [f"and {len(value) - _MAX_ENTRIES} more"] if len(value) > _MAX_ENTRIES else []
        return printable(", ".join([*map(value_text, value[:_MAX_ENTRIES]), *more]))
    return printable(json.dumps(value))

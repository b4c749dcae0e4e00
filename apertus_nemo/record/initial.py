"""What a run starts from, where that is not drawn from a seed: found, checked, and pinned for the lock.

    found = find_initial(run)                        # None: weights are drawn from trainer.seed
    found.folder, found.tree                         # files for the ranks; the lock's field `initial_state`

A run may start from the weights of another run's checkpoint (`initial.kind=run`), of a folder in the published form
(`initial.kind=hugging_face`), or of one that `convert import` made of such a folder (`initial.kind=megatron`). Weights
alone are carried over: optimizer, step and random numbers begin anew, as in the published long-context and fine-tuning
runs. Every file is pinned by its SHA-256; the path is no part of what it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apertus_nemo.errors import InputError
from apertus_nemo.recipe.schema import ModelConfig, RunConfig, to_tree
from apertus_nemo.record.canonical import unknown
from apertus_nemo.record.checkpoints import check_checkpoint, read_manifest
from apertus_nemo.record.files import file_sha256, read_bytes, reading
from apertus_nemo.record.lock import RunLock
from apertus_nemo.record.run_dir import RunDirectory
from apertus_nemo.record.state import StateDigest

RUN, HUGGING_FACE, MEGATRON = "run", "hugging_face", "megatron"
EXPORTED = "apertus-nemo.json"  # in a folder that `convert` made: where it is from
MERGED = "apertus-nemo merge"  # kind of that note, where adapters were put into the weights
IMPORTED = "apertus-nemo import"  # the kind that this file names in a folder of Megatron's files
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_TEXT_BYTES = 64 * 1024 * 1024
_MAX_STATE_BYTES = 2**30

Inspect = Callable[[Path, list[str]], None]  # a folder and the names of its files of tensors

# Fields of the model that the weights do not decide: a child run may have others, and says so in its recipe.
FREE = frozenset(
    {
        "max_position_embeddings",
        "rotary_base",
        "rope_scaling",
        "rope_scaling_factor",
        "rope_low_freq_factor",
        "rope_high_freq_factor",
        "rope_original_max_position_embeddings",
        "init_method_std",
        "xielu_alpha_p_init",
        "xielu_alpha_n_init",
        "xielu_tensor_parallel_gradient",
        "layer_spec",
    }
)


@dataclass(frozen=True)
class Initial:
    """Where the ranks read the first weights, and what the lock says of them."""

    folder: Path  # a checkpoint, or a folder with config.json and safetensors
    tree: dict[str, Any]


def expected_weights(lock: RunLock) -> str | None:
    """The digest that the weights must have once they are loaded; None where none is known, or they are widened."""
    tree = lock.tree["initial_state"]
    same = tree.get("precision") == lock.tree["config"]["trainer"]["precision"]
    digest = tree.get("weights_digest")
    return digest if same and isinstance(digest, str) else None


def find_initial(
    run: RunConfig, *, folder: Path | None = None, inspect: Inspect = lambda folder, names: None
) -> Initial | None:
    """Look at what `run.initial` names, or at `folder` in its place; every byte is hashed.

    `inspect` sees a published folder and its files of tensors before these are hashed, which takes long.

    Raises InputError where it is not there, not whole, or not of a model of these sizes.
    """
    if run.initial.kind == "none":
        return None
    assert run.initial.path is not None  # `check` has seen to it
    path = Path(run.initial.path).expanduser().resolve() if folder is None else folder
    if not path.is_dir():
        raise InputError(f"initial.path={path}: there is no such folder")
    if run.initial.kind == MEGATRON:
        return _of_import(run, path)
    return _of_run(run, path) if run.initial.kind == RUN else _of_folder(run, path, inspect)


def _of_run(run: RunConfig, path: Path) -> Initial:
    directory = RunDirectory.open(path)
    lock = RunLock.from_bytes(read_bytes(directory.lock, max_bytes=_MAX_TEXT_BYTES), what=str(directory.lock))
    if lock.tree["config"].get("adapter", {}).get("kind", "none") != "none":
        raise InputError(
            f"initial.path={path}: the checkpoints of this run hold adapters, and no weights: export them, merge them "
            "with their base (apertus-nemo convert merge), and start from that folder with initial.kind=hugging_face"
        )
    steps = sorted(int(each.name[5:]) for each in directory.checkpoints.glob("step-*") if each.name[5:].isdigit())
    if not steps:
        raise InputError(f"initial.path={path}: the run holds no checkpoint")
    step = steps[-1] if run.initial.step is None else run.initial.step
    if step not in steps:
        there = ", ".join(map(str, steps))
        raise InputError(f"initial.step={step}: {path} holds no checkpoint of that step; there are {there}")
    checkpoint = directory.checkpoint(step)
    check_checkpoint(checkpoint, lock_digest=lock.digest)
    _same_model(run.model, lock.tree["config"]["model"], of=str(path))
    precision = lock.tree["config"]["trainer"]["precision"]
    _same_precision(run, precision, of=str(path))
    digest: Any = unknown("the state of that step was not digested")
    state = directory.state(step)
    if state.is_file():
        read = StateDigest.from_bytes(read_bytes(state, max_bytes=_MAX_STATE_BYTES), what=str(state))
        digest = read.digest_of_kind("weight")
    files = {name: entry["sha256"] for name, entry in sorted(read_manifest(checkpoint)["files"].items())}
    parent = {"lock_digest": lock.digest, "step": step}
    return Initial(checkpoint, _tree(RUN, files, parent, digest, precision))


def _of_folder(run: RunConfig, path: Path, inspect: Inspect) -> Initial:
    if (path / "adapter_config.json").is_file() and not (path / "config.json").exists():
        raise InputError(
            f"initial.path={path}: this folder holds adapters, and no weights: merge them with their base "
            "(apertus-nemo convert merge), and start from that folder"
        )
    config = read_json(path / "config.json")
    from apertus_nemo.recipe.hf_config import from_hf

    _same_model(run.model, to_tree(from_hf(config, run.model, what=str(path / "config.json"))), of=str(path))
    precision = precision_of(config)
    _same_precision(run, precision, of=str(path))
    names = ["config.json", *weight_files(path, what=f"initial.path={path}")]
    inspect(path, [name for name in names if name.endswith(".safetensors")])
    files = {name: file_sha256(path / name) for name in sorted(names)}
    parent: Any = unknown(f"the folder holds no {EXPORTED}: it was not exported from a run of ours")
    digest: Any = unknown("nobody has logged it")
    if (path / EXPORTED).is_file():
        source = read_json(path / EXPORTED).get("source")
        parent = _parent(source)
        digest = (source.get("weights_digest") if isinstance(source, dict) else None) or digest
    return Initial(path, _tree(HUGGING_FACE, files, parent, digest, precision))


def _tree(kind: str, files: dict[str, str], parent: Any, digest: Any, precision: str) -> dict[str, Any]:
    return {
        "carries": ["weights"],
        "files": files,
        "kind": kind,
        "parent": parent,
        "precision": precision,
        "weights_digest": digest,
    }


def _of_import(run: RunConfig, path: Path) -> Initial:
    note = import_note(path)
    if note is None:
        raise InputError(
            f"initial.path={path}: the folder holds no {EXPORTED} of `apertus-nemo convert import`; "
            "initial.kind=run reads a run, initial.kind=hugging_face a folder with safetensors"
        )
    check_checkpoint(path, lock_digest="")
    from apertus_nemo.recipe.hf_config import from_hf

    config = read_json(path / "config.json")
    _same_model(run.model, to_tree(from_hf(config, run.model, what=str(path / "config.json"))), of=str(path))
    precision = precision_of(config)
    _same_precision(run, precision, of=str(path))
    files = {name: entry["sha256"] for name, entry in sorted(read_manifest(path)["files"].items())}
    return Initial(path, _tree(MEGATRON, files, _parent(note.get("source")), note["weights_digest"], precision))


def _parent(source: Any) -> dict[str, Any]:
    """The run that a folder says it is of; unknown where it is of none of ours."""
    if isinstance(source, dict) and {"lock_digest", "step"} <= source.keys():
        merged = {"adapter_digest": source["adapter_digest"]} if "adapter_digest" in source else {}
        return {"lock_digest": source["lock_digest"], "step": source["step"], **merged}
    return unknown(f"{EXPORTED} in the folder names no run of ours")


def import_note(path: Path) -> dict[str, Any] | None:
    """What `convert import` wrote beside the weights that it brought into Megatron's form; None for other folders."""
    if not (path / EXPORTED).is_file():
        return None
    note = read_json(path / EXPORTED)
    return note if note.get("kind") == IMPORTED and isinstance(note.get("weights_digest"), str) else None


def precision_of(config: dict[str, Any]) -> str:
    """The type of the weights as a recipe calls it, from a `config.json`: "fp32", "bf16", or what stands there."""
    dtype = config.get("torch_dtype") or config.get("dtype")
    return {"bfloat16": "bf16", "float32": "fp32"}.get(str(dtype), str(dtype))


def weight_files(path: Path, *, what: str) -> list[str]:
    """The names of the files with weights, and of their index. Raises InputError, beginning with `what`."""
    if not (path / _INDEX).is_file():
        if not (path / _SINGLE).is_file():
            raise InputError(f"{what}: the folder holds neither {_SINGLE} nor {_INDEX}")
        return [_SINGLE]
    places = read_json(path / _INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) and "/" not in name for name in places.values()):
        raise InputError(f"{path / _INDEX} is no index of safetensors")
    names = sorted(set(places.values()))
    for name in names:
        if not (path / name).is_file():
            raise InputError(f"{what}: {name} is missing, and {_INDEX} names it")
    return [*names, _INDEX]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError where the file cannot be read, or is none."""
    with reading(path):
        data = read_bytes(path, max_bytes=_MAX_TEXT_BYTES)
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path} is no JSON object")
    return tree


def _same_model(ours: ModelConfig, theirs: dict[str, Any], *, of: str) -> None:
    mine = to_tree(ours)
    lines = [
        f"model.{name}={mine[name]}: the weights in {of} are of a model with {theirs[name]}"
        for name in sorted(mine)
        if name not in FREE and name in theirs and theirs[name] != mine[name]
    ]
    if lines:
        raise InputError("\n".join(lines))


def _same_precision(run: RunConfig, theirs: str, *, of: str) -> None:
    """Weights may be widened, which loses nothing, and not rounded."""
    if theirs == "fp32" and run.trainer.precision == "bf16":
        raise InputError(
            f"trainer.precision=bf16: the weights in {of} are fp32, and would be rounded; set trainer.precision=fp32"
        )
    if theirs not in ("fp32", "bf16"):
        raise InputError(f"the weights in {of} are of the type {theirs}; fp32 and bf16 can be read")

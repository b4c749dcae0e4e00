"""From a checkpoint to a folder that `transformers` loads: sharded safetensors, config, tokenizer.

    exported = export(checkpoint / "weights", run.model, Path("out"), tokenizer=corpus / "tokenizer", source={})

Streaming: at most one parameter of Megatron's and one chunk of it are in memory. The folder is complete or absent: it
is made beside its place, in files that are each complete or absent, and renamed at the end; a second call goes on
where an earlier one was interrupted. Values are copied bit for bit, in the type that they have.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from apertus_nemo.convert.lanes import finite
from apertus_nemo.convert.megatron import MegatronWeights
from apertus_nemo.convert.safetensors import DTYPES, Entry, ShardWriter, size_bytes
from apertus_nemo.convert.stream import Behind
from apertus_nemo.errors import InputError
from apertus_nemo.model.layout import published_shapes
from apertus_nemo.recipe.hf_config import to_hf
from apertus_nemo.recipe.schema import ModelConfig
from apertus_nemo.record.canonical import dumps
from apertus_nemo.record.files import file_sha256, sync_folder, write_atomic, writing

SHARD_BYTES = 4 * 10**9  # of one file; a larger tensor has a file of its own
SOURCE = "apertus-nemo.json"  # where the folder comes from
INDEX = "model.safetensors.index.json"
_BUFFERS = ("mlp.act_fn.beta", "mlp.act_fn.eps")  # constants that transformers keeps beside the weights, 0-D
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)

Progress = Callable[[int, int], None]  # bytes written, bytes in all


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    tensors: int
    size_bytes: int
    shards: int


def export(
    weights: Path,
    model: ModelConfig,
    folder: Path,
    *,
    tokenizer: Path | None,
    source: dict[str, Any],
    tokens: dict[str, int | None] | None = None,
    shard_bytes: int = SHARD_BYTES,
    allow_nonfinite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Write `folder` from the torch_dist files in `weights`; `source` says where they are from, and is kept.

    `tokens`: ids of bos, eos and pad, where no tokenizer says them. Raises InputError (a checkpoint that is not of this
    model, a value that is not finite, a folder that is there), UnfitEnvironment (disk).
    """
    found = MegatronWeights(weights, model)
    if tokenizer is not None and not (tokenizer / "tokenizer.json").is_file():
        raise InputError(f"{tokenizer} holds no tokenizer.json: give the folder of a tokenizer")
    return write_folder(
        found,
        model,
        folder,
        note={"format": 1, "kind": "apertus-nemo export", "source": source, "shard_bytes": shard_bytes},
        finish=partial(_configure, model=model, dtype=found.dtype, tokenizer=tokenizer, tokens=tokens),
        shard_bytes=shard_bytes,
        allow_nonfinite=allow_nonfinite,
        progress=progress,
    )


class Published(Protocol):
    """Published tensors, one after another."""

    dtype: torch.dtype

    def published(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor in blocks of whole rows, in order: [rows, columns], contiguous."""


def write_folder(
    found: Published,
    model: ModelConfig,
    folder: Path,
    *,
    note: dict[str, Any],
    finish: Callable[[Path], None],
    shard_bytes: int = SHARD_BYTES,
    allow_nonfinite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Write every tensor of a model into `folder`, whole or absent; `finish` adds what else belongs there.

    `note` is kept in the folder, and an interrupted call goes on where it is the same. Raises InputError (a value that
    is not finite, a folder that is there), UnfitEnvironment (disk).
    """
    if os.path.lexists(folder):
        raise InputError(f"{folder} is there already: name a folder that is not")
    entries = _entries(model, found.dtype)
    shards = _shards(entries, shard_bytes)
    total = sum(map(size_bytes, entries.values()))
    place = folder.with_name(f".{folder.name}.partial")
    done = _begin(place, dumps(note))
    try:
        _write(found, model, place, entries, shards, done, allow_nonfinite=allow_nonfinite, progress=progress)
        if len(shards) > 1:
            places = {tensor: name for name, tensors in shards.items() for tensor in tensors}
            _write_json(place / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
        finish(place)
    except InputError:  # going on would meet it again
        shutil.rmtree(place, ignore_errors=True)
        raise
    with writing(folder):
        (place / _JOURNAL).unlink(missing_ok=True)
        sync_folder(place)
        place.rename(folder)
        sync_folder(folder.parent)
    return Exported(folder, len(entries), total, len(shards))


def _write(
    found: Published,
    model: ModelConfig,
    place: Path,
    entries: dict[str, Entry],
    shards: dict[str, list[str]],
    done: dict[str, str],
    *,
    allow_nonfinite: bool,
    progress: Progress,
) -> None:
    """The files of weights that are not there yet; `done`: file -> SHA-256 of those that are."""
    total, written = sum(map(size_bytes, entries.values())), 0
    for name, tensors in shards.items():
        held = {tensor: entries[tensor] for tensor in tensors}
        size = sum(map(size_bytes, held.values()))
        if done.get(name) is None or file_sha256(place / name) != done[name]:
            with ShardWriter(place / name, held) as shard, Behind(shard.write) as write:
                for tensor in tensors:
                    for block in _blocks(found, model, tensor):
                        if not (allow_nonfinite or finite(block)):
                            raise InputError(
                                f"{tensor} holds a value that is not finite; --allow-nonfinite converts it all the same"
                            )
                        write(tensor, block)
                        written += block.numel() * block.element_size()
                        progress(written, total)
            done[name] = shard.sha256
            write_atomic(place / _JOURNAL, dumps(done))
        else:
            written += size
            progress(written, total)


_JOURNAL = ".done.json"
_NOTE = SOURCE


def _entries(model: ModelConfig, dtype: torch.dtype) -> dict[str, Entry]:
    """Every tensor of the folder, in the order of the computation; xIELU's constants included."""
    kind = DTYPES.get(dtype)
    if kind is None:
        raise InputError(f"the weights are of the type {dtype}, which is not one of {', '.join(map(str, DTYPES))}")
    entries: dict[str, Entry] = {}
    for name, shape in published_shapes(model).items():
        entries[name] = (kind, shape)
        if name.endswith("mlp.act_fn.alpha_n"):
            layer = name.removesuffix("mlp.act_fn.alpha_n")
            entries |= {layer + buffer: (kind, ()) for buffer in _BUFFERS}
    return entries


def _blocks(found: Published, model: ModelConfig, name: str) -> Any:
    if name.endswith(_BUFFERS):
        value = model.xielu_beta if name.endswith("beta") else model.xielu_eps
        return [torch.tensor([[value]], dtype=found.dtype)]
    return found.published(name)


def _shards(entries: dict[str, Entry], limit: int) -> dict[str, list[str]]:
    """File -> tensors, filled in order; names as transformers writes them."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, entry in entries.items():
        if groups[-1] and size + size_bytes(entry) > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += size_bytes(entry)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, 1)}


def _begin(place: Path, note: bytes) -> dict[str, str]:
    """Make the folder, or find what an interrupted export of the same source left there: file -> SHA-256."""
    with writing(place):
        try:
            same = (place / _NOTE).read_bytes() == note
        except OSError:
            same = False
        if not same:
            if place.exists():
                shutil.rmtree(place)
            place.mkdir(parents=True)
            write_atomic(place / _NOTE, note)
        try:
            tree = json.loads((place / _JOURNAL).read_bytes())
        except (OSError, ValueError):
            tree = {}
    whole = tree.items() if isinstance(tree, dict) else ()
    return {str(name): str(digest) for name, digest in whole if (place / str(name)).is_file()}


def _configure(
    place: Path,
    *,
    model: ModelConfig,
    dtype: torch.dtype,
    tokenizer: Path | None,
    tokens: dict[str, int | None] | None,
) -> None:
    """Configuration and tokenizer."""
    tokens = tokens or {"bos": 1, "eos": 2, "pad": 3}
    if tokenizer is not None:
        tokens = _copy_tokenizer(tokenizer, place)
    _write_json(place / "config.json", to_hf(model, dtype=str(dtype), tokens=tokens))
    generation = {f"{name}_token_id": value for name, value in tokens.items() if value is not None}
    _write_json(place / "generation_config.json", {"_from_model_config": True, **generation})


def _copy_tokenizer(tokenizer: Path, place: Path) -> dict[str, int | None]:
    """The tokenizer's files, and the ids of its special tokens."""
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            write_atomic(place / name, (tokenizer / name).read_bytes())
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    try:
        config = json.loads((tokenizer / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        config = {}
    found: dict[str, int | None] = {}
    for name, usual in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>")):
        token = config.get(f"{name}_token", usual)
        token = token.get("content") if isinstance(token, dict) else token
        found[name] = None if token is None else ids.token_to_id(token)
    return found


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(tree, indent=2, sort_keys=True) + "\n").encode())

"""Adapters put into the weights that they stand beside: a folder that needs no adapters.

    merged = merge(Path("hf"), Path("adapter"), Path("merged"), like=model)

W becomes W + alpha / rank B A, element by element in float64, the rank's products in their order, and is then rounded
to float32 and, where the base is bf16, to that: additions and multiplications alone, the same bits on every machine.
All else is the base's. Streaming, whole or absent, resumable as an export is: one block of rows is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apertus_nemo.convert.digest import folder_digests
from apertus_nemo.convert.export import SHARD_BYTES, TOKENIZER_FILES, Exported, Progress, write_folder
from apertus_nemo.convert.headers import CONSTANTS, read_header, refuse_other_tensors
from apertus_nemo.convert.initial import FolderWeights
from apertus_nemo.convert.peft_form import CONFIG, WEIGHTS, PeftAdapters
from apertus_nemo.errors import Differs, InputError
from apertus_nemo.model.layout import published_shapes
from apertus_nemo.recipe.hf_config import from_hf
from apertus_nemo.recipe.schema import ModelConfig
from apertus_nemo.record.canonical import dumps
from apertus_nemo.record.files import file_sha256, write_atomic
from apertus_nemo.record.initial import EXPORTED, MERGED, read_json, weight_files
from apertus_nemo.record.state import digest_of

_ELEMENTS = 1 << 18  # of float64 at a time: in the processor's cache
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Merged:
    """What was written, and of what."""

    exported: Exported
    weights_digest: str
    base: str | None  # how it is known that the base is that of the adapters; None: it is not known


class MergedWeights:
    """The weights of a folder with adapters put in."""

    def __init__(self, folder: Path, model: ModelConfig, dtype: torch.dtype, adapters: PeftAdapters) -> None:
        self.dtype = dtype
        self._base, self._adapters, self._shapes = FolderWeights(folder, model), adapters, published_shapes(model)

    def published(self, name: str) -> Iterator[torch.Tensor]:
        """The published tensor in blocks of whole rows, in order: [rows, columns], contiguous."""
        shape = self._shapes[name]
        rows, width = (1, shape[0]) if len(shape) == 1 else shape
        pair = self._adapters.matrices(name)
        step = max(1, _ELEMENTS // width)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            block = self._base.block(name, (start, stop), (0, width))
            if pair is not None:
                block = self._added(block, pair[0], pair[1][start:stop])
            yield block.contiguous()

    def _added(self, block: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(block.shape, dtype=torch.float64)
        product = torch.empty_like(total)
        wide_a, wide_b = a.double(), b.double()
        for k in range(a.shape[0]):
            torch.mul(wide_b[:, k : k + 1], wide_a[k : k + 1], out=product)
            total += product
        total *= self._adapters.scale
        total += block
        return total.float().to(self.dtype)


def merge(
    base: Path,
    adapter: Path,
    folder: Path,
    *,
    like: ModelConfig,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> Merged:
    """Write `folder`; `like` says what no config.json says.

    Raises InputError (no folder of a model or of adapters, tensors that do not fit, a folder that is there), Differs
    (another base than that of the adapters), UnfitEnvironment (disk).
    """
    config = read_json(base / "config.json")
    model = from_hf(config, like, what=str(base / "config.json"))
    names = weight_files(base, what=str(base))
    files = [name for name in names if name.endswith(".safetensors")]
    refuse_other_tensors(base, files, published_shapes(model))
    headers = {name: entry for file in files for name, entry in read_header(base / file).items()}
    types = {str(entry["dtype"]) for name, entry in headers.items() if not name.endswith(CONSTANTS)}
    if len(types) != 1:
        raise InputError(f"{base}: the weights are of several types, {' and '.join(sorted(types))}")
    adapters = PeftAdapters(adapter, model)
    source = read_json(adapter / EXPORTED) if (adapter / EXPORTED).is_file() else {}
    known = _same_base(base, adapter, files, model, source.get("base"))
    note = {
        "adapter": {name: file_sha256(adapter / name) for name in (CONFIG, WEIGHTS)},
        "base": {name: file_sha256(base / name) for name in ("config.json", *names)},
        "format": 1,
        "kind": MERGED,
        "shard_bytes": shard_bytes,
        "source": source.get("source"),
    }
    digests: list[str] = []

    def finish(place: Path) -> None:
        for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
            if (base / name).is_file():
                write_atomic(place / name, (base / name).read_bytes())
        digests.append(digest_of(folder_digests(place, model)))  # of what lies there, read back
        origin: Any = note["source"]
        if isinstance(origin, dict):
            origin = {**origin, "weights_digest": digests[0]}
        write_atomic(place / EXPORTED, dumps({**note, "source": origin, "weights_digest": digests[0]}))

    found = MergedWeights(base, model, _DTYPES[types.pop()], adapters)
    done = write_folder(found, model, folder, note=note, finish=finish, shard_bytes=shard_bytes, progress=progress)
    return Merged(done, digests[0], known)


def _same_base(base: Path, adapter: Path, files: list[str], model: ModelConfig, pinned: Any) -> str | None:
    """How the base is known to be the one that adapters were trained beside; None where they do not say.

    Raises Differs where it is another.
    """
    if not isinstance(pinned, dict):
        return None
    wanted = pinned.get("files")
    if isinstance(wanted, dict):
        held = {name: digest for name, digest in wanted.items() if str(name).endswith(".safetensors")}
        if held and held == {name: file_sha256(base / name) for name in files}:
            return "its files"
    digest = digest_of(folder_digests(base, model))
    known = [each for each in pinned.get("weights_digests", []) if isinstance(each, str)]
    if digest in known:
        return "its weights digest"
    raise Differs(
        f"{base} holds other weights than those beside which {adapter} was trained: their digest is {digest}, and "
        f"{' or '.join(known) or 'that of other files'} is wanted"
    )

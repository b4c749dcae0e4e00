"""Training samples: Megatron's GPT datasets over built corpora, with the Goldfish mask.

    dataset = training_dataset(run, corpus, cache=folder)
    dataset[7]          # {"tokens", "labels", "loss_mask", "position_ids"}, each of shape [seq_length of its stage]
    dataset.place(7)    # which stage, which source, which position in it

Sample i is a function of the corpora's bytes, of `data` and of `schedule.train_samples`; where the files and the
cache lie changes nothing. Neither CUDA, nor NeMo, nor a compiler is needed: the wheel of megatron-core holds the
index builder compiled.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apertus_nemo.data import manifest as manifests
from apertus_nemo.data import mixture
from apertus_nemo.data.blending import Blend, positions
from apertus_nemo.data.build import sync_tree
from apertus_nemo.data.chat_dataset import ChatDataset
from apertus_nemo.data.goldfish import kept
from apertus_nemo.data.mixture import SourceData
from apertus_nemo.errors import UnfitEnvironment
from apertus_nemo.recipe.schema import RunConfig
from apertus_nemo.recipe.stages import Stage, StagePlan
from apertus_nemo.record.files import writing, writing_for_others

if TYPE_CHECKING:
    import torch

Sample = dict[str, "torch.Tensor"]
_SUMS = "SHA256SUMS"  # of the cached index files


@dataclass(frozen=True)
class SamplePlace:
    """Where a sample comes from."""

    stage: Stage
    source: str  # "" where the stage reads all of the data
    position: int  # of the source's samples, in the order of its seed


@dataclass(frozen=True)
class _Reader:
    """The samples of one stage."""

    stage: Stage
    blend: Blend
    datasets: tuple[Any, ...]  # Megatron's, one a source of the stage; None for one that gives no sample
    offsets: tuple[int, ...]  # position in each source at the stage's start

    def find(self, index: int) -> tuple[int, int]:
        """(number of the source, position in it) of a sample of the run."""
        number, drawn = self.blend[index - self.stage.from_sample]
        return number, self.offsets[number] + drawn


class TrainingDataset:
    """Global sample index, 0 to train_samples - 1, to a sample.

    tokens, labels, position_ids: int64 [seq_length]; labels are the tokens one place on.
    loss_mask: float32 [seq_length]; 0 where the input is the end-of-document token (if
    `data.eod_mask_loss`) and where the Goldfish hash drops the label, else 1.
    documents, only with `data.document_masking=per_document`: int64 [seq_length]; the number of the token's
    document in the sample, from 0. A sample may begin inside a document.
    seq_length is that of the sample's stage.
    """

    def __init__(self, readers: tuple[_Reader, ...], run: RunConfig, *, eod: int) -> None:
        self._readers = readers
        self._plan = StagePlan.from_config(run)
        self._length = run.schedule.train_samples
        self._eod = eod if run.data.document_masking == "per_document" else None
        self._goldfish = (run.data.goldfish_k, run.data.goldfish_h) if run.data.goldfish else None

    def __len__(self) -> int:
        return self._length

    def _reader(self, index: int) -> _Reader:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        return self._readers[self._plan.at(index).number - 1]

    def place(self, index: int) -> SamplePlace:
        """Where the sample of this index comes from; looked up, nothing is walked."""
        reader = self._reader(index)
        number, position = reader.find(index)
        return SamplePlace(reader.stage, reader.stage.sources[number], position)

    def __getitem__(self, index: int) -> Sample:
        reader = self._reader(index)
        number, position = reader.find(index)
        sample: Sample = dict(reader.datasets[number][position])
        if self._goldfish:
            import torch

            k, h = self._goldfish
            # A new tensor: Megatron hands out the mask that it caches when nothing else depends on the sample.
            sample["loss_mask"] = sample["loss_mask"] * torch.from_numpy(kept(sample["labels"].numpy(), k=k, h=h))
        if self._eod is not None:
            sample["documents"] = document_numbers(sample["tokens"], eod=self._eod)
        return sample


def document_numbers(tokens: torch.Tensor, *, eod: int) -> torch.Tensor:
    """The number of each token's document in its sample, from 0: int64 of the tokens' shape, [..., sequence].

    A document ends with the end-of-document token, which belongs to it; the next token begins another one.
    """
    import torch

    ended = (tokens == eod).to(torch.int64)
    return ended.cumsum(dim=-1) - ended


def training_dataset(run: RunConfig, corpus: Path, *, cache: Path) -> TrainingDataset | ChatDataset:
    """The samples of a run, the same on each rank. Verify the corpora first (`manifest.verify`).

    With torch.distributed initialised, every rank must call it: rank 0 makes the index, the others wait.

    Args:
        run: the resolved recipe.
        corpus: a folder made by `apertus-nemo data build`; with mixtures of built data, the folder of such folders.
        cache: a folder for the index, seen by all ranks; made if missing.

    Raises:
        InputError: a corpus does not fit the model, or is not one.
        UnfitEnvironment: the cache cannot be written, or is not seen by all ranks.
    """
    found = mixture.sources(run, corpus)
    if run.data.kind == "chat":
        return ChatDataset(run, found[""])  # it needs no index
    plan = StagePlan.from_config(run)
    choices = {
        "stages": [
            {
                "from_sample": stage.from_sample,
                "to_sample": stage.to_sample,
                "seed": stage.seed,
                "seq_length": stage.seq_length,
                "position": stage.position,
                "sources": [_identity(found[name]) for name in stage.sources],
                "weights": [weight.hex() for weight in mixture.weights(stage, found)],
            }
            for stage in plan.stages
        ],
        "packages": {name: _version(name) for name in ("megatron-core", "numpy")},
    }
    key = hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache / f"index-{key}"
    rank, barrier = _distributed()
    if rank == 0 and not _index_is_good(folder):
        with writing(cache), writing_for_others(cache):
            _make_index(folder, lambda made: _open(run, plan, found, made, make=True))
    barrier()
    if not folder.is_dir():
        raise UnfitEnvironment(
            f"{folder}: rank {rank} does not see what rank 0 wrote: use a folder that all ranks share"
        )
    readers = _open(run, plan, found, folder, make=False)
    return TrainingDataset(readers, run, eod=next(iter(found.values())).manifest.tokenizer.eos_id)


def _identity(source: SourceData) -> str:
    """Content, in the place of the path, which Megatron hashes into the names of its cache."""
    digest = manifests.digest(source.manifest)
    return digest if source.whole else f"{digest}:{source.first}-{source.end}"


def _open(
    run: RunConfig, plan: StagePlan, found: Mapping[str, SourceData], folder: Path, *, make: bool
) -> tuple[_Reader, ...]:
    """The readers of all stages, with their index in `folder`, which is made there first where `make` says so."""
    if make:
        blends = [Blend.build(stage, mixture.weights(stage, found)) for stage in plan.stages]
        for stage, blend in zip(plan.stages, blends, strict=True):
            blend.save(stage, folder)
    else:
        blends = [Blend.load(stage, folder) for stage in plan.stages]
    places, needed = positions(plan, [blend.counts for blend in blends])
    orders = {}
    for (begun, name), samples in needed.items():
        first = plan.stages[begun - 1]
        orders[begun, name] = _megatron(run, first, found[name], samples, folder) if samples else None
    return tuple(
        _Reader(stage, blend, tuple(orders[order] for order, _ in row), tuple(offset for _, offset in row))
        for stage, blend, row in zip(plan.stages, blends, places, strict=True)
    )


def _megatron(run: RunConfig, stage: Stage, source: SourceData, samples: int, folder: Path) -> Any:
    """Megatron's dataset of `samples` samples of a source, in the order and of the length that the stage says."""
    import numpy as np
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    prefix = str(source.corpus / manifests.PREFIX)
    config = GPTDatasetConfig(
        random_seed=stage.seed,
        sequence_length=stage.seq_length,
        blend=([prefix], None),
        split="100,0,0",
        path_to_cache=str(folder),
        tokenizer=_EndOfDocument(source.manifest.tokenizer.eos_id),
        # Neither would change anything: RoPE reads no position ids, and no attention mask is made.
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=run.data.eod_mask_loss,
        create_attention_mask=False,
    )
    low_level = GPTDataset.build_low_level_dataset(prefix, config)
    documents = np.arange(source.first, source.end, dtype=np.int32)
    return GPTDataset(low_level, _identity(source), documents, samples, Split.train, config)


def sample_digest(sample: Sample) -> bytes:
    """SHA-256 of what a sample trains on: tokens and labels (int64), loss mask (float32), little-endian; 32 bytes.

    Where documents do not see each other, their numbers follow (int64). Takes one sample or a whole micro-batch.
    """
    state = hashlib.sha256()
    for key, kind in (("tokens", "<i8"), ("labels", "<i8"), ("loss_mask", "<f4"), ("documents", "<i8")):
        if key == "documents" and key not in sample:
            continue
        state.update(sample[key].cpu().contiguous().numpy().astype(kind, copy=False).tobytes())
    return state.digest()


class _EndOfDocument:
    """What Megatron's dataset asks of a tokenizer: `eod`, and a name for its cache.

    It must not have `pad`: Megatron turns every token with that id into 0. Without it the id is -1,
    which no text has (megatron/core/datasets/gpt_dataset.py, `GPTDataset.__getitem__`).
    """

    def __init__(self, eod: int) -> None:
        self.eod = eod
        self.unique_identifiers = OrderedDict(eod=eod)


def _version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package)


def _distributed() -> tuple[int, Any]:
    """This process' rank, and the barrier of all ranks."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.barrier
    return 0, lambda: None


def _make_index(folder: Path, open_index: Any) -> None:
    """Let Megatron write its index beside `folder`, add the sums, sync, rename.

    Runs that want the same index at once take turns, and find it made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _turn(folder.parent):
        if _index_is_good(folder):
            return
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.building-", dir=folder.parent))
        try:
            open_index(made)
            names = sorted(path.name for path in made.iterdir())
            lines = [f"{manifests.hash_file(made / name)[1]}  {name}\n" for name in names]
            (made / _SUMS).write_text("".join(lines))
            sync_tree(made)
            if _index_is_good(folder):  # another process', which reads it: where there are no locks
                return
            if folder.exists():  # damaged
                away = made.with_name(f"{made.name}-damaged")
                folder.rename(away)  # in one step: nobody finds half of it
                shutil.rmtree(away, ignore_errors=True)
            try:
                made.rename(folder)
            except OSError:
                if not _index_is_good(folder):
                    raise
        finally:
            shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; where the file system has none, go on."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _index_is_good(folder: Path) -> bool:
    """Whether the cached index is whole and holds plain arrays (Megatron would unpickle others)."""
    import numpy as np

    try:
        lines = (folder / _SUMS).read_text().splitlines()
        names = [line[66:] for line in lines]
        if sorted([*names, _SUMS]) != sorted(path.name for path in folder.iterdir()):
            return False
        for line, name in zip(lines, names, strict=True):
            if manifests.hash_file(folder / name)[1] != line[:64]:
                return False
            if name.endswith(".npy"):
                np.load(folder / name, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return False
    return bool(names)

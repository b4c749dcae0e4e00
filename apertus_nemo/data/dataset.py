"""Training samples: Megatron's GPT dataset over a built corpus, with the Goldfish mask.

    dataset = training_dataset(run, corpus, cache=folder)
    dataset[7]   # {"tokens", "labels", "loss_mask", "position_ids"}, each of shape [seq_length]

Sample i is a function of the corpus' bytes, `data.seed`, `data.seq_length` and
`schedule.train_samples`, its masks of the other settings of `data`; where the files and the cache lie
changes nothing. Neither CUDA, nor NeMo, nor a compiler is needed: the wheel of megatron-core holds the
index builder compiled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apertus_nemo.data import manifest as manifests
from apertus_nemo.data.build import sync_tree
from apertus_nemo.data.goldfish import kept
from apertus_nemo.errors import UnfitEnvironment
from apertus_nemo.recipe.schema import RunConfig
from apertus_nemo.record.files import writing

if TYPE_CHECKING:
    import torch

Sample = dict[str, "torch.Tensor"]
_SUMS = "SHA256SUMS"  # of the cached index files


class TrainingDataset:
    """Global sample index, 0 to train_samples - 1, to a sample.

    tokens, labels, position_ids: int64 [seq_length]; labels are the tokens one place on.
    loss_mask: float32 [seq_length]; 0 where the input is the end-of-document token (if
    `data.eod_mask_loss`) and where the Goldfish hash drops the label, else 1.
    documents, only with `data.document_masking=per_document`: int64 [seq_length]; the number of the token's
    document in the sample, from 0. A sample may begin inside a document.
    """

    def __init__(self, megatron: Any, run: RunConfig, *, eod: int) -> None:
        self._megatron = megatron
        self._length = run.schedule.train_samples
        self._eod = eod if run.data.document_masking == "per_document" else None
        self._goldfish = (run.data.goldfish_k, run.data.goldfish_h) if run.data.goldfish else None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        sample: Sample = dict(self._megatron[index])
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


def training_dataset(run: RunConfig, corpus: Path, *, cache: Path) -> TrainingDataset:
    """The samples of a run, the same on each rank. Verify the corpus first (`manifest.verify`).

    With torch.distributed initialised, every rank must call it: rank 0 makes the index, the others wait.

    Args:
        run: the resolved recipe.
        corpus: a folder made by `apertus-nemo data build`.
        cache: a folder for the index, seen by all ranks; made if missing.

    Raises:
        InputError: the corpus does not fit the model, or is not one.
        UnfitEnvironment: the cache cannot be written, or is not seen by all ranks.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    manifest = manifests.load(corpus)
    manifests.check_against_model(manifest, run)
    prefix = str(corpus / manifests.PREFIX)

    def open_index(folder: Path) -> Any:
        config = GPTDatasetConfig(
            random_seed=run.data.seed,
            sequence_length=run.data.seq_length,
            blend=([prefix], None),
            split="100,0,0",
            path_to_cache=str(folder),
            tokenizer=_EndOfDocument(manifest.tokenizer.eos_id),
            # Neither would change anything: RoPE reads no position ids, and no attention mask is made.
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=run.data.eod_mask_loss,
            create_attention_mask=False,
        )
        low_level = GPTDataset.build_low_level_dataset(prefix, config)
        documents = _all_documents(GPTDataset.numel_low_level_dataset(low_level))
        # In the place of the path, which Megatron hashes into the names of its cache: the content.
        name = manifests.digest(manifest)
        return GPTDataset(low_level, name, documents, run.schedule.train_samples, Split.train, config)

    choices = {
        "manifest": manifests.digest(manifest),
        "seed": run.data.seed,
        "seq_length": run.data.seq_length,
        "train_samples": run.schedule.train_samples,
        "packages": {name: _version(name) for name in ("megatron-core", "numpy")},
    }
    key = hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache / f"index-{key}"
    rank, barrier = _distributed()
    if rank == 0 and not _index_is_good(folder):
        with writing(cache):
            _make_index(folder, open_index)
    barrier()
    if not folder.is_dir():
        raise UnfitEnvironment(
            f"{folder}: rank {rank} does not see what rank 0 wrote: use a folder that all ranks share"
        )
    return TrainingDataset(open_index(folder), run, eod=manifest.tokenizer.eos_id)


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


def _all_documents(count: int) -> Any:
    import numpy as np

    return np.arange(count, dtype=np.int32)


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
    """Let Megatron write its index beside `folder`, add the sums, sync, rename."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.building-", dir=folder.parent))
    try:
        open_index(made)
        names = sorted(path.name for path in made.iterdir())
        lines = [f"{manifests.hash_file(made / name)[1]}  {name}\n" for name in names]
        (made / _SUMS).write_text("".join(lines))
        sync_tree(made)
        if folder.exists():  # a damaged one
            shutil.rmtree(folder)
        try:
            made.rename(folder)
        except OSError:
            if not _index_is_good(folder):  # else another process was first, with the same bytes
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


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

"""Cases of the data floor; run in ranks forked from a parent that has imported NeMo."""

from __future__ import annotations

import contextlib
import io
import os
import resource
from pathlib import Path
from typing import Any

from apertus_nemo.recipe.schema import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    TrainerConfig,
)


def run_config(**changes: Any) -> RunConfig:
    """A small run; changes by the names of DataConfig, and train_samples, vocab_size, batch sizes, devices."""
    vocab_size = changes.pop("vocab_size", 512)
    train_samples = changes.pop("train_samples", 40)
    trainer = {
        name: changes.pop(name) for name in ("global_batch_size", "micro_batch_size", "devices") if name in changes
    }
    return RunConfig(
        name="test",
        model=ModelConfig(2, 32, 64, 2, 1, 16, vocab_size=vocab_size),
        data=DataConfig(**{"seq_length": 64, **changes}),
        optim=OptimConfig(lr=1e-3, min_lr=0.0),
        schedule=ScheduleConfig(train_samples=train_samples),
        parallel=ParallelConfig(),
        trainer=TrainerConfig(**{"global_batch_size": 4, "micro_batch_size": 2, **trainer}),
    )


def command(
    rank: int, world_size: int, *, arguments: list[str], folder: str, largest_file_bytes: int = 0
) -> dict[str, Any]:
    """`apertus-nemo data ...`, run in `folder`: {"code", "output"} or {"code", "error"}."""
    from apertus_nemo.cli.data import main
    from apertus_nemo.errors import ApertusError

    os.chdir(folder)
    if largest_file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file_bytes, resource.RLIM_INFINITY))
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            code = main(arguments)
    except ApertusError as error:
        return {"code": error.exit_code, "error": str(error)}
    return {"code": code, "output": output.getvalue()}


def indexed(rank: int, world_size: int, *, corpus: str) -> dict[str, Any]:
    """What Megatron's own reader finds: the token ids of each document, and their dtype."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(Path(corpus) / "corpus"))
    return {
        "documents": [dataset[i].tolist() for i in range(len(dataset))],
        "document_indices": dataset.document_indices.tolist(),
        "dtype": str(dataset[0].dtype),
    }


def transformers_decode(rank: int, world_size: int, *, folder: str, ids: list[list[int]], text: str) -> dict[str, Any]:
    """What a user of transformers gets from the corpus' tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {
        "texts": [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
        "ids": tokenizer(text)["input_ids"],
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id],
    }


def samples(
    rank: int,
    world_size: int,
    *,
    corpus: str,
    cache: str,
    indices: list[int],
    changes: dict[str, Any],
    distributed: bool = False,
) -> dict[str, Any]:
    """Samples of our dataset."""
    from apertus_nemo.data.dataset import sample_digest, training_dataset

    if distributed:
        import torch

        store = f"file://{os.environ['RENDEZVOUS_FILE']}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    dataset = training_dataset(run_config(**changes), Path(corpus), cache=Path(cache))
    found = [dataset[index] for index in indices]
    again = [dataset[index] for index in indices]
    return {
        "length": len(dataset),
        "samples": [{key: value.tolist() for key, value in sample.items()} for sample in found],
        "kinds": {key: [str(value.dtype), list(value.shape)] for key, value in found[0].items()},
        "digests": [sample_digest(sample).hex() for sample in found],
        "again": [sample_digest(sample).hex() for sample in again],
    }


def megatron_samples(
    rank: int,
    world_size: int,
    *,
    corpus: str,
    cache: str,
    indices: list[int],
    changes: dict[str, Any],
    reset: bool = False,
) -> Any:
    """The same samples from Megatron's builder, called as Megatron's users call it.

    reset: with Megatron's position ids that begin anew in each document.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Tokenizer:
        eod = 2
        unique_identifiers = {"name": "test"}  # noqa: RUF012

    run = run_config(**changes)
    config = GPTDatasetConfig(
        random_seed=run.data.seed,
        sequence_length=run.data.seq_length,
        blend=([str(Path(corpus) / "corpus")], None),
        split="100,0,0",
        path_to_cache=cache,
        tokenizer=Tokenizer(),
        reset_position_ids=reset,
        reset_attention_mask=False,
        eod_mask_loss=run.data.eod_mask_loss,
        create_attention_mask=False,
    )
    sizes = [run.schedule.train_samples, 0, 0]
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[0]
    return [{key: value.tolist() for key, value in dataset[index].items()} for index in indices]


def refused(rank: int, world_size: int, *, corpus: str, cache: str, changes: dict[str, Any]) -> str:
    """The message of the InputError or UnfitEnvironment that opening the data ends with."""
    from apertus_nemo.data.dataset import training_dataset
    from apertus_nemo.errors import InputError, UnfitEnvironment

    try:
        training_dataset(run_config(**changes), Path(corpus), cache=Path(cache))
    except (InputError, UnfitEnvironment) as error:
        return str(error)
    return ""


def no_room(rank: int, world_size: int, *, cache: str) -> str:
    """The message of the UnfitEnvironment that the embedded corpus ends with."""
    from apertus_nemo.data.corpus import embedded
    from apertus_nemo.errors import UnfitEnvironment

    try:
        embedded(Path(cache), 512)
    except UnfitEnvironment as error:
        return str(error)
    return ""


def digests_of_documents(rank: int, world_size: int) -> list[str]:
    """Digests of one sample: causal, as one document, as two, and as two with the border one token on."""
    import torch

    from apertus_nemo.data.dataset import document_numbers, sample_digest

    tokens = torch.tensor([5, 6, 2, 1, 7, 8])
    sample = {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(6), "position_ids": torch.arange(6)}
    digests = [sample_digest(sample)]
    for eod in (9, 2, 1):
        digests.append(sample_digest({**sample, "documents": document_numbers(tokens, eod=eod)}))
    return [digest.hex() for digest in digests]


def loader(rank: int, world_size: int, *, corpus: str, cache: str, changes: dict[str, Any], first_step: int) -> Any:
    """Digests of the micro-batches that each replica gets, asking Megatron's groups who it is."""
    import torch
    from megatron.core import parallel_state

    from apertus_nemo.data.dataset import sample_digest
    from apertus_nemo.data.loader import training_loader

    store = f"file://{os.environ['RENDEZVOUS_FILE']}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    parallel_state.initialize_model_parallel()
    batches = training_loader(
        run_config(devices=world_size, **changes), Path(corpus), cache=Path(cache), first_step=first_step
    )
    rows = []
    for batch in batches:
        count = batch["tokens"].shape[0]
        rows.append([sample_digest({key: value[row] for key, value in batch.items()}).hex() for row in range(count)])
    return {"rows": rows, "length": len(batches)}


def upstream_order(rank: int, world_size: int, *, cases: list[dict[str, int]]) -> list[list[list[int]]]:
    """Micro-batches of NeMo's copy of MegatronPretrainingSampler."""
    from nemo.lightning.data import MegatronPretrainingSampler

    return [list(MegatronPretrainingSampler(**case)) for case in cases]


def embed(rank: int, world_size: int, *, cache: str, vocab_size: int) -> dict[str, Any]:
    """The embedded corpus, asked for by all ranks at once; then once more."""
    import time

    from apertus_nemo.data.corpus import embedded
    from apertus_nemo.data.manifest import digest, load

    folder = embedded(Path(cache), vocab_size)
    start = time.perf_counter()
    again = embedded(Path(cache), vocab_size)
    seconds = time.perf_counter() - start
    manifest = load(folder)
    return {
        "folder": str(folder),
        "same": again == folder,
        "seconds": seconds,
        "digest": digest(manifest),
        "tokens": manifest.tokens,
        "inputs": [[entry.name, entry.sha256] for entry in manifest.inputs],
    }


def staged_config(stages: list[dict[str, Any]], changes: dict[str, Any]) -> RunConfig:
    """`run_config` with data stages, as a recipe has them."""
    import dataclasses

    from apertus_nemo.recipe.schema import to_tree
    from apertus_nemo.recipe.typed import from_tree

    run = run_config(**changes)
    tree = to_tree(dataclasses.replace(run, data=dataclasses.replace(run.data, stages=())))
    tree["data"]["stages"] = stages
    return from_tree(tree)


def staged(
    rank: int, world_size: int, *, corpus: str, cache: str, stages: list[dict[str, Any]], changes: dict[str, Any]
) -> dict[str, Any]:
    """Every sample of a run with stages: where it comes from, its length, its digest; asked for from the last on."""
    from apertus_nemo.data.dataset import sample_digest, training_dataset

    dataset = training_dataset(staged_config(stages, changes), Path(corpus), cache=Path(cache))
    rows = []
    for index in reversed(range(len(dataset))):
        place, sample = dataset.place(index), dataset[index]
        tokens = sample["tokens"]
        row = [place.stage.name, place.source, place.position, list(tokens.shape), sample_digest(sample).hex()]
        rows.append([*row, _digest_of_tokens(tokens.tolist())])
    return {"rows": rows[::-1], "length": len(dataset)}


def _digest_of_tokens(tokens: list[int]) -> str:
    import hashlib

    return hashlib.sha256(" ".join(map(str, tokens)).encode()).hexdigest()


def blended(
    rank: int, world_size: int, *, corpora: list[str], cache: str, weights: list[float], seed: int, seq_length: int,
    samples: int, sizes: list[int],
) -> list[Any]:  # fmt: skip
    """The blend of Megatron's own BlendedDataset over its own GPTDatasets of the given sizes."""
    import numpy as np
    import torch
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        eod = 2
        unique_identifiers = {"name": "test"}  # noqa: RUF012

    store = f"file://{os.environ['RENDEZVOUS_FILE']}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    prefixes = [str(Path(corpus) / "corpus") for corpus in corpora]
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=(prefixes, weights),
        split="100,0,0",
        path_to_cache=cache,
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
    )
    parts = []
    for prefix, size in zip(prefixes, sizes, strict=True):
        low_level = GPTDataset.build_low_level_dataset(prefix, config)
        documents = np.arange(GPTDataset.numel_low_level_dataset(low_level), dtype=np.int32)
        parts.append(GPTDataset(low_level, prefix, documents, size, Split.train, config))
    whole = BlendedDataset(parts, weights, samples, config)
    rows = []
    for index in range(samples):
        sample = whole[index]
        number = int(whole.dataset_sample_index[index])
        rows.append([int(sample["dataset_id"]), number, _digest_of_tokens(sample["tokens"].tolist())])
    return rows


def chat_template(rank: int, world_size: int, *, folder: str, template: str, rows: list[Any], date: str) -> list[Any]:
    """Ids and assistant mask of each row of messages, as transformers renders and tokenizes a chat template."""
    import transformers

    auto: Any = transformers.AutoTokenizer
    tokenizer = auto.from_pretrained(folder)
    found = []
    for row in rows:
        given = tokenizer.apply_chat_template(
            row, chat_template=template, date=date, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        found.append({"ids": given["input_ids"], "mask": given["assistant_masks"]})
    return found


def chat_samples(rank: int, world_size: int, *, corpus: str, indices: list[int], changes: dict[str, Any]) -> Any:
    """Samples of conversations, which conversations they are, and how many samples an epoch has."""
    from apertus_nemo.data.dataset import sample_digest, training_dataset

    dataset: Any = training_dataset(run_config(**changes), Path(corpus), cache=Path("/nowhere"))
    found = [dataset[index] for index in indices]
    return {
        "rows": dataset.rows,
        "conversations": [dataset.conversations(index) for index in indices],
        "samples": [{key: value.tolist() for key, value in sample.items()} for sample in found],
        "digests": [sample_digest(sample).hex() for sample in found],
    }

"""A small run directory, made without training: for the tests of what reads one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from apertus_nemo.recipe.schema import (
    BatchRampStep,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    TrainerConfig,
)
from apertus_nemo.record.canonical import unknown
from apertus_nemo.record.files import write_atomic
from apertus_nemo.record.lock import PinnedData, RunLock, Surroundings, build_lock
from apertus_nemo.record.run_dir import RunDirectory
from apertus_nemo.record.state import KINDS, StateDigest, TensorDigest
from apertus_nemo.record.step_log import StepLogHeader, StepLogWriter, StepRecord

SOURCE = {"archive_sha256": "a" * 64, "files_digest": "0" * 64, "package_version": "0.1.0"}
SOURCE |= {"commit": "c" * 40, "dirty": False, "patch": None, "tree": "7" * 40}
SURROUNDINGS = Surroundings(
    packages={"torch": {"sha256": "2" * 64, "version": "2.13.0+cpu"}},
    python={"build": "3.11.2 (main) [GCC]", "implementation": "CPython", "libc": "glibc 2.36", "version": "3.11.2"},
    machine={
        "architecture": "x86_64",
        "cpu_features": ["avx", "avx2", "fma"],
        "cpu_model": "An Example",
        "driver": unknown("an example"),
        "gpu": unknown("an example"),
    },
    source=SOURCE,
)
DATA = PinnedData(
    "d" * 64,
    {"corpus.bin": "b" * 64, "corpus.idx": "1" * 64, "tokenizer/tokenizer.json": "3" * 64},
    {"bos_id": 1, "eos_id": 2, "kind": "trained", "pad_id": 3, "unk_id": 0, "vocab_size": 64},
)


def config(**trainer: Any) -> RunConfig:
    """20 steps of 8 samples, then 5 of 16."""
    return RunConfig(
        name="tiny_pretrain",
        model=ModelConfig(
            num_layers=11,
            hidden_size=8,
            ffn_hidden_size=16,
            num_attention_heads=4,
            num_query_groups=2,
            head_dim=2,
            vocab_size=64,
        ),
        data=DataConfig(seq_length=32),
        optim=OptimConfig(lr=1e-3, min_lr=1e-4),
        schedule=ScheduleConfig(train_samples=240, batch_ramp=(BatchRampStep(160, 16),)),
        parallel=ParallelConfig(tensor_model_parallel_size=2),
        trainer=replace(TrainerConfig(global_batch_size=8, micro_batch_size=2, devices=4), **trainer),
    )


def lock(**trainer: Any) -> RunLock:
    """Of `config`, with software that does not depend on where the tests run."""
    return build_lock(
        config(**trainer),
        overrides=["trainer.devices=4"],
        environment={"OMP_NUM_THREADS": "1", "MKL_CBWR": "AVX2", "HOME": "/root", "AWS_SECRET_ACCESS_KEY": "x"},
        data=DATA,
        surroundings=SURROUNDINGS,
    )


def step(number: int) -> StepRecord:
    """A record of a step, a function of its number."""
    return StepRecord(
        step=number,
        consumed_samples=8 * number,
        consumed_tokens=256 * number,
        loss=5.0 / number,
        grad_norm=1.0 / 3 / number,
        learning_rate=1e-3,
        global_batch_size=8,
        batch_digest=hashlib.sha256(str(number).encode()).hexdigest(),
    )


def state(number: int) -> StateDigest:
    """Three tensors of eleven layers in each kind, a function of the step's number."""
    return StateDigest.of(
        number,
        [
            TensorDigest(
                f"model.layers.{layer}.mlp.{name}", kind, "float32", (16, 8), (layer, number, index, 2**64 - 1)
            )
            for layer in range(11)
            for index, name in enumerate(("act_fn.alpha_p", "down_proj.weight", "up_proj.weight"))
            for kind in KINDS
            if kind != "master"
        ],
    )


def make(
    path: Path,
    *,
    steps: int = 20,
    states: Iterable[int] = (0, 10, 20),
    change: Callable[[StepRecord], StepRecord] = lambda record: record,
    change_state: Callable[[StateDigest], StateDigest] = lambda state: state,
    run_id: str = "1" * 32,
    first: int = 0,
    observation: Any = None,
    **trainer: Any,
) -> RunDirectory:
    """A run directory with a log of steps `first` to `steps`, and states where they are asked for."""
    pinned = lock(**trainer)
    run = RunDirectory.create(path, lock=pinned, recipe_yaml="name: tiny_pretrain\n")
    header = StepLogHeader(pinned.digest, run_id, observation or unknown("not taken in this version"))
    with StepLogWriter.open(run.steps, header) as log:
        for number in range(first, steps + 1):
            record = change(StepRecord(step=0) if number == 0 else step(number))
            if number in states:
                found = change_state(state(number))
                write_atomic(run.state(number), found.to_bytes())
                record = replace(record, state_digest=found.digest)
            log.append(record)
    return run

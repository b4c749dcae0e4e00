"""Ranks that train a small Apertus with gradients made from (tensor name, step): no forward pass, so no rounding.

An element's gradient is then the same at every sharding, and so must its new bits be. Results are given by published
tensor, put together from all ranks' shards, each element covered.
"""

from __future__ import annotations

import hashlib
import os
import types
from pathlib import Path
from typing import Any

import numpy as np

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

MARK = 12345.5


def small_run(
    world: int,
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    precision: str = "fp32",
    clip_grad: float = 0.1,
) -> RunConfig:
    """Four layers; the batch doubles after two steps, and the rate decays over the last 28 samples of 56."""
    return RunConfig(
        name="small",
        model=ModelConfig(
            num_layers=4,
            hidden_size=32,
            ffn_hidden_size=64,
            num_attention_heads=4,
            num_query_groups=2,
            head_dim=8,
            vocab_size=64,
        ),
        data=DataConfig(seq_length=16),
        optim=OptimConfig(
            lr=1e-2, min_lr=1e-3, clip_grad=clip_grad, alpha_warmup_steps=10, beta3_warmup_steps=10, weight_decay=0.1
        ),
        schedule=ScheduleConfig(
            train_samples=56, warmup_samples=8, decay_samples=28, batch_ramp=(BatchRampStep(8, 8),)
        ),
        parallel=ParallelConfig(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
        ),
        trainer=TrainerConfig(global_batch_size=4, micro_batch_size=1, devices=world, precision=precision),
    )


def gradient(name: str, shape: tuple[int, ...], step: int) -> Any:
    """The made gradient of a whole published tensor, float32, as a matrix. Values of many magnitudes."""
    seed = hashlib.sha256(f"{name} {step}".encode()).digest()
    generator = np.random.default_rng(list(seed))
    size = (1, shape[0]) if len(shape) == 1 else shape
    return (generator.standard_normal(size) * 10.0 ** generator.uniform(-6, 0, size)).astype(np.float32)


class Trainee:
    """A model, its DDP wrapper and its optimizer on this rank."""

    def __init__(self, rank: int, run: RunConfig) -> None:
        import torch
        from megatron.core import parallel_state
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        from apertus_nemo.model.config import build_model
        from apertus_nemo.optim.module import ApertusOptimizerModule
        from apertus_nemo.training.device import alias_cuda

        alias_cuda()
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                "gloo",
                init_method=f"file://{os.environ['RENDEZVOUS_FILE']}",
                rank=rank,
                world_size=run.world_size,
            )
            parallel_state.initialize_model_parallel(
                run.parallel.tensor_model_parallel_size,
                run.parallel.pipeline_model_parallel_size,
                run.parallel.virtual_pipeline_model_parallel_size,
                create_gloo_process_groups=False,
            )
        self.run, self.step = run, 0
        self.chunks = []
        for stage in range(run.parallel.virtual_pipeline_model_parallel_size or 1):
            model = build_model(run, vp_stage=stage)
            ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
            self.chunks.append(DistributedDataParallel(model.config, ddp, model))
        # NeMo's MegatronParallel is a list of modules that hold the wrapped chunks
        parallel = [types.SimpleNamespace(module=chunk) for chunk in self.chunks]
        (self.optimizer,) = ApertusOptimizerModule(run).optimizers(parallel)

    def parameters(self) -> list[tuple[Any, Any]]:
        """(pieces, parameter) of every parameter here."""
        return [
            (self.pieces(index, name), parameter)
            for index, chunk in enumerate(self.chunks)
            for name, parameter in chunk.module.named_parameters()
        ]

    def pieces(self, chunk: int, name: str) -> Any:
        from megatron.core import parallel_state

        from apertus_nemo.model.config import layer_offset
        from apertus_nemo.model.layout import pieces

        return pieces(
            name,
            self.run.model,
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            tp_size=parallel_state.get_tensor_model_parallel_world_size(),
            layer_offset=layer_offset(self.chunks[chunk].module),
        )

    def train(self, steps: int) -> list[tuple[float, float]]:
        """(gradient norm, learning rate) of each step."""
        import torch

        from apertus_nemo.optim.module import apply_schedule
        from apertus_nemo.recipe.batches import BatchPlan

        plan = BatchPlan.from_config(self.run)
        log = []
        for _ in range(steps):
            self.step += 1
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            for its_pieces, parameter in self.parameters():
                local = parameter.main_grad.view(1, -1) if parameter.dim() == 1 else parameter.main_grad
                for piece in its_pieces:
                    whole = torch.from_numpy(gradient(piece.name, piece.shape, self.step))
                    local[slice(*piece.local_rows), slice(*piece.local_cols)] = whole[
                        slice(*piece.rows), slice(*piece.cols)
                    ]
            for chunk in self.chunks:
                chunk.finish_grad_sync()
            apply_schedule(self.optimizer, self.run, self.step, plan.consumed_samples(self.step - 1))
            _, norm, _ = self.optimizer.step()
            log.append((norm, self.optimizer.param_groups[0]["lr"]))
        return log

    def tensors(self) -> dict[str, Any]:
        """{"state published.name": whole tensor as a matrix} on every rank; fails where an element is missing."""
        import torch

        from apertus_nemo.optim.module import logical_states

        rows = []
        for chunk, name, state, shard, (start, stop) in logical_states(self.optimizer):
            assert shard.shape == (stop - start,)
            rows.append((self.pieces(chunk, name), state, start, stop, shard.numpy().copy()))
        for its_pieces, parameter in self.parameters():
            flat = parameter.detach().float().view(-1).numpy().copy()
            rows.append((its_pieces, "weight", 0, flat.size, flat))
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, rows)
        locals_: dict[Any, tuple[Any, Any]] = {}
        for rank_rows in gathered:
            for its_pieces, state, start, stop, values in rank_rows:
                size = max(p.local_rows[1] for p in its_pieces) * max(p.local_cols[1] for p in its_pieces)
                flat, seen = locals_.setdefault((its_pieces, state), (np.empty(size, np.float32), np.zeros(size, bool)))
                if state != "weight":
                    # a data-parallel shard belongs to one rank; copies of a vector on other ranks have the same bits
                    assert (flat[start:stop] == values)[seen[start:stop]].all()
                flat[start:stop], seen[start:stop] = values, True
        whole: dict[str, Any] = {}
        covered: dict[str, Any] = {}
        for (its_pieces, state), (flat, seen) in locals_.items():
            assert seen.all(), (its_pieces[0].name, state)
            matrix = flat.reshape(-1, max(p.local_cols[1] for p in its_pieces))
            for p in its_pieces:
                shape = (1, p.shape[0]) if len(p.shape) == 1 else p.shape
                key = f"{state} {p.name}"
                target = whole.setdefault(key, np.empty(shape, np.float32))
                target[slice(*p.rows), slice(*p.cols)] = matrix[slice(*p.local_rows), slice(*p.local_cols)]
                covered.setdefault(key, np.zeros(shape, bool))[slice(*p.rows), slice(*p.cols)] = True
        for key, mask in covered.items():
            assert mask.all(), key
        return whole

    def digests(self) -> dict[str, str]:
        return {key: hashlib.sha256(value.tobytes()).hexdigest() for key, value in sorted(self.tensors().items())}

    def sharded(self, is_loading: bool, layout: str | None = None) -> dict[str, Any]:
        model = {}
        for index, chunk in enumerate(self.chunks):
            tensors = chunk.module.sharded_state_dict()
            model[f"model_{index}"] = {k: v for k, v in tensors.items() if not k.endswith("_extra_state")}
        metadata = {"distrib_optim_sharding_type": layout} if layout else None
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        return {"model": model, "optimizer": optimizer}

    def save(self, directory: str, layout: str | None = None, state: dict[str, Any] | None = None) -> None:
        import torch
        from megatron.core import dist_checkpointing

        if torch.distributed.get_rank() == 0:
            Path(directory).mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        dist_checkpointing.save(state or self.sharded(False, layout), directory)

    def load(self, directory: str, layout: str | None = None, strict: str = "raise_all") -> None:
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.validation import StrictHandling

        loaded = dist_checkpointing.load(self.sharded(True, layout), directory, strict=StrictHandling(strict))
        for index, chunk in enumerate(self.chunks):
            chunk.module.load_state_dict(loaded["model"][f"model_{index}"], strict=False)
        self.optimizer.load_state_dict(loaded["optimizer"])
        self.step = self.optimizer.param_groups[0]["step"]

    def mark(self) -> None:
        """Overwrite every weight, main parameter and state, so that what is not loaded shows."""
        import torch

        from apertus_nemo.optim.module import logical_states

        with torch.no_grad():
            for _, parameter in self.parameters():
                parameter.fill_(MARK)
            for *_, shard, _span in logical_states(self.optimizer):
                shard.fill_(MARK)


def train(
    rank: int,
    world_size: int,
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    precision: str = "fp32",
    clip_grad: float = 0.1,
    before: int = 3,
    after: int = 0,
    load: str | None = None,
    save: str | None = None,
    layout: str | None = None,
    values: list[str] | None = None,
) -> dict[str, Any] | None:
    """Train `before` steps (or load into a marked optimizer instead), save, train `after` more."""
    trainee = Trainee(rank, small_run(world_size, tp, pp, vpp, precision, clip_grad))
    log: list[tuple[float, float]] = []
    if load is not None:
        trainee.mark()
        trainee.load(load, layout)
        marked = [key for key, value in trainee.tensors().items() if (value == np.float32(MARK)).any()]
        assert not marked, marked
    else:
        log += trainee.train(before)
    middle = trainee.digests()
    if save is not None:
        trainee.save(save, layout)
    log += trainee.train(after)
    end = trainee.digests()
    wanted = {key: value.tolist() for key, value in trainee.tensors().items() if key in (values or [])}
    steps = trainee.optimizer.param_groups[0]["step"]
    return {"middle": middle, "end": end, "log": log, "values": wanted, "step": steps} if rank == 0 else None


def incomplete(rank: int, world_size: int, directory: str) -> list[str]:
    """What happens at loading when the checkpoint lacks one state of one parameter, strictly and as NeMo by default."""
    trainee = Trainee(rank, small_run(world_size))
    trainee.train(1)
    state = trainee.sharded(False)
    for tensors in state["optimizer"]["param_state"].values():
        del tensors["exp_avg_slow"]
    trainee.save(directory, state=state)
    errors = []
    for strict in ("raise_all", "assume_ok_unexpected", "log_all"):
        try:
            trainee.load(directory, strict=strict)
            errors.append("no error")
        except Exception as error:
            errors.append(f"{type(error).__name__}: {str(error)[:300]}")
    return errors


def refusals(rank: int, world_size: int) -> dict[str, str]:
    """Messages of everything that the optimizer refuses."""
    import dataclasses

    import megatron.core

    from apertus_nemo.errors import ApertusError
    from apertus_nemo.optim.module import apply_schedule, build_optimizer, optimizer_config

    run = small_run(world_size, tp=world_size)
    trainee = Trainee(rank, run)
    said = {}

    def attempt(name: str, function: Any) -> None:
        try:
            function()
            said[name] = "no error"
        except ApertusError as error:
            said[name] = f"{type(error).__name__}: {error}"

    attempt("layout", lambda: trainee.sharded(False, "fully_reshardable"))
    attempt("parameter state", lambda: trainee.optimizer.save_parameter_state("unused"))
    attempt("step", lambda: apply_schedule(trainee.optimizer, run, 2, 4))
    attempt("samples", lambda: apply_schedule(trainee.optimizer, run, 1, 4))
    parallel = dataclasses.replace(run.parallel, distributed_optimizer=False)
    attempt("not distributed", lambda: optimizer_config(dataclasses.replace(run, parallel=parallel)))
    adam = dataclasses.replace(run.optim, name="adam")
    attempt("name", lambda: optimizer_config(dataclasses.replace(run, optim=adam)))
    attempt("fp16", lambda: build_optimizer(trainee.chunks, run, dataclasses.replace(optimizer_config(run), fp16=True)))
    version, megatron.core.__version__ = megatron.core.__version__, "0.16.0"
    attempt("version", lambda: build_optimizer(trainee.chunks, run))
    megatron.core.__version__ = version
    trainee.chunks[0].module.output_layer.weight.tensor_model_parallel = False
    attempt("mark", lambda: build_optimizer(trainee.chunks, run))
    return said


def replaced_lines(rank: int, world_size: int) -> dict[str, list[int]]:
    """First and last line of each upstream method that distributed.py says it replaces."""
    import inspect

    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    from apertus_nemo.optim.distributed import ApertusDistributedOptimizer

    lines = {}
    for name, value in vars(ApertusDistributedOptimizer).items():
        for upstream in (DistributedOptimizer, MegatronOptimizer):
            if callable(value) and name in vars(upstream) and name != "__init__" and name not in lines:
                source, first = inspect.getsourcelines(vars(upstream)[name])
                lines[name] = [first, first + len(source) - 1]
    return lines


def settings_of_groups(rank: int, world_size: int) -> dict[str, float]:
    """Weight decay of each parameter, by its published name."""
    from apertus_nemo.optim.module import distributed_optimizer

    trainee = Trainee(rank, small_run(world_size))
    inner = distributed_optimizer(trainee.optimizer)
    decay = {}
    for its_pieces, parameter in trainee.parameters():
        group, _ = inner.model_param_group_index_map[parameter]
        for piece in its_pieces:
            decay[piece.name] = inner.param_groups[group]["weight_decay"]
    return decay

"""A dry build: the real Megatron model of any rank, as shapes, on one CPU.

    built = build_rank(run, 4095)
    built.parameters          # counted in Megatron's own modules
    built.layer_bytes         # what autograd keeps of one layer, traced forward and backward

Process groups of the full size are made on torch's fake back end, which sends nothing; the model is built on the meta
device, which holds nothing. One rank at a time in a process. Transformer Engine's layers need a GPU: in their place
stand plain Megatron's, with the same parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from apertus_nemo.model.attention import CoreAttention
from apertus_nemo.model.config import build_model, transformer_config_kwargs
from apertus_nemo.plan.memory import element_bytes, layer_bytes_per_token
from apertus_nemo.plan.ranks import place, rank_parameters
from apertus_nemo.recipe.schema import RunConfig
from apertus_nemo.recipe.stages import StagePlan
from apertus_nemo.training.device import alias_cuda, restore, shapes_only


@dataclass(frozen=True)
class BuiltRank:
    """What was found in Megatron's modules of one rank."""

    rank: int
    parameters: int
    chunks: tuple[int, ...]  # parameters of each model chunk, in the order of the virtual stages
    layer_bytes: int  # kept of one layer and one micro-batch for the backward pass


def build_rank(run: RunConfig, rank: int) -> BuiltRank:
    """Build every model chunk of a rank on the meta device, and trace the first layer of the first one."""
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, layer_spec="local"))
    run = _on_cpu(run)
    with aliased(), _parallel_state(run, rank):
        config = TransformerConfig(**transformer_config_kwargs(run))
        virtual = run.parallel.virtual_pipeline_model_parallel_size
        with torch.device("meta"):
            chunks = [
                build_model(run, config=config, vp_stage=None if virtual is None else stage)
                for stage in range(virtual or 1)
            ]
            counts = tuple(sum(p.numel() for p in chunk.parameters()) for chunk in chunks)
            layer_bytes = _trace(run, chunks[0])
    return BuiltRank(rank, sum(counts), counts, layer_bytes)


def compare(run: RunConfig, rank: int) -> dict[str, Any]:
    """What was built of a rank beside what the plan counts of it."""
    built = build_rank(run, rank)
    length = StagePlan.from_config(run).max_seq_length
    tokens = run.trainer.micro_batch_size * length // run.parallel.context_parallel_size
    parameters, layer_bytes = rank_parameters(run, rank).total, layer_bytes_per_token(run) * tokens
    return {
        "rank": rank,
        "stage": place(run, rank).pp,
        "parameters": built.parameters,
        "planned_parameters": parameters,
        "chunks": list(built.chunks),
        "layer_bytes": built.layer_bytes,
        "planned_layer_bytes": layer_bytes,
        "agrees": (built.parameters, built.layer_bytes) == (parameters, layer_bytes),
    }


def _on_cpu(run: RunConfig) -> RunConfig:
    """The same cuts and sizes, for a process without a GPU."""
    trainer = dataclasses.replace(run.trainer, accelerator="cpu")
    return dataclasses.replace(run, trainer=trainer)


@contextmanager
def aliased() -> Iterator[None]:
    """Where there is no CUDA, Megatron's device "cuda" is the CPU."""
    if torch.cuda.is_available():
        yield
        return
    alias_cuda()
    try:
        yield
    finally:
        restore()


@contextmanager
def _parallel_state(run: RunConfig, rank: int) -> Iterator[None]:
    """Megatron's process groups as rank `rank` of all sees them."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=run.world_size)
    try:
        p = run.parallel
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=p.tensor_model_parallel_size,
            pipeline_model_parallel_size=p.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=p.virtual_pipeline_model_parallel_size,
            context_parallel_size=p.context_parallel_size,
            create_gloo_process_groups=False,
        )
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
    finally:
        torch.distributed.destroy_process_group()


def _trace(run: RunConfig, chunk: Any) -> int:
    """Bytes of all tensors that autograd keeps of the first layer, forward and backward, in shapes."""
    model, p, width = run.model, run.parallel, element_bytes(run)
    positions = StagePlan.from_config(run).max_seq_length // p.context_parallel_size
    length = positions // (p.tensor_model_parallel_size if p.sequence_parallel else 1)
    batch, meta = run.trainer.micro_batch_size, torch.device("meta")
    dtype = torch.bfloat16 if run.trainer.precision == "bf16" else torch.float32
    hidden = torch.empty(length, batch, model.hidden_size, dtype=dtype, device=meta, requires_grad=True)
    rotary = torch.empty(positions, 1, 1, model.head_dim, dtype=torch.float32, device=meta)
    kept = _Kept({parameter.untyped_storage()._cdata for parameter in chunk.parameters()}, tables=rotary.shape)
    with shapes_only(), kept.watching():
        output, _ = chunk.decoder.layers[0](hidden, attention_mask=None, rotary_pos_emb=rotary)
        output.sum().backward()
    heads, groups = model.num_attention_heads, model.num_query_groups
    attention = (heads + groups) * model.head_dim * width + 4 * heads  # queries and keys after RoPE, sums of rows
    return kept.bytes + batch * positions * attention // p.tensor_model_parallel_size


class _Kept:
    """Counts what autograd keeps, each storage once: no parameters, no tables of RoPE, nothing of the attention.

    Plain Megatron makes the tables anew in each layer, Transformer Engine's kernel does not.
    What the attention keeps depends on its kernel, and the kernel of a GPU cannot run here.
    """

    def __init__(self, parameters: set[int], *, tables: torch.Size) -> None:
        self._parameters, self._tables = parameters, tables
        self._storages: dict[int, Any] = {}  # held, so that no other takes its place
        self._attending = False

    @property
    def bytes(self) -> int:
        """Of all that was kept."""
        return sum(storage.nbytes() for storage in self._storages.values())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what is kept within."""
        original = CoreAttention.forward

        def forward(*arguments: Any, **more: Any) -> Any:
            self._attending = True
            try:
                return original(*arguments, **more)
            finally:
                self._attending = False

        CoreAttention.forward = forward  # type: ignore[method-assign]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
                yield
        finally:
            CoreAttention.forward = original  # type: ignore[method-assign]

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        known = storage._cdata in self._parameters or tensor.shape == self._tables
        if not (self._attending or known):
            self._storages[storage._cdata] = storage
        return tensor

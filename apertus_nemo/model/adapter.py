"""LoRA on a Megatron model, by NeMo's PEFT: adapters beside frozen linear layers, with their initial values.

    attach(chunk, run)                # a GPTModel that has its weights already; afterwards adapters alone are trained

Differences from upstream (nemo-toolkit 2.7.3, `nemo/collections/llm/peft/lora.py` and `utils.py`):

- `LoRA.transform` asks for `te.Linear`, which there is not without Transformer Engine (l.703); Apertus has parallel
  layers alone, and for these ours does the same;
- `get_adapter_attributes_from_linear` (utils.py l.77) takes Transformer Engine for installed where Megatron's own
  module of that name is, and fails: Megatron's plain layers are asked here;
- `ParallelLinearAdapter.sharded_state_dict` takes the MLP's first layer for a gated one and cuts its B in two halves
  (l.430): Apertus' MLP is not gated, and its checkpoint would not reshard;
- initial values are ours, the same bits at every layout (`initialise_adapters`): A as PEFT draws it, uniform within
  1 / sqrt(in) (`kaiming_uniform_` with a = sqrt(5)); B is zero, so that training starts from the frozen model;
- adapters are there when the model is built, not from the first epoch on: optimizer and checkpoints see no other model.

Importing NeMo's PEFT imports all of `nemo.collections.llm`; only runs with adapters do.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from nemo.collections.llm import fn
from nemo.collections.llm.peft.lora import LoRA, LoRALinear
from nemo.collections.llm.peft.utils import (
    ParallelLinearAdapter,
    get_adapter_attributes_from_linear,
    is_expert_linear,
)

from apertus_nemo.errors import ApertusError
from apertus_nemo.model.adapter_layout import adapter_partition_dim, is_adapter_parameter
from apertus_nemo.model.config import layer_offset
from apertus_nemo.model.init import initialise_adapters
from apertus_nemo.recipe.schema import AdapterConfig, RunConfig


class Adapter(ParallelLinearAdapter):  # type: ignore[misc]
    """A and B of one linear layer, cut as NeMo cuts them; checkpoints hold each as one matrix."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Of both matrices; Apertus' MLP has no gate, so none is two in one."""
        found: dict[str, Any] = self.linear_in.sharded_state_dict(f"{prefix}linear_in.", sharded_offsets, metadata)
        return {**found, **self.linear_out.sharded_state_dict(f"{prefix}linear_out.", sharded_offsets, metadata)}


class ApertusLoRA(LoRA):  # type: ignore[misc]
    """NeMo's LoRA for the layers that Apertus has."""

    def transform(self, m: torch.nn.Module, name: str | None = None, prefix: str | None = None) -> torch.nn.Module:
        """The layer with its adapter where it is a target, else the layer."""
        found = self.match(m, name, prefix)
        if found is None:
            return m
        input_is_parallel, width, height, no_sequence_parallel, is_parallel = _attributes(m)
        adapter = Adapter(
            width,
            height,
            self.dim,
            base_linear_name=found[1],
            activation="identity",
            column_init_method=self.lora_A_init_method,
            row_init_method=self.lora_B_init_method,
            input_is_parallel=input_is_parallel,
            dropout=self.dropout,
            dropout_position=self.dropout_position,
            model_parallel_config=m.config,
            alpha=self.alpha,
            is_expert=is_expert_linear(found[1]),
            disable_sequence_parallel_comm=no_sequence_parallel,
            base_linear_is_parallel=is_parallel,
        )
        return LoRALinear(m, adapter)  # type: ignore[no-any-return]


def _attributes(layer: Any) -> tuple[bool, int, int, bool, bool]:
    """Whether the input is cut, width and height of the weight, no exchange of sequence parallelism, a cut weight."""
    if isinstance(layer, (ColumnParallelLinear, RowParallelLinear)):
        no_exchange = not layer.config.sequence_parallel
        return isinstance(layer, RowParallelLinear), layer.input_size, layer.output_size, no_exchange, True
    found: tuple[bool, int, int, bool, bool] = get_adapter_attributes_from_linear(layer)
    return found


def peft(adapter: AdapterConfig) -> ApertusLoRA:
    """NeMo's object for what a recipe says."""
    return ApertusLoRA(
        target_modules=list(adapter.targets), dim=adapter.rank, alpha=adapter.alpha, dropout=adapter.dropout
    )


def attach(chunk: GPTModel, run: RunConfig) -> None:
    """Freeze every parameter of a model chunk (not wrapped), and put adapters with initial values beside its layers."""
    chunk.requires_grad_(False)
    fn.walk(chunk, peft(run.adapter).transform)
    count = 0
    for name, parameter in chunk.named_parameters():
        if is_adapter_parameter(name):
            count += 1
            parameter.tensor_model_parallel = True  # the gradient norm counts every rank's part
            parameter.partition_dim = adapter_partition_dim(name)
            parameter.partition_stride = 1
    if count != 2 * len(run.adapter.targets) * len(chunk.decoder.layers):
        raise ApertusError(f"{count} matrices of adapters in {len(chunk.decoder.layers)} layers")
    initialise_adapters(
        chunk,
        run,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        layer_offset=layer_offset(chunk),
    )
    if run.parallel.recompute == "full" and chunk.pre_process:
        # A layer that is computed again is differentiated where its input asks for it; a frozen embedding does not.
        chunk.embedding.register_forward_hook(lambda module, arguments, output: output.requires_grad_(True))

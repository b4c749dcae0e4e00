"""Megatron's distributed optimizer, made to shard and to checkpoint AdEMAMix.

megatron-core 0.15.3 knows one optimizer with two states. Given a third, it drops it without a word. This file holds
every method that we replace, and nothing else; line numbers are those of 0.15.3's `optimizer/distrib_optimizer.py`:

    state_dict                         l.624-684    reads `step` beside each parameter's state without TE or Apex
    load_state_dict                    l.686-869    allocates two states; takes hyperparameters from a checkpoint
    _set_main_param_and_optimizer_states  l.899-928 copies the states that there are, not those that there must be
    get_parameter_state_dp_zero        l.965-1112   holds two states (l.1023, 1045); refused
    sharded_state_dict                 l.1161-1276  offers layouts that hold two states; those are refused
    load_parameter_state_from_dp_zero  l.1942-2044  holds two states (l.1983); refused
    load_parameter_state_from_fully_reshardable  l.2046-2095  its saving side is get_parameter_state_dp_zero; refused

and of `optimizer/optimizer.py`:

    get_grad_norm                      l.191-198    sums squares in float32: wrong by 4e-4 at 10 million elements
    clip_grad_norm                     l.200-218    the same

Everything else is upstream's: which rank owns what, reduce-scatter and all-gather, main parameters in float32 for a
bfloat16 model. The states are made with the optimizer, so that no code path ever meets a parameter without them.

Another version of megatron-core is refused (UnfitEnvironment).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import megatron.core
import torch
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys

from apertus_nemo.errors import ApertusError, InputError, UnfitEnvironment
from apertus_nemo.optim.ademamix import STATES, AdEMAMix

MEGATRON_VERSION = "0.15.3"

# The layout that changes of TP, PP and DP survive, and the one that changes of DP survive.
CHECKPOINT_LAYOUTS = ("fully_sharded_model_space", "dp_reshardable")

_CPU_NORM_PIECE = 32_768  # elements squared at a time: their doubles stay in the cache
_DEVICE_NORM_PIECE = 16 * 1024 * 1024  # elements; bounds the doubles to 128 MiB


class ApertusDistributedOptimizer(DistributedOptimizer):  # type: ignore[misc]
    """Owns 1/DP of every parameter's float32 values and of AdEMAMix's three states."""

    def __init__(self, optimizer: AdEMAMix, config: Any, model_chunks: list[Any], **groups: Any) -> None:
        """`config`: OptimizerConfig; `groups`: buffers and process groups, as upstream takes them (l.455).

        Raises UnfitEnvironment for another megatron-core, InputError for settings that it cannot honour.
        """
        require_megatron()
        if config.fp16 or config.loss_scale or config.use_precision_aware_optimizer or config.optimizer_cpu_offload:
            raise InputError(
                "AdEMAMix runs with float32 states: no fp16, loss scale, precision-aware or offloaded optimizer"
            )
        _check_parameters(model_chunks)
        super().__init__(optimizer, config, None, AdEMAMix.allocate_states, model_chunks, **groups)
        if self.ddp_config.use_megatron_fsdp or self.ddp_config.num_distributed_optimizer_instances != 1:
            raise InputError("AdEMAMix runs on Megatron's plain distributed optimizer: no FSDP, one instance")
        self.optimizer.allocate_states()

    # ---- what a checkpoint holds -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The part that is the same on every rank: the step of each parameter group, with what identifies the group."""
        groups = [{**_identity(group), "step": int(group["step"])} for group in self.optimizer.param_groups]
        return {"optimizer": {"param_groups": groups}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step and, where the state dict holds them, main parameters and all three states.

        Only these come from a checkpoint; learning rate, betas and decay are the recipe's. Raises InputError where
        groups or states are missing.
        """
        saved = {tuple(_identity(group).items()): group for group in state_dict["optimizer"]["param_groups"]}
        for group in self.optimizer.param_groups:
            identity = tuple(_identity(group).items())
            if identity not in saved or "step" not in saved[identity]:
                raise InputError(f"the checkpoint holds no optimizer step for the parameter group {dict(identity)}")
            group["step"] = int(saved[identity]["step"])
        if "param_state" not in state_dict:
            return
        layout = _checked_layout(state_dict.get("param_state_sharding_type"))
        if layout == "dp_reshardable":
            self.load_parameter_state_from_dp_reshardable(state_dict["param_state"])
        else:
            self.load_parameter_state_from_fs_model_space(state_dict["param_state"])

    def _set_main_param_and_optimizer_states(self, model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        """Copy the main parameter and all three states of one shard; anything less raises InputError."""
        main = self._main_param(model_param)
        targets = {"param": main, **self.optimizer.state[main]}
        found = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
        if found.keys() != targets.keys() or targets.keys() != {"param", *STATES}:
            raise InputError(
                f"the checkpoint holds {sorted(found)} of parameter {_parameter_name(self.model_chunks, model_param)}, "
                f"and the optimizer needs {sorted(['param', *STATES])}"
            )
        for name, target in targets.items():
            if found[name].shape != target.shape or found[name].dtype != target.dtype:
                whose = _parameter_name(self.model_chunks, model_param)
                raise InputError(f"{name} of {whose} has another shape or type in the checkpoint")
            with torch.no_grad():
                target.copy_(found[name])

    def sharded_state_dict(
        self,
        model_sharded_state_dict: dict[str, Any],
        is_loading: bool = False,
        sharding_type: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Upstream's, limited to the layouts that hold three states; see CHECKPOINT_LAYOUTS."""
        wanted = sharding_type or (metadata or {}).get("distrib_optim_sharding_type", CHECKPOINT_LAYOUTS[0])
        metadata = {**(metadata or {}), "distrib_optim_sharding_type": _checked_layout(wanted)}
        result: dict[str, Any] = super().sharded_state_dict(model_sharded_state_dict, is_loading, metadata=metadata)
        return result

    def get_parameter_state_dp_zero(self, *_: Any, **__: Any) -> Any:
        """Refused: upstream's gathers two states (l.1023, 1045)."""
        raise InputError(_checked_layout("dp_zero_gather_scatter"))

    load_parameter_state_from_dp_zero = get_parameter_state_dp_zero
    load_parameter_state_from_fully_reshardable = get_parameter_state_dp_zero

    # ---- gradient norm ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def get_grad_norm(self) -> float:
        """Global norm of the gradient, each element counted once, summed in float64.

        Elements are counted by their owner in the data-parallel group and, where tensor-parallel ranks hold copies,
        by tensor-parallel rank 0 (`get_main_grads_for_grad_norm`, optimizer.py l.135). Collective over all ranks.
        """
        total = torch.zeros(1, dtype=torch.float64, device=torch.cuda.current_device())
        for gradient in self.get_main_grads_for_grad_norm():
            size = _CPU_NORM_PIECE if gradient.device.type == "cpu" else _DEVICE_NORM_PIECE
            for piece in gradient.view(-1).split(size):
                total += piece.double().square_().sum()
        torch.distributed.all_reduce(total, group=self.get_grad_stats_parallel_group())
        return float(total.item() ** 0.5)

    @torch.no_grad()
    def clip_grad_norm(self, clip_grad: float) -> float:
        """Scale gradients to a norm of at most `clip_grad`; returns the norm before."""
        from megatron.core.optimizer.optimizer import clip_grad_by_total_norm_fp32

        norm = self.get_grad_norm()
        if parameters := self.get_parameters():
            clip_grad_by_total_norm_fp32(parameters, clip_grad, norm)
        return norm

    # ---- by name ---------------------------------------------------------------------------------------------------

    def _main_param(self, model_param: torch.nn.Parameter) -> torch.Tensor:
        """This rank's shard of the float32 values of a parameter."""
        group, order = self.model_param_group_index_map[model_param]
        shard: torch.Tensor = self.optimizer.param_groups[group]["params"][order]
        return shard

    def logical_states(self) -> Iterator[tuple[int, str, str, torch.Tensor, tuple[int, int]]]:
        """(model chunk, parameter name in the GPTModel, state name, 1-D shard, [start, stop) in the flat parameter).

        For every shard that this rank owns, in the order of the model's parameters. State names: "master" (float32
        main parameter, only of a bfloat16 model), "exp_avg_fast", "exp_avg_slow", "exp_avg_sq". Copies that several
        tensor-parallel ranks hold are given by each.
        """
        for index, chunk in enumerate(self.model_chunks):
            for name, parameter in chunk.named_parameters():
                if parameter not in self.model_param_gbuf_map:
                    continue
                span = self._get_model_param_range_map(parameter)["param"]
                main = self._main_param(parameter)
                states = {} if parameter.dtype == torch.float32 else {"master": main}
                for state, tensor in {**states, **self.optimizer.state[main]}.items():
                    yield index, _plain_name(name), state, tensor.detach().view(-1), (span.start, span.end)


def require_megatron() -> None:
    """Raise UnfitEnvironment unless megatron-core is the version whose methods are replaced here."""
    version = megatron.core.__version__
    if version != MEGATRON_VERSION:
        raise UnfitEnvironment(
            f"megatron-core is {version}, and AdEMAMix replaces methods of {MEGATRON_VERSION}: "
            f"install megatron-core=={MEGATRON_VERSION}"
        )


def _identity(group: dict[str, Any]) -> dict[str, Any]:
    """What tells one parameter group from another; NeMo renames two of the keys (_strategy_lib.py l.740)."""
    return {key: group[key] if key in group else group[f"pre_{key}"] for key in param_group_identifier_keys}


def _checked_layout(layout: str | None) -> str:
    if layout not in CHECKPOINT_LAYOUTS:
        raise InputError(f"checkpoint layout {layout} cannot hold AdEMAMix's three states: use {CHECKPOINT_LAYOUTS[0]}")
    return layout


def _parameter_name(chunks: list[Any], parameter: torch.nn.Parameter) -> str:
    for chunk in chunks:
        for name, candidate in chunk.named_parameters():
            if candidate is parameter:
                return _plain_name(name)
    raise ApertusError(f"a parameter of shape {tuple(parameter.shape)} belongs to no model chunk")


def _plain_name(name: str) -> str:
    """The name inside the GPTModel: wrappers (DDP, Float16Module, LightningModule) each put "module." before it."""
    while name.startswith("module."):
        name = name[len("module.") :]
    return name


def _check_parameters(chunks: list[Any]) -> None:
    """Refuse what upstream would get wrong without a word.

    Parameters of several types: upstream numbers the shards of a group in another order than it stores them
    (l.293 and l.437), so that a parameter would get its neighbour's states.

    Under tensor parallelism, a matrix that is not marked as cut, or a vector that is: upstream sets the mark when it
    initialises the weight, and without (`perform_initialization=False`) the gradient norm counts tensor-parallel rank
    0's part only. In Apertus every matrix is cut and every vector is a copy.
    """
    parameters = [(_plain_name(name), parameter) for chunk in chunks for name, parameter in chunk.named_parameters()]
    types = sorted({str(parameter.dtype) for _, parameter in parameters})
    if len(types) > 1:
        raise ApertusError(f"the model's parameters are of several types ({', '.join(types)}): they must be of one")
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return
    for name, parameter in parameters:
        marked = bool(getattr(parameter, "tensor_model_parallel", False))
        if marked != (parameter.dim() > 1):
            raise ApertusError(
                f"parameter {name} of shape {tuple(parameter.shape)} has tensor_model_parallel={marked}: "
                "its gradient would be counted wrongly"
            )

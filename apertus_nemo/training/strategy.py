"""NeMo's MegatronStrategy, with checkpoints that reshard and fail loudly.

Differences from upstream (nemo-toolkit 2.7.3, `nemo/lightning/pytorch/strategies/megatron_strategy.py`):

- the optimizer is saved as `fully_sharded_model_space`, the one layout of megatron-core 0.15.3 that carries all
  three states of AdEMAMix across a change of TP, PP and DP (upstream: `dp_reshardable`, by DP only);
- loading is strict (`RAISE_ALL`): a tensor that the checkpoint or the model lacks ends the run
  (upstream's default assumes that whatever is unexpected is fine, and hides what is missing);
- loading calls megatron-core directly: NeMo's wrapper asks for an initialised CUDA;
- of a run with adapters, checkpoints hold these and their optimizer states alone (NeMo's PEFT filters the same keys, in
  a wrapper around what writes checkpoints, and notes a path to the frozen weights; here the lock pins these);
- ModelOpt is neither saved nor restored, so neither imports all of `nemo.collections.llm`;
- ranks of one machine meet through a file, not a port;
- a collective ends after `trainer.collective_timeout_s` (upstream: after the default of each backend).
"""

from __future__ import annotations

import datetime
import queue
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallelConfig
from nemo.lightning.pytorch.plugins.data_sampler import DataSampler
from nemo.lightning.pytorch.strategies import MegatronStrategy
from torch.distributed.checkpoint.api import CheckpointException

from apertus_nemo.convert.unpickle import check_metadata, forced
from apertus_nemo.errors import ApertusError, InputError
from apertus_nemo.model.adapter_layout import is_adapter_parameter
from apertus_nemo.recipe.schema import RunConfig

WEIGHTS = "weights"  # folder of Megatron's files inside a checkpoint, as NeMo names it


class ApertusStrategy(MegatronStrategy):  # type: ignore[misc]
    """One strategy for every layout; everything it needs is in the RunConfig."""

    def __init__(self, run: RunConfig, *, data_sampler: DataSampler, rendezvous: Path | None = None) -> None:
        """`rendezvous`: a file that all ranks of this machine see (None: MASTER_ADDR and MASTER_PORT)."""
        parallel, bf16 = run.parallel, run.trainer.precision == "bf16"
        super().__init__(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            sequence_parallel=parallel.sequence_parallel,
            pipeline_dtype=torch.bfloat16 if bf16 else torch.float32,
            data_sampler=data_sampler,
            ddp=DistributedDataParallelConfig(
                use_distributed_optimizer=parallel.distributed_optimizer,
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=parallel.overlap_grad_reduce,
                overlap_param_gather=parallel.overlap_param_gather,
                check_for_nan_in_grad=False,  # the recorder stops the run, naming step and samples
                average_in_collective=False,
            ),
            ckpt_async_save=False,
            ckpt_parallel_save=True,
            ckpt_parallel_load=False,
            ckpt_load_strictness=StrictHandling.RAISE_ALL,
            replace_progress_bar=False,
            process_group_backend="gloo" if run.trainer.accelerator == "cpu" else "nccl",
        )
        self._run_config = run
        self._rendezvous = rendezvous

    def setup_distributed(self) -> None:
        """Join the process group, through the rendezvous file where there is one."""
        if self._rendezvous is not None and not torch.distributed.is_initialized():
            environment = self.cluster_environment
            assert environment is not None
            store = torch._C._distributed_c10d.FileStore
            self.store = store(str(self._rendezvous), environment.world_size())
        super().setup_distributed()
        limit = datetime.timedelta(seconds=self._run_config.trainer.collective_timeout_s)
        for group in {torch.distributed.group.WORLD, *(parallel_state._global_process_group_list or ())} - {None}:
            torch.distributed.distributed_c10d._set_pg_timeout(limit, group)

    @property
    def sharded_state_dict_metadata(self) -> dict[str, Any]:
        """Upstream's metadata with the optimizer's layout that reshards by TP, PP and DP."""
        metadata: dict[str, Any] = super().sharded_state_dict_metadata
        if self._run_config.parallel.distributed_optimizer:
            metadata["distrib_optim_sharding_type"] = "fully_sharded_model_space"
        return metadata

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write weights, optimizer and loop state below `filepath` (torch_dist); collective."""
        # Upstream starts a process, which imports torch, to hold the results of writers that report to this one.
        filesystem_async._results_queue = filesystem_async._results_queue or queue.Queue()
        checkpoint["state_dict"] = OrderedDict()
        metadata = self.sharded_state_dict_metadata
        checkpoint["sharded_state_dict"] = self._saved(metadata)
        checkpoint["optimizer_states"] = {}  # Lightning wants the names; the optimizer holds its own schedules
        checkpoint["lr_schedulers"] = []
        checkpoint["optimizer"] = [self.optimizer_sharded_state_dict(metadata=metadata)]
        options = {**(storage_options or {}), "content_metadata": metadata}
        try:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=options)
        except CheckpointException as error:  # torch's; no Exception, so that it would pass by everyone
            raise RuntimeError(" ".join(str(error).split())) from error

    def load_checkpoint(self, checkpoint_path: str | Path, selective_restore: bool = False) -> dict[str, Any]:
        """Read what `save_checkpoint` wrote into this run's sharding, whatever wrote it; collective.

        Raises InputError where a tensor is missing, too much, or of another shape, and for a pickle that would call
        what no checkpoint needs.
        """
        weights = str(Path(checkpoint_path) / WEIGHTS)
        check_metadata(Path(weights) / ".metadata")
        with forced():
            metadata = dist_checkpointing.load_content_metadata(weights)
        wanted: dict[str, Any] = {"state_dict": self._saved(metadata)}
        wanted["optimizer"] = [self.optimizer_sharded_state_dict(is_loading=True, metadata=metadata)]
        try:
            with forced():
                loaded: dict[str, Any] = dist_checkpointing.load(wanted, weights, strict=self.ckpt_load_strictness)
        except CheckpointingException as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"the checkpoint {checkpoint_path} does not fit this run's model and optimizer: {reason}"
            ) from error
        return loaded

    def _saved(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """The weights that a checkpoint holds: all, or adapters'."""
        found: dict[str, Any] = self.megatron_parallel.sharded_state_dict(metadata=metadata)
        if self._run_config.adapter.kind == "none":
            return found
        return _adapters(found)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Upstream's; of adapters, every one is copied where it belongs, and nothing else is there."""
        if self._run_config.adapter.kind == "none":
            super().load_model_state_dict(checkpoint, strict=strict)
            return
        virtual = self._run_config.parallel.virtual_pipeline_model_parallel_size is not None
        for index, chunk in enumerate(self.megatron_parallel):
            state = checkpoint["state_dict"][f"model_{index}"] if virtual else checkpoint["state_dict"]
            held = {_plain(name): value for name, value in state.items()}
            trained = {_plain(name): tensor for name, tensor in chunk.named_parameters() if tensor.requires_grad}
            if held.keys() != trained.keys():
                raise ApertusError(f"{sorted(held.keys() ^ trained.keys())[0]} was not read, or is no adapter's")
            with torch.no_grad():
                for name, tensor in trained.items():
                    tensor.copy_(held[name])

    def load_optimizer_state_dict(self, checkpoint: Any, selective_restore: bool = False) -> None:
        """Hand each optimizer the state that `load_checkpoint` read."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer"], strict=True):
            optimizer.load_state_dict(state)


def _adapters(sharded: dict[str, Any]) -> dict[str, Any]:
    """Those of a sharded state dict, which has one inside for each virtual stage, if there are any."""
    inner = {name: _adapters(value) for name, value in sharded.items() if isinstance(value, dict)}
    mine = {name: value for name, value in sharded.items() if is_adapter_parameter(name)}
    return inner or {name: value for name, value in mine.items() if not name.endswith("_extra_state")}  # empty


def _plain(name: str) -> str:
    """Wrappers (DDP, Float16Module, LightningModule) each put "module." before a name."""
    while name.startswith("module."):
        name = name[len("module.") :]
    return name

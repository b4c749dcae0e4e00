"""Whole runs inside forked ranks: the same code as a cold run, from `train` on."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any, ClassVar

from apertus_nemo.recipe.compose import compose
from apertus_nemo.record.run_dir import RunDirectory


def run_steps(
    rank: int,
    world_size: int,
    *,
    folder: str,
    corpus: str,
    overrides: list[str],
    checkpoint: str | None = None,
    gradients: bool = False,
    perturb: int | None = None,
    fill: float | None = None,
    plain: str | None = None,
    initial: str | None = None,
    initial_weights: str | None = None,
    attempt: int = 0,
    lock_digest: str = "0" * 64,
    limits_s: list[float | None] | None = None,
    first_state: str | None = None,
) -> dict[str, Any]:
    """Train `tiny_pretrain` with overrides in the run directory `folder`, which exists; what the last step left.

    perturb: seed of a coin that moves every initial weight to the next float, up or down (one process only).
    fill: put this value into every weight and optimizer state before a checkpoint is loaded.
    plain: files of torch_dist, which Megatron's own loader reads into the model, strictly, in the place of ours.
    initial: the weights to start from, of the kind that `overrides` name; initial_weights: the digest expected of them.
    limits_s: the time that each rank has; a run that is over before its last step answers where it stopped.
    first_state: the digest of the state that the run began with, where it is another run's checkpoint that is loaded.
    The answer's "start" is the state that training started from: "name kind" -> [dtype, shape, lanes].
    """
    from apertus_nemo.training import imports
    from apertus_nemo.training.assemble import prepare_process
    from apertus_nemo.training.progress import Progress
    from apertus_nemo.training.run import Place, train
    from apertus_nemo.training.stopping import Stop

    run = compose("tiny_pretrain", overrides).config
    prepare_process(run)
    if first_state is not None and rank == 0:
        shutil.copy(first_state, RunDirectory(Path(folder)).state(0))
    place = Place(
        rank=rank,
        local_rank=rank,
        attempt=attempt,
        corpus=Path(corpus),
        cache=Path(folder) / "index",
        rendezvous=Path(os.environ["RENDEZVOUS_FILE"]),
        initial=None if initial is None else Path(initial),
    )
    start = _start(run, perturb=perturb, fill=fill, plain=plain)
    trainer = train(
        run,
        RunDirectory(Path(folder)),
        lock_digest=lock_digest,
        place=place,
        progress=Progress(None),
        checkpoint=None if checkpoint is None else Path(checkpoint),
        callbacks=[start],
        stop=None if limits_s is None else Stop(time_s=limits_s[rank]),
        initial_weights=initial_weights,
    )
    result: dict[str, Any] = {
        "step": trainer.global_step,
        "xielu": _xielu(trainer),
        "filled": start.filled,
        "start": start.tensors,
        "left_in_sys_modules": sorted(module for module, _ in imports.GUARDED if module in sys.modules),
    }
    if gradients:
        result["gradients"] = _gradients(trainer, run)
    return result


def _start(run: Any, *, perturb: int | None, fill: float | None, plain: str | None) -> Any:
    """A callback that changes the fresh state where asked, and keeps the one that the first step starts from."""
    import lightning.pytorch as pl
    import torch

    from apertus_nemo.optim.module import logical_states
    from apertus_nemo.training.state import state_digest

    class Start(pl.Callback):
        tensors: ClassVar[dict[str, Any]] = {}
        filled: ClassVar[dict[str, Any]] = {}

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:  # before a checkpoint is loaded
            if perturb is not None:
                coin = torch.Generator().manual_seed(perturb)
                for model in _chunks(trainer):
                    for parameter in model.parameters():
                        ends = torch.where(torch.rand(parameter.shape, generator=coin) < 0.5, -torch.inf, torch.inf)
                        parameter.data.copy_(torch.nextafter(parameter.data, ends))
            if fill is not None:
                for model in _chunks(trainer):
                    for parameter in model.parameters():
                        if parameter.requires_grad:  # no checkpoint holds the others
                            parameter.data.fill_(fill)
                for optimizer in trainer.optimizers:
                    for *_, shard, _span in logical_states(optimizer):
                        shard.fill_(fill)
                self.filled.update(_tensors(state_digest(trainer, run, 0)))
            if plain is not None:
                from megatron.core import dist_checkpointing
                from megatron.core.dist_checkpointing.validation import StrictHandling

                wanted = {"state_dict": trainer.strategy.megatron_parallel.sharded_state_dict()}
                loaded = dist_checkpointing.load(wanted, plain, strict=StrictHandling.RAISE_ALL)
                trainer.strategy.load_model_state_dict(loaded)

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.tensors.update(_tensors(state_digest(trainer, run, trainer.global_step)))

    return Start()


def _tensors(state: Any) -> dict[str, Any]:
    return {f"{tensor.name} {tensor.kind}": tensor.to_list()[2:] for tensor in state.tensors}


def _chunks(trainer: Any) -> Any:
    for chunk in trainer.strategy.megatron_parallel:
        model = chunk.module
        while hasattr(model, "module"):
            model = model.module
        yield model


def _xielu(trainer: Any) -> dict[str, list[str]]:
    from apertus_nemo.model.config import layer_offset

    found = {}
    for model in _chunks(trainer):
        for index, layer in enumerate(model.decoder.layers):
            scalars = layer.mlp.activation_func
            found[str(layer_offset(model) + index)] = [float(scalars.alpha_p).hex(), float(scalars.alpha_n).hex()]
    return found


def _gradients(trainer: Any, run: Any) -> dict[str, list[Any]]:
    """Published name -> [[rows, cols, path of .npy]] for this rank's pieces of the gradient (DP=1)."""
    from megatron.core import parallel_state

    from apertus_nemo.model.config import layer_offset
    from apertus_nemo.model.layout import pieces

    found: dict[str, list[Any]] = {}
    for model in _chunks(trainer):
        for name, parameter in model.named_parameters():
            grad = parameter.main_grad.double()
            matrix = grad.view(1, -1) if grad.dim() < 2 else grad
            for piece in pieces(
                name,
                run.model,
                tp_rank=parallel_state.get_tensor_model_parallel_rank(),
                tp_size=parallel_state.get_tensor_model_parallel_world_size(),
                layer_offset=layer_offset(model),
            ):
                block = matrix[slice(*piece.local_rows), slice(*piece.local_cols)]
                found.setdefault(piece.name, []).append(
                    [piece.rows, piece.cols, float(block.square().sum()), float(block.flatten()[0])]
                )
    return found


def tamper(rank: int, world_size: int, *, checkpoint: str, copy: str, how: str) -> list[str]:
    """Copy a checkpoint and, in the copy, "drop NAME" or "add NAME"; the names that it holds now."""
    import copy as copies
    import pickle
    import shutil

    shutil.copytree(checkpoint, copy)
    path = Path(copy) / "weights" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    verb, name = how.split()
    tensors = metadata.state_dict_metadata
    if verb == "drop":
        del tensors[name]
    else:
        tensors[name] = copies.deepcopy(tensors["module.decoder.final_layernorm.weight"])
    path.write_bytes(pickle.dumps(metadata))
    return sorted(tensors)


def guarded(rank: int, world_size: int) -> dict[str, Any]:
    """Pairs that the import guard refused since the parent began, and what of them is there."""
    from apertus_nemo.training import imports

    names = {module for module, _ in imports.GUARDED}
    return {
        "met": sorted(imports.refused),
        "present": sorted(name for name in names if sys.modules.get(name) is not None),
        "imported": sorted(name for name in sys.modules if name.count(".") < 2),
    }

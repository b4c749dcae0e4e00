"""Whole runs inside forked ranks: the same code as a cold run, from `train` on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

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
) -> dict[str, Any]:
    """Train `tiny_pretrain` with overrides in the run directory `folder`, which exists; what the last step left."""
    from apertus_nemo.training.assemble import prepare_process
    from apertus_nemo.training.progress import Progress
    from apertus_nemo.training.run import Place, train

    run = compose("tiny_pretrain", overrides).config
    prepare_process(run)
    place = Place(
        rank=rank,
        local_rank=rank,
        attempt=0,
        corpus=Path(corpus),
        cache=Path(folder) / "index",
        rendezvous=Path(os.environ["RENDEZVOUS_FILE"]),
    )
    trainer = train(
        run,
        RunDirectory(Path(folder)),
        lock_digest="0" * 64,
        place=place,
        progress=Progress(None),
        checkpoint=None if checkpoint is None else Path(checkpoint),
    )
    result: dict[str, Any] = {"step": trainer.global_step, "xielu": _xielu(trainer)}
    if gradients:
        result["gradients"] = _gradients(trainer, run)
    return result


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

"""Recipes as NeMo's and Megatron's own objects."""

from __future__ import annotations

from typing import Any

import torch


def built(rank: int, world_size: int, *, recipes: dict[str, list[str]]) -> dict[str, Any]:
    """What NeMo's strategy and Megatron's configurations say of each recipe; their own checks run."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from apertus_nemo.model.config import transformer_config_kwargs
    from apertus_nemo.optim.module import optimizer_config
    from apertus_nemo.recipe.compose import compose
    from apertus_nemo.training.sampler import PlanSampler
    from apertus_nemo.training.strategy import ApertusStrategy

    found = {}
    for recipe, overrides in recipes.items():
        run = compose(recipe, overrides).config
        model = TransformerConfig(**transformer_config_kwargs(run))
        optimizer = optimizer_config(run)
        strategy = ApertusStrategy(run, data_sampler=PlanSampler(run))
        parallel = strategy.parallelism
        found[recipe] = {
            "layers": model.num_layers,
            "hidden": model.hidden_size,
            "bf16": [model.bf16, optimizer.bf16, model.params_dtype is torch.bfloat16],
            "deterministic": model.deterministic_mode,
            "rates": [optimizer.lr, optimizer.min_lr],
            "ways": [
                parallel.tensor_model_parallel_size,
                parallel.pipeline_model_parallel_size,
                parallel.virtual_pipeline_model_parallel_size,
                parallel.context_parallel_size,
            ],
            "model_ways": [
                model.tensor_model_parallel_size,
                model.pipeline_model_parallel_size,
                model.virtual_pipeline_model_parallel_size,
                model.context_parallel_size,
            ],
            "backend": strategy.process_group_backend,
        }
    return found

"""Runs with what upstream would do, which is wrong on several ranks and says so nowhere."""

from __future__ import annotations

from typing import Any

from tests.cases.training import run_steps


def as_upstream(
    rank: int, world_size: int, *, settings: dict[str, bool], mean_by_rank: bool = False, **arguments: Any
) -> dict[str, Any]:
    """`run_steps` with other `settings` of Megatron's configuration, refused or not.

    mean_by_rank: each context-parallel rank divides its losses by its own number of unmasked tokens.
    """
    from apertus_nemo.model import config
    from apertus_nemo.training import module

    ours = module.transformer_config_kwargs
    module.transformer_config_kwargs = lambda run: {**ours(run), **settings}
    config._check_messages = lambda *_: None
    if mean_by_rank:
        module.TokenMean = module.MaskedTokenLossReduction  # type: ignore[misc]
    return run_steps(rank, world_size, **arguments)

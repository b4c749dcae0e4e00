"""Where each value of a composed recipe came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from apertus_nemo.recipe.overrides import flatten


def trace(
    loaded: Iterable[tuple[str, Any]], overrides: Sequence[Override], list_above: Callable[[str], str | None]
) -> dict[str, str]:
    """Dotted key -> file or override that set it last.

    `loaded` is what Hydra merged, in order; `overrides` those that set values (not those that choose files).
    `list_above` names the list that a key reaches into, if any. A file that leaves a value open ("???") does not
    count as its origin, as it does not in the merge.
    """
    origins: dict[str, str] = {}
    for label, config in loaded:
        for key, value in flatten(OmegaConf.to_container(config, resolve=False)):
            if value != "???":
                _set(origins, key, label)
    for override in overrides:
        label = f"override {override.input_line}"
        if override.is_delete():
            for key in [k for k in origins if k == override.key_or_group or k.startswith(override.key_or_group + ".")]:
                del origins[key]
            continue
        for key, _ in flatten(override.value(), override.key_or_group):
            whole = list_above(key)  # an override of one item: the list has two origins
            if whole is None:
                _set(origins, key, label)
            else:
                origins[whole] = f"{origins[whole]}, {label}" if whole in origins else label
    return origins


def _set(origins: dict[str, str], key: str, label: str) -> None:
    """A value replaces what stood above and below it."""
    for other in [k for k in origins if k.startswith(key + ".") or key.startswith(k + ".")]:
        del origins[other]
    origins[key] = label

"""Overrides as typed on the command line, in Hydra's grammar and by Hydra's parser.

overrides = parse(["model=apertus_8b", "optim.lr=2e-4"])
members = parse_multirun(["optim.lr=1e-4,2e-4", "parallel=single,tp2"])   # four tuples of overrides
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from apertus_nemo.errors import InputError
from apertus_nemo.recipe.text import callable_key, is_callable_key, shorten

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader

# The short list: of Hydra's own configuration, only this may be overridden.
ALLOWED_HYDRA = {"hydra.mode": ("RUN", "MULTIRUN")}

# What people reach for, and what to use instead.
INSTEAD = {
    "hydra.run.dir": "use --run-dir",
    "hydra.sweep.dir": "use --run-dir",
    "hydra.sweep.subdir": "use --run-dir",
    "hydra.searchpath": "use --recipes",
    "hydra.job.name": "use name=...",
    "hydra.verbose": "use --quiet for less output",
    "hydra.output_subdir": "use --run-dir",
}


def one_line(text: str) -> str:
    """A message of Hydra's or OmegaConf's without its search path, links and second thoughts."""
    kept = []
    for line in text.splitlines():
        if line.startswith(("Config search path", "Search path", "See http")) or line.strip() == "^":
            break
        if line.strip() and not line.lstrip().startswith(("full_key:", "object_type=", "reference_type=")):
            kept.append(" ".join(line.split()))
    return " ".join(kept)


def parse(overrides: Sequence[str], loader: ConfigLoader | None = None) -> list[Override]:
    """Parse, and refuse what no recipe may do: call something, or configure Hydra. Raises InputError."""
    parser = OverridesParser.create(config_loader=loader)
    parsed: list[Override] = []
    for text in overrides:
        try:
            override = parser.parse_overrides([text])[0]
            _refuse(override)
        except (HydraException, ValueError, RecursionError) as error:
            raise InputError(_why_not_parsed(text, error)) from None
        parsed.append(override)
    return parsed


def _why_not_parsed(text: str, error: Exception) -> str:
    shown = shorten(text)
    if isinstance(error, RecursionError):
        return f"the override {shown} is nested too deeply"
    if "=" not in text and not text.startswith("~"):
        return f"the override {shown} has no value; write {shown}=VALUE, or ~{shown} to remove a value"
    # Hydra's message repeats the override and points below it; its last line of text says what was expected.
    reasons = [line for line in str(error).splitlines() if line.strip(" ^") and not line.startswith("See http")]
    reason = " ".join(reasons[-1].split()) if reasons else type(error).__name__
    return f"the override {shown} is not in Hydra's grammar: {shorten(reason)}"


def _refuse(override: Override) -> None:
    key, text = override.key_or_group, shorten(str(override.input_line))
    if not key:
        raise InputError(f"the override {text} has no key; write KEY=VALUE")
    if key == "hydra" or override.is_hydra_override():
        _refuse_hydra(override)
    parts = [part for part in key.replace("/", ".").split(".") if is_callable_key(part)]
    found = parts[0] if parts else callable_key(override._value)
    if found is not None:
        raise InputError(f"the override {text} is refused: {found} would call something, and a recipe calls nothing")


def _refuse_hydra(override: Override) -> None:
    key, text = override.key_or_group, shorten(str(override.input_line))
    allowed = ALLOWED_HYDRA.get(key)
    if allowed is None:
        instead = INSTEAD.get(key, f"only {', '.join(ALLOWED_HYDRA)} may be set")
        raise InputError(f"the override {text} is refused: Hydra's own settings are no part of a recipe; {instead}")
    if override.is_sweep_override() or override._value not in allowed:
        raise InputError(f"the override {text} is refused: {key} must be {' or '.join(allowed)}")


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; lists and empty mappings are leaves. Yields ("", value) for a bare leaf."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            # A quoted key arrives from the parser as QuotedString.
            text = str(getattr(name, "text", name))
            yield from flatten(item, f"{prefix}.{text}" if prefix else text)
    else:
        yield prefix, value


def wants_multirun(overrides: Sequence[Override]) -> bool:
    """Whether `hydra.mode=MULTIRUN` was typed; the same as --multirun."""
    return any(o.key_or_group == "hydra.mode" and o._value == "MULTIRUN" for o in overrides)


def expand(parsed: Sequence[Override]) -> list[tuple[str, ...]]:
    """The members of a sweep, by Hydra's own sweeper: each a tuple of overrides without sweeps."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    task = [override for override in parsed if not override.is_hydra_override()]
    try:
        batches = BasicSweeper.split_arguments(task, None)
    except HydraException as error:
        raise InputError(f"the sweep cannot be expanded: {one_line(str(error))}") from None
    return [tuple(member) for batch in batches for member in batch]

"""`apertus-nemo show`: a recipe, resolved, and where each value came from; see docs/show.md."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from apertus_nemo.cli.arguments import recipe_parser
from apertus_nemo.recipe.batches import BatchPlan
from apertus_nemo.recipe.check import check, find
from apertus_nemo.recipe.compose import ResolvedRecipe, compose
from apertus_nemo.recipe.schema import RunConfig

_PLAIN = re.compile(r"[A-Za-z_/.][A-Za-z0-9_/.+-]*")
_WORDS_OF_YAML = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def main(arguments: Sequence[str]) -> int:
    """Run the verb; 0 when done. InputError for a recipe that cannot be composed, or that could not run."""
    options = parser().parse_intermixed_args(arguments)
    resolved = compose(overrides=options.overrides, recipe_dirs=options.recipes)
    sys.stdout.write(as_json(resolved) if options.json else as_text(resolved))
    sys.stdout.flush()
    check(resolved.config)  # after printing: the origins help to see what to change
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = recipe_parser("show", "Print a recipe, resolved, and where each value came from.")
    parser.add_argument("--json", action="store_true", help="print JSON, for machines")
    return parser


def derived(config: RunConfig) -> dict[str, Any]:
    """What follows from the choices; empty while they do not fit each other."""
    if find(config):
        return {}
    plan = BatchPlan.from_config(config)
    steps = min(plan.num_steps, config.trainer.max_steps or plan.num_steps)
    samples = plan.consumed_samples(steps)
    share = config.trainer.micro_batch_size * config.data_parallel_size
    return {
        "steps": steps,
        "samples": samples,
        "tokens": samples * config.data.seq_length,
        "world_size": config.world_size,
        "data_parallel_size": config.data_parallel_size,
        "micro_batches_per_step": [size // share for size in plan.sizes],
    }


def as_json(resolved: ResolvedRecipe) -> str:
    """One JSON object, keys sorted."""
    content = {
        "recipe": resolved.recipe,
        "overrides": list(resolved.overrides),
        "choices": resolved.choices,
        "config": resolved.tree,
        "provenance": resolved.provenance,
        "derived": derived(resolved.config),
        "findings": [finding.line(resolved.config) for finding in find(resolved.config)],
    }
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def as_text(resolved: ResolvedRecipe) -> str:
    """YAML, each value with its origin as a comment."""
    rows = list(_rows(resolved.tree, "", 0, resolved.provenance))
    facts = derived(resolved.config)
    if facts:
        rows.append(("", ""))
        rows.append(("# what follows", ""))
        rows += [(f"# {name}: {scalar(value)}", "") for name, value in facts.items()]
    width = max(len(line) for line, origin in rows if origin)
    return "".join(f"{line:{width}}  # {origin}".rstrip() + "\n" if origin else line + "\n" for line, origin in rows)


def _rows(tree: dict[str, Any], prefix: str, depth: int, provenance: dict[str, str]) -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        key, indent = prefix + name, "  " * depth
        if isinstance(value, dict):
            yield "", ""
            yield f"{indent}{name}:", ""
            yield from _rows(value, key + ".", depth + 1, provenance)
        else:
            yield f"{indent}{name}: {scalar(value)}", provenance.get(key, "")


def _quoted(text: str) -> str:
    """A YAML string in double quotes, on one line."""
    kept = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
    return '"' + "".join(kept) + '"'


def scalar(value: Any) -> str:
    """A value in YAML's flow style, read back the same by YAML 1.1 and 1.2."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        mantissa, e, exponent = repr(value).partition("e")
        if not e:
            return mantissa
        sign = exponent[0] if exponent[0] in "+-" else "+"
        return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{sign}{exponent.lstrip('+-')}"
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) and value.lower() not in _WORDS_OF_YAML
        return value if plain else _quoted(value)
    if isinstance(value, list):
        return "[" + ", ".join(scalar(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {scalar(item)}" for name, item in value.items()) + "}"
    return str(value)

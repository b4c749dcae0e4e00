"""`apertus-nemo show`: a recipe, resolved, and where each value came from; see docs/show.md."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from apertus_nemo.cli.arguments import recipe_parser
from apertus_nemo.recipe.batches import BatchPlan
from apertus_nemo.recipe.check import check, find
from apertus_nemo.recipe.compose import ResolvedRecipe, compose
from apertus_nemo.recipe.schema import RunConfig
from apertus_nemo.recipe.stages import StagePlan

_WIDE = 60  # characters of a list on one line
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
    parser = recipe_parser(
        "show",
        "Print a recipe, resolved, and where each value came from.",
        examples={
            "apertus-nemo show": "the default recipe",
            "apertus-nemo show parallel=tp2 optim.lr=2e-3": "as train with the same words would run it",
            "apertus-nemo show recipe=tiny_stages --json": "for machines",
        },
        exit_codes={
            0: "printed, and it could run",
            2: "an override or a file is wrong, or values do not fit each other",
        },
    )
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
        "tokens": StagePlan.from_config(config).consumed_tokens(samples),
        "world_size": config.world_size,
        "data_parallel_size": config.data_parallel_size,
        "micro_batches_per_step": [size // share for size in plan.sizes],
        **({"stages": stages(config)} if config.data.stages else {}),
    }


def stages(config: RunConfig) -> list[dict[str, Any]]:
    """What each stage is, and how much it reads of its sources, where their manifests can be read."""
    from apertus_nemo.data import mixture

    plan, found = BatchPlan.from_config(config), _sources(config)
    return [
        {
            "name": stage.name,
            "steps": [plan.steps_before(stage.from_sample) + 1, plan.steps_before(stage.to_sample)],
            "samples": [stage.from_sample, stage.to_sample - 1],
            "seq_length": stage.seq_length,
            "tokens": stage.num_samples * stage.seq_length,
            "seed": stage.seed,
            "position": stage.position,
            "sources": [
                {"source": share.source or "all", "samples": round(share.samples), "epochs": round(share.epochs, 3)}
                for share in mixture.shares(stage, found, packing=config.data.packing)
            ]
            if found
            else [],
        }
        for stage in StagePlan.from_config(config).stages
    ]


def _sources(config: RunConfig) -> dict[str, Any]:
    """The sources by what their manifests say; empty while they are not built, or do not fit: training says why."""
    from apertus_nemo.data import mixture
    from apertus_nemo.data.corpus import embedded_chat_folder, embedded_folder
    from apertus_nemo.errors import ApertusError
    from apertus_nemo.launch.local import default_cache

    try:
        if config.data.source == "embedded":
            place = embedded_chat_folder if config.data.kind == "chat" else embedded_folder
            folder = place(default_cache(os.environ) / "corpus", config.data.tokenizer_vocab_size)
        else:
            folder = Path(config.data.path or "").expanduser()
        return dict(mixture.sources(config, folder))
    except ApertusError:
        return {}


def _stage_lines(found: list[dict[str, Any]]) -> Iterator[str]:
    """The stages, for people."""
    for number, stage in enumerate(found, start=1):
        first, last = stage["samples"]
        how = "" if stage["position"] == "restart" else ", going on in each source"
        yield (
            f"# stage {number} {stage['name']}: steps {stage['steps'][0]} to {stage['steps'][1]}, samples {first} to "
            f"{last} of {stage['seq_length']} tokens, seed {stage['seed']}{how}"
        )
        for source in stage["sources"]:
            again = ": every token is read more than once" if source["epochs"] > 1 else ""
            yield f"#   {source['source']}: {source['samples']} samples, {source['epochs']} epochs{again}"
        if not stage["sources"]:
            yield "#   the sources are not built yet, so how often each is read is not known"


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
        rows += [(f"# {name}: {scalar(value)}", "") for name, value in facts.items() if name != "stages"]
        rows += [(line, "") for line in _stage_lines(facts.get("stages", []))]
    width = max(len(line) for line, origin in rows if origin)
    return "".join(f"{line:{width}}  # {origin}".rstrip() + "\n" if origin else line + "\n" for line, origin in rows)


def _rows(tree: dict[str, Any], prefix: str, depth: int, provenance: dict[str, str]) -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        key, indent = prefix + name, "  " * depth
        if isinstance(value, dict):
            yield "", ""
            yield f"{indent}{name}:", ""
            yield from _rows(value, key + ".", depth + 1, provenance)
        elif isinstance(value, list) and len(scalar(value)) > _WIDE:
            yield f"{indent}{name}:", provenance.get(key, "")
            yield from ((line, "") for line in _items(value, indent + "  "))
        else:
            yield f"{indent}{name}: {scalar(value)}", provenance.get(key, "")


def _items(values: list[Any], indent: str) -> Iterator[str]:
    """A long list, a line an item, and a line a value of an item that is still too long."""
    for value in values:
        text = scalar(value)
        if not isinstance(value, dict) or len(text) <= _WIDE:
            yield f"{indent}- {text}"
            continue
        for number, (name, inner) in enumerate(value.items()):
            start = "- " if number == 0 else "  "
            if isinstance(inner, list) and len(scalar(inner)) > _WIDE:
                yield f"{indent}{start}{name}:"
                yield from _items(inner, indent + "    ")
            else:
                yield f"{indent}{start}{name}: {scalar(inner)}"


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

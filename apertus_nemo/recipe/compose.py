"""Recipe and overrides -> RunConfig, by Hydra's Compose.

    resolved = compose("tiny_pretrain", ["optim.lr=2e-3", "parallel=tp2"])
    resolved.config.optim.lr                 # 0.002
    resolved.provenance["optim.lr"]          # "override optim.lr=2e-3"
    resolved.provenance["trainer.devices"]   # "recipes/parallel/tp2.yaml"

The same overrides give the same RunConfig on every machine: neither the environment nor installed plugins of
Hydra nor the clock are read. Errors are InputErrors; whether the values fit each other, `check.check` says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict

from apertus_nemo.errors import ApertusError, InputError
from apertus_nemo.recipe import overrides as grammar
from apertus_nemo.recipe import typed
from apertus_nemo.recipe.open_values import stand_in
from apertus_nemo.recipe.overrides import flatten, one_line
from apertus_nemo.recipe.provenance import trace
from apertus_nemo.recipe.resolvers import HARMLESS, only_harmless_resolvers
from apertus_nemo.recipe.schema import RunConfig, to_tree
from apertus_nemo.recipe.source import GROUPS, PRIMARY, SCHEMA, RecordingLoader, has_option, make_loader, options
from apertus_nemo.recipe.suggest import nearest
from apertus_nemo.recipe.text import shorten
from apertus_nemo.recipe.values import ALLOWED

DEFAULT_RECIPE = "tiny_pretrain"


@dataclass(frozen=True)
class ResolvedRecipe:
    """A composed recipe, and how it came about."""

    recipe: str  # name of the file under recipe/
    config: RunConfig
    tree: dict[str, Any]  # config as plain dicts, lists and scalars
    overrides: tuple[str, ...]  # as typed
    provenance: dict[str, str]  # dotted key -> where its value came from; for reading, not for identity
    choices: dict[str, str]  # config group -> chosen file
    open: tuple[str, ...] = ()  # keys without a value, for which a stand-in stands


def compose(
    recipe: str = DEFAULT_RECIPE,
    overrides: Sequence[str] = (),
    *,
    recipe_dirs: Sequence[Path] = (),
    stand_ins: bool = False,
) -> ResolvedRecipe:
    """Compose `recipe` with `overrides` (an override `recipe=R` wins over the argument). Raises InputError.

    stand_ins: for a plan, which needs neither data nor weights nor seeds; see `open_values`.
    """
    with only_harmless_resolvers():
        loader = make_loader(recipe_dirs)
        parsed = grammar.parse(overrides)
        if grammar.wants_multirun(parsed):
            raise InputError("hydra.mode=MULTIRUN asks for several runs; this takes one")
        setters = _setters(parsed, loader)
        lines = [str(o.input_line) for o in parsed if not o.is_hydra_override()]
        if not any(o.key_or_group == "recipe" for o in parsed):
            lines.insert(0, f"recipe={_group_value(recipe, loader)}")
        composed = None
        try:
            composed = loader.load_configuration(PRIMARY, lines, RunMode.RUN, from_shell=False)
            choices = {k: v for k, v in composed.hydra.runtime.choices.items() if not k.startswith("hydra/")}
            provenance = trace(loader.loaded, setters, _list_above)
            with open_dict(composed):
                del composed["hydra"]
            tree = OmegaConf.to_container(composed, resolve=True, throw_on_missing=False)
        except ApertusError:
            raise
        except Exception as error:  # Hydra asserts about what stands in a recipe's defaults list
            circle = "the ${...} of the recipe" if composed else "the defaults lists of the recipes"
            raise InputError(_why_not_composed(error, loader, circle)) from None
    _restore_deleted(tree, typed.defaults())
    opened = stand_in(tree) if stand_ins else ()
    config = typed.from_tree(tree, where=provenance)
    return ResolvedRecipe(
        recipe=str(choices["recipe"]),
        config=config,
        tree=to_tree(config),
        overrides=tuple(overrides),
        provenance={key: provenance.get(key, SCHEMA) for key in typed.leaf_keys()},
        choices=dict(sorted(choices.items())),
        open=opened,
    )


def parse_multirun(overrides: Sequence[str], *, recipe_dirs: Sequence[Path] = ()) -> list[tuple[str, ...]]:
    """The members of a sweep: choice, range, glob and comma lists, by Hydra's own sweeper. Raises InputError."""
    with only_harmless_resolvers():
        return grammar.expand(grammar.parse(overrides, make_loader(recipe_dirs)))


def available(group: str, *, recipe_dirs: Sequence[Path] = ()) -> list[str]:
    """The names of a group's files, for example of group "recipe"."""
    return options(make_loader(recipe_dirs), group)


def _group_value(recipe: str, loader: RecordingLoader) -> str:
    """A recipe given by an argument, as a word of the grammar."""
    if not has_option(loader, "recipe", recipe):
        raise InputError(_unknown_option("recipe", recipe, loader))
    return recipe


def _setters(parsed: Sequence[Override], loader: RecordingLoader) -> list[Override]:
    """The overrides that set values, keys checked against the schema; the others choose files of a group."""
    known = {*typed.leaf_keys(), *typed.sections()}
    setters, faults = [], []
    for override in parsed:
        if override.is_hydra_override():
            continue
        key = override.key_or_group
        if override.is_sweep_override():
            raise InputError(
                f"the override {shorten(str(override.input_line))} is a sweep over several values; add --multirun"
            )
        is_group = loader.repository.group_exists(key)
        if key == "recipe" and (override.is_delete() or not isinstance(override._value, str)):
            raise InputError(
                f"the override {shorten(str(override.input_line))} is refused: a run has one recipe; write recipe=NAME"
            )
        if is_group and not isinstance(override._value, dict):
            _check_option(override, loader)
            continue
        setters.append(override)
        origin = f" (override {shorten(str(override.input_line))})"
        if override.package is not None or "/" in key:
            faults.append(_unknown_group(key, origin))
            continue
        for leaf, _ in flatten(override._value, key):
            whole = _list_above(leaf)
            inside = whole is not None and typed.rule_key(leaf) in {*typed.list_keys(), *ALLOWED}
            if leaf not in known and not inside:
                faults.append(typed.unknown_key(leaf, origin))
    if faults:
        raise InputError("\n".join(faults))
    return setters


def _list_above(key: str) -> str | None:
    """The list that a key like schedule.batch_ramp.0.from_sample reaches into."""
    return next((leaf for leaf in typed.leaf_keys() if key.startswith(leaf + ".")), None)


def _check_option(override: Override, loader: RecordingLoader) -> None:
    group, value = override.key_or_group, override._value
    if override.is_delete():
        return
    if not isinstance(value, (str, list)):
        raise InputError(
            f"the override {shorten(str(override.input_line))} is refused: {group} is a config group; choose one of "
            f"{', '.join(options(loader, group))}, or set single values as {group}.KEY=VALUE"
        )
    for name in [value] if isinstance(value, str) else value:
        if not has_option(loader, group, str(name)):
            raise InputError(_unknown_option(group, str(name), loader))


def _unknown_option(group: str, value: str, loader: RecordingLoader) -> str:
    found = options(loader, group)
    near = nearest(value, found)
    hint = f"; did you mean {group}={near}?" if near else ""
    return f"{group}={typed.show_value(value)[1:-1]} does not exist{hint} (there are: {', '.join(found)})"


def _unknown_group(key: str, origin: str) -> str:
    return f"{key}{origin} is not a config group; the groups are {', '.join(GROUPS)}"


def _why_not_composed(error: Exception, loader: RecordingLoader, circle: str) -> str:
    """Hydra's error as one line of ours."""
    cause: BaseException = error
    while cause.__cause__ is not None and not str(cause).strip():
        cause = cause.__cause__
    if isinstance(error, RecursionError) or "Recurs" in str(cause):
        key = getattr(cause, "full_key", None)
        return f"{key} refers to itself: {circle} form a circle" if key else f"{circle} form a circle"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.partition("/")
        if name and options(loader, group):
            asker = re.match(r"In '([^']+)': ", str(error))
            return (f"{asker[1]}.yaml: " if asker else "") + _unknown_option(group, name, loader)
    text = one_line(str(cause)) or type(cause).__name__
    twice = re.match(r"Multiple values for ([\w/]+)\. To override", text)
    if twice:
        return f"{twice[1]} is chosen already; write {twice[1]}=NAME, without the +, to choose another"
    key = getattr(cause, "full_key", None)
    if "nsupported interpolation type" in text:
        where = f"{key}: " if key else ""
        return f"{where}{text}; a recipe may use {', '.join(HARMLESS)} and references to its own keys"
    return shorten(f"{key}: {text}" if key and key not in text else text, 400)


def _restore_deleted(tree: Any, defaults: Mapping[str, Any]) -> None:
    """`~key` takes away what the recipe says; the schema's default is what is left."""
    for name, default in defaults.items():
        if name not in tree:
            tree[name] = default
        elif isinstance(default, dict) and isinstance(tree[name], dict):
            _restore_deleted(tree[name], default)

"""Imports run downwards through the floors of docs/design.md, and the heavy ones stay where it allows them.

Every module is parsed, never imported: imports inside functions and under TYPE_CHECKING count like any other.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "apertus_nemo"
MODULES = sorted(PACKAGE.rglob("*.py"))

FLOORS = (
    "errors",
    "recipe",
    "record",
    "image",
    "edf",
    "data",
    "model",
    "optim",
    "convert",
    "training",
    "testing",
    "plan",
    "launch",
    "audit",
    "selftest",
    "report",
    "cli",
)
HEAVY = {
    "torch",
    "nemo",
    "megatron",
    "lightning",
    "pytorch_lightning",
    "nemo_run",
    "transformer_engine",
    "transformers",
}
MAY_BE_HEAVY = {"data", "model", "optim", "convert", "training", "testing", "plan"}
LIGHT_MODULES = {
    *("optim.schedule", "model.layout", "data.manifest", "data.mixture"),
    *("plan.plan", "plan.ranks", "plan.memory", "plan.flops", "plan.cost", "plan.hardware", "plan.text"),
}


def module_name(path: Path) -> str:
    """The dotted name below the package: "recipe.schema", "recipe" for recipe/__init__.py, "" for the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, name: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that a module of the package imports, from-names included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                here = ["apertus_nemo", *filter(None, name.split("."))]
                base = here[: len(here) - node.level + (1 if is_package else 0)]
                target = ".".join([*base, *filter(None, [node.module])])
            else:
                target = node.module or ""
            yield from ((node.lineno, f"{target}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            if ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
                yield node.lineno, str(node.args[0].value)


def floor_of(dotted: str) -> str | None:
    """The floor that "apertus_nemo.recipe.schema.RunConfig" is on; None for the package itself or another package."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "apertus_nemo" and parts[1] in FLOORS else None


def faults(source: str, name: str, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module, one line each."""
    floor = name.split(".")[0]
    found = []
    for line, target in imports(source, name, is_package):
        other = floor_of(target)
        if other is not None and FLOORS.index(other) > FLOORS.index(floor):
            found.append(f"{name}:{line} imports {target}: {other} is above {floor}")
        if target.split(".")[0] in HEAVY and (floor not in MAY_BE_HEAVY or name in LIGHT_MODULES):
            found.append(f"{name}:{line} imports {target}, which this module must run without")
    return found


def test_the_floors_are_those_of_the_design() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    block = text.split("## Floors", 1)[1].split("\n## ", 1)[0]
    assert tuple(re.findall(r"^    (\w+)", block, re.MULTILINE)) == FLOORS


def test_every_module_is_on_a_floor() -> None:
    assert MODULES
    assert {module_name(path).split(".")[0] for path in MODULES} - {""} <= set(FLOORS)


def test_the_light_modules_exist() -> None:
    assert {module_name(path) for path in MODULES} >= LIGHT_MODULES


@pytest.mark.parametrize("path", MODULES, ids=lambda path: module_name(path) or "apertus_nemo")
def test_imports_run_downwards(path: Path) -> None:
    name, source = module_name(path), path.read_text()
    if name:
        assert faults(source, name, path.name == "__init__.py") == []
    else:  # the package itself stays empty: every import of anything below would pay for it
        assert list(imports(source, name, True)) == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from apertus_nemo.training import assemble", "recipe.compose"),
        ("import apertus_nemo.cli.main", "audit.compare"),
        ("def late():\n    from ..model import layout", "record.lock"),
        ("from apertus_nemo import launch", "training.worker"),
        ("import importlib\nimportlib.import_module('apertus_nemo.cli.main')", "launch.local"),
        ("import torch", "recipe.batches"),
        ("def late():\n    from megatron.core import parallel_state", "audit.compare"),
        ("import torch", "model.layout"),
    ],
)
def test_a_wrong_import_is_found(source: str, name: str) -> None:
    assert len(faults(source, name)) == 1


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from apertus_nemo.errors import InputError", "cli.main"),
        ("from . import schema\nfrom .schema import RunConfig", "recipe.compose"),
        ("import torch\nfrom apertus_nemo.model import layout", "training.digest"),
        ("import numpy", "record.state_digest"),
    ],
)
def test_a_right_import_is_not(source: str, name: str) -> None:
    assert faults(source, name) == []

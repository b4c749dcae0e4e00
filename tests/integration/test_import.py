"""A run's weights in the published form and back in Megatron's: the bits that were logged, at every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from apertus_nemo.testing.ranks import Parent
from tests.integration.runs import LAYOUTS, STEPS, Run
from tests.integration.test_initial import FIRST_STEP, child, export, weights_of
from tests.unit.convert.published import bytes_of

CHUNKS = {"chunk_bytes": 30_000, "file_bytes": 1_000_000}  # matrices in several chunks, which cuts go through
SHORT = ("tp2", "pp2_vpp2")
OTHERS = ("one", "pp2", "dp2", "cp2", "tp2_pp2", "tp2_dp2", "pp2_dp2", "tp2_cp2")


def layouts(short: tuple[str, ...], full: tuple[str, ...]) -> list[object]:
    return [*short, *(pytest.param(name, marks=pytest.mark.full) for name in full)]


@pytest.fixture(scope="session")
def published(runs: Callable[..., Run], parent: Parent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run on one process, exported."""
    return export(parent, runs("one"), tmp_path_factory.mktemp("import") / "hf")


@pytest.fixture(scope="session")
def megatron(published: Path, parent: Parent) -> Path:
    """The same, imported."""
    folder = published.parent / "megatron"
    parent.run("tests.cases.convert:imported", arguments={"source": str(published), "folder": str(folder), **CHUNKS})
    return folder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", layouts(("one",), ("tp2", "pp2_vpp2")))
def test_there_and_back(runs: Callable[..., Run], parent: Parent, tmp_path: Path, layout: str, precision: str) -> None:
    """Run to folder to checkpoint: the digest that was logged; and to a folder again: the same bytes."""
    run = runs(layout, *([] if precision == "fp32" else ["trainer.precision=bf16"]))
    hf, back, again = (tmp_path / name for name in ("hf", "back", "again"))
    whole = {"checkpoint": str(run.directory.checkpoint(STEPS)), "overrides": list(LAYOUTS[layout][1])}
    parent.run("tests.cases.convert:exported", arguments={**whole, "folder": str(hf)})
    (answer,) = parent.run("tests.cases.convert:imported", arguments={"source": str(hf), "folder": str(back), **CHUNKS})
    assert answer["recorded"] == answer["found"] == weights_of(run, STEPS)
    assert answer["files"] > 1
    whole["checkpoint"] = str(back)
    parent.run("tests.cases.convert:exported", arguments={**whole, "folder": str(again), "shard_bytes": 1_000_000})
    assert bytes_of(again) == bytes_of(hf)


@pytest.mark.parametrize("layout", layouts(SHORT, OTHERS))
def test_a_run_starts_from_it(runs: Callable[..., Run], published: Path, megatron: Path, layout: str) -> None:
    """At every layout: the bits that the parent logged, and the loss of one process that read the published folder."""
    expected = weights_of(runs("one"), STEPS)
    one, mine = (
        child(runs, "one", "hugging_face", published, expected),
        child(runs, layout, "megatron", megatron, expected),
    )
    assert weights_of(mine, 0) == expected
    assert mine.directory.state(0).read_bytes() == one.directory.state(0).read_bytes()
    assert abs((mine.steps[1].loss or 0.0) / (one.steps[1].loss or 1.0) - 1) < FIRST_STEP
    if layout in ("one", "pp2", "pp2_vpp2"):
        assert mine.steps[1] == one.steps[1], "a pipeline alone changes no bit"


@pytest.mark.parametrize("layout", layouts(("tp2",), ("one", "pp2_vpp2", "tp2_pp2", "tp2_dp2", "tp2_cp2")))
def test_megatrons_own_loader_reads_it(runs: Callable[..., Run], megatron: Path, layout: str) -> None:
    """Strictly, into a model that was full of something else."""
    expected = weights_of(runs("one"), STEPS)
    short = ("trainer.max_steps=1", "optim.lr=1e-4", "optim.min_lr=0")
    mine = runs(layout, *short, fill=0.5, plain=str(megatron / "weights"))
    ours = child(runs, "one", "megatron", megatron, expected)
    weights = {name: value for name, value in ours.ranks[0]["start"].items() if name.endswith(" weight")}
    for rank in mine.ranks:
        assert {name: value for name, value in rank["start"].items() if name in weights} == weights
        assert all(rank["filled"][name] != value for name, value in weights.items())
    assert abs((mine.steps[1].loss or 0.0) / (ours.steps[1].loss or 1.0) - 1) < FIRST_STEP


def test_the_exported_folder_of_both_forms_is_one(
    megatron: Path, published: Path, parent: Parent, tmp_path: Path
) -> None:
    arguments = {"checkpoint": str(megatron), "folder": str(tmp_path / "out"), "overrides": []}
    parent.run("tests.cases.convert:exported", arguments={**arguments, "shard_bytes": 1_000_000})
    names = sorted(path.name for path in published.iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (published / name).read_bytes()

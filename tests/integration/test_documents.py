"""Runs on a corpus of short documents: masking reaches every pipeline stage, and is the same at every layout."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest

from apertus_nemo.testing.ranks import Parent
from tests.integration.runs import Run, Runs

WORDS = ["arm", "bear", "cloud", "Dürrenmatt", "ewig", "Fluss", "glacier", "huître", "île", "jour", "käse"]
MASKED = ("data.document_masking=per_document", "trainer.max_steps=2")


@pytest.fixture(scope="module")
def short_runs(parent: Parent, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """As `runs`, on documents of 3 to 20 words: most samples hold several."""
    folder = tmp_path_factory.mktemp("short")
    draw = random.Random(1)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=draw.randint(3, 20)))}) for _ in range(800)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    arguments = ["build", "--input", "texts.jsonl", "--train-bpe", "300", "--output", "corpus"]
    (built,) = parent.run("tests.cases.data:command", arguments={"arguments": arguments, "folder": str(folder)})
    assert built["code"] == 0, built
    return Runs(parent, folder / "corpus", tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("layout", ["tp2_sp", "pp2", "dp2", "cp2", pytest.param("pp2_cp2", marks=pytest.mark.full)])
def test_masking_is_the_same_at_every_layout(short_runs: Callable[..., Run], layout: str) -> None:
    one, cut = short_runs("one", *MASKED).steps, short_runs(layout, *MASKED).steps
    plain = short_runs("one", "trainer.max_steps=2").steps
    assert sorted(one) == sorted(cut) == [0, 1, 2]
    for step in (1, 2):
        assert cut[step].batch_digest == one[step].batch_digest != plain[step].batch_digest
        assert cut[step].loss == pytest.approx(one[step].loss, rel=1e-6)
        assert abs(plain[step].loss - one[step].loss) > 1e-4  # what a stage without the borders would show
    assert cut[1].grad_norm == pytest.approx(one[1].grad_norm, rel=2e-6)
    assert plain[1].grad_norm != pytest.approx(one[1].grad_norm, rel=1e-3)


def test_curves_change_nothing(short_runs: Callable[..., Run]) -> None:
    drawn, plain = (short_runs("one", "trainer.max_steps=2", *more) for more in ((), ("trainer.tensorboard=false",)))
    assert drawn.steps == plain.steps
    assert [path.name for path in drawn.directory.path.glob("logs/*/*")] == ["events.out.tfevents.0000000000"]
    assert not (plain.directory.path / "logs").exists()
    for step in (0, 2):
        assert drawn.directory.state(step).read_bytes() == plain.directory.state(step).read_bytes()

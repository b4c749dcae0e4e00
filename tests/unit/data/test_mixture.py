"""Sources of a run: found by their manifests, held against the model and each other; how often each is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.cli.main import main
from apertus_nemo.data import manifest as manifests
from apertus_nemo.data.mixture import corpora, shares, sources
from apertus_nemo.errors import InputError
from apertus_nemo.recipe.schema import DataStage, MixturePart, RunConfig
from apertus_nemo.recipe.stages import StagePlan
from tests.cases.data import run_config
from tests.unit.data.conftest import Command


def mixed(*stages: DataStage, **changes: Any) -> RunConfig:
    return run_config(source="built", path="/of/the/recipe", stages=stages, **changes)


def stage(name: str, first: int, *parts: tuple[str, float | None], **more: Any) -> DataStage:
    return DataStage(name, first, mixture=tuple(MixturePart(*part) for part in parts), **more)


def test_data_that_the_model_cannot_take_is_refused(corpus: Path) -> None:
    tokens = manifests.load(corpus).tokens
    sources(run_config(vocab_size=300), corpus)
    with pytest.raises(InputError) as refusal:
        sources(run_config(vocab_size=299), corpus)
    assert str(refusal.value) == (
        "model.vocab_size is 299, but the tokenizer of the data has 300 ids: "
        "set model.vocab_size to at least 300, or build the data with a smaller vocabulary"
    )
    sources(run_config(seq_length=tokens - 1), corpus)
    with pytest.raises(InputError) as refusal:
        sources(run_config(seq_length=tokens), corpus)
    assert str(refusal.value) == (
        f"data.seq_length is {tokens}, so a sample needs {tokens + 1} tokens, "
        f"but the corpus has {tokens}: add text or set a smaller data.seq_length"
    )


def test_each_source_is_a_folder_below_the_path(mixed_corpora: Path) -> None:
    config = mixed(stage("a", 0, ("one", 1.0), ("two/inner", 3.0)), stage("b", 20, ("two/inner", None), seed=5))
    assert corpora(config, mixed_corpora) == {
        "one": mixed_corpora / "one",
        "two/inner": mixed_corpora / "two" / "inner",
    }
    found = sources(config, mixed_corpora)
    for name, path in corpora(config, mixed_corpora).items():
        manifest = manifests.verify(path)
        assert (found[name].manifest, found[name].tokens, found[name].whole) == (manifest, manifest.tokens, True)


def test_how_often_a_source_is_read(mixed_corpora: Path) -> None:
    config = mixed(
        stage("a", 0, ("one", 1.0), ("two/inner", 3.0)),
        stage("b", 20, ("two/inner", None), ("one", None), seed=5, seq_length=32),
        train_samples=60,
    )
    found = sources(config, mixed_corpora)
    first, second = StagePlan.from_config(config).stages
    one, two = (found[name].tokens for name in ("one", "two/inner"))
    assert [(s.source, s.weight, s.samples) for s in shares(first, found)] == [
        ("one", 0.25, 5.0),
        ("two/inner", 0.75, 15.0),
    ]
    assert [s.epochs for s in shares(first, found)] == [pytest.approx(5 * 64 / one), pytest.approx(15 * 64 / two)]
    assert shares(first, found)[1].epochs > 1  # read more than once
    epoch = {"one": (one - 1) // 32, "two/inner": (two - 1) // 32}
    for share in shares(second, found):  # without weights, in proportion to the samples that each has
        assert share.weight == pytest.approx(epoch[share.source] / sum(epoch.values()))
        assert share.samples == pytest.approx(40 * share.weight)
    assert len({round(share.epochs, 2) for share in shares(second, found)}) == 1


def test_show_says_it(capsys: pytest.CaptureFixture[str], mixed_corpora: Path) -> None:
    """By the manifests of the corpora; one that is too small is read more than once."""
    mixture = "[{source:one,weight:3},{source:two/inner,weight:1}]"
    arguments = [
        "show",
        "data=built",
        f"data.path={mixed_corpora}",
        f"data.stages=[{{name:web,from_sample:0,mixture:{mixture}}}]",
        "data.seq_length=64",
    ]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    tokens = {name: manifests.load(mixed_corpora / name).tokens for name in ("one", "two/inner")}
    epochs = {name: round(samples * 64 / tokens[name], 3) for name, samples in (("one", 480), ("two/inner", 160))}
    assert epochs["two/inner"] > 1
    assert output.splitlines()[-3:] == [
        "# stage 1 web: steps 1 to 60, samples 0 to 639 of 64 tokens, seed 28",
        f"#   one: 480 samples, {epochs['one']} epochs: every token is read more than once",
        f"#   two/inner: 160 samples, {epochs['two/inner']} epochs: every token is read more than once",
    ]
    assert epochs["one"] > 1


def test_a_mixture_that_cannot_be_read_is_refused(mixed_corpora: Path, jsonl: Path, command: Command) -> None:
    assert command("build", "--input", jsonl, "--train-bpe", "290", "--output", "other")["code"] == 0
    gone = mixed(stage("a", 0, ("one", 1.0), ("gone", 1.0)))
    other = mixed(stage("a", 0, ("one", 1.0)), stage("b", 20, ("other", 1.0)))
    short = mixed(stage("a", 0, ("one", 1.0)), stage("b", 20, ("one", 1.0), ("short", 1.0), seq_length=32))
    twice = mixed(stage("a", 0, ("one", 1.0)), stage("b", 20, ("two/inner", 1.0), ("one", 1.0), ("alias", 1.0), seed=5))
    (mixed_corpora / "alias").symlink_to("one")
    tokens = manifests.load(mixed_corpora / "short").tokens
    tell = {
        gone: f"the source gone of the mixture: {mixed_corpora}/gone is not a built corpus: it has no manifest.json; "
        "make one with `apertus-nemo data build`",
        other: "the sources one and other of the mixtures have different tokenizers: build both with "
        "`apertus-nemo data build --tokenizer`, from the same one",
        short: f"data.stages.1.seq_length is 32, so a sample needs 33 tokens, but the source short has {tokens}: "
        "add text or set a smaller data.seq_length",
        twice: "data.stages.1: the sources one and alias are the same corpus: "
        "name it once, with the sum of the weights",
    }
    for config, message in tell.items():
        with pytest.raises(InputError) as refusal:
            sources(config, mixed_corpora)
        assert str(refusal.value) == message

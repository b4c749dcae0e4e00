"""What a user reads when an override is wrong: word for word."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from apertus_nemo.errors import InputError
from apertus_nemo.recipe.compose import compose
from apertus_nemo.recipe.suggest import ABBREVIATIONS, nearest
from apertus_nemo.recipe.typed import leaf_keys

# "$ override", then the message, then an empty line; RECIPES: the names of all packaged recipes.
RECIPES = ", ".join(sorted(path.stem for path in (Path(__file__).parents[3] / "recipes" / "recipe").glob("*.yaml")))
TEXTS = (Path(__file__).parent / "errors.txt").read_text().replace("RECIPES", RECIPES).strip().split("\n\n")
MESSAGES = {override.removeprefix("$ "): message for override, message in (t.split("\n", 1) for t in TEXTS)}


@pytest.mark.parametrize("override", MESSAGES)
def test_message(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "SHLVL", "3")
    with pytest.raises(InputError) as error:
        compose(overrides=[override])
    assert str(error.value) == MESSAGES[override]


def test_environment_is_not_read_through_a_back_door() -> None:
    """Names that are put together, or decoded, while resolving."""
    for value in (
        "${oc.decode:'${oc.env:HOME}'}",
        "${oc.${data.source}:HOME}",
        "'${oc.create:{a:\"${oc.env:HOME}\"}}'",
    ):
        with pytest.raises(InputError):
            compose(overrides=[f"image.reference={value}", "data={source:env}"])


def test_all_faults_at_once() -> None:
    with pytest.raises(InputError) as error:
        compose(overrides=["optim.lr=0", "model.head_dim=x", "trainer.devices=0"])
    assert [line.split(" is ")[0] for line in str(error.value).splitlines()] == [
        "model.head_dim",
        "optim.lr",
        "trainer.devices",
    ]


def test_unknown_recipe_by_argument() -> None:
    with pytest.raises(InputError) as error:
        compose("tiny_pretrian")
    assert str(error.value) == (
        f"recipe=tiny_pretrian does not exist; did you mean recipe=tiny_pretrain? (there are: {RECIPES})"
    )


def test_suggestions_survive_one_wrong_letter() -> None:
    """Every key with its last letter doubled, dropped or changed is still understood."""
    keys = leaf_keys()
    for key in keys:
        for wrong in (key + key[-1], key[:-1], key[:-1] + "x"):
            if wrong not in keys and len(key) > 8:
                found = nearest(wrong, keys)
                assert found is not None
                assert found[: len(key) - 1] == key[:-1], wrong


def test_abbreviations_lead_to_keys() -> None:
    assert set(ABBREVIATIONS.values()) <= set(leaf_keys())

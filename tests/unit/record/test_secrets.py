"""Planted secrets are found, named without being shown; what a recipe holds is not taken for one."""

from __future__ import annotations

import pytest

from apertus_nemo.errors import InputError
from apertus_nemo.recipe.compose import available, compose
from apertus_nemo.record.lock import build_lock
from apertus_nemo.record.secrets import leaves, override_pairs, refuse_secrets, secret_in
from tests.unit.recipe.given import GIVEN
from tests.unit.record import example

PLANTED = [
    ("data.path", "https://ada:hunter2@host/corpus"),
    ("data.path", "s3://ada:hunter2@bucket/x"),
    ("data.path", "https://hunter2@host/corpus"),
    ("data.path", "https://host/corpus?token=hunter2"),
    ("data.path", "https://host/corpus?part=1&X-Amz-Signature=hunter2"),
    ("data.path", "https://host/corpus?sv=2020&sig=hunter2"),
    ("data.path", "https://host/corpus?to%6ben=hunter2"),
    ("data.path", "https://host/x#access_token=hunter2"),
    ("data.path", "simplecache::https://host/x?api_key=hunter2"),
    ("image.reference", "docker://ada:hunter2@registry/image:1"),
    ("name", "hf_" + "aB3" * 9),
    ("name", "x-ghp_" + "aB3" * 12),
    ("name", "AKIA" + "IOSFODNN7EXAMPLE"),
    ("logger.api_key", "hunter2"),
    ("wandb.WANDB_API_KEY", "hunter2"),
    ("s3.secret", "hunter2"),
    ("hub.token", "hunter2"),
    ("db.password", "hunter2"),
    ("x", "-----BEGIN OPENSSH " + "PRIVATE KEY-----"),
    ("x", "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0.hunter2"),
]


@pytest.mark.parametrize(("key", "value"), PLANTED)
def test_a_planted_secret_is_refused_and_not_shown(key: str, value: str) -> None:
    with pytest.raises(InputError) as refusal:
        refuse_secrets([("harmless", 1), (key, value)], where="the recipe")
    assert str(refusal.value).startswith(f"{key} of the recipe looks like a secret (")
    assert value not in str(refusal.value)
    assert "hunter2" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("key", "value"), PLANTED)
def test_an_override_with_one_is_refused_too(key: str, value: str) -> None:
    for line in (f"{key}={value}", f"++{key}={value}", f"+{key}='{value}'"):
        with pytest.raises(InputError):
            refuse_secrets(override_pairs([line]), where="the overrides")
        with pytest.raises(InputError, match="overrides looks like a secret"):
            build_lock(example.config(), overrides=[line], environment={}, data=None, surroundings=example.SURROUNDINGS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.tokenizer_vocab_size", 4096),
        ("data.path", "s3://bucket/corpus"),
        ("data.path", "https://host/corpus?part=1&version=2"),
        ("data.path", "https://host/a@b/corpus"),
        ("data.path", "/home/ada/tokens/secret-project"),
        ("image.reference", "registry/image@sha256:" + "a" * 64),
        ("data.tokens", "many"),
        ("hub.token", None),
        ("hub.token", ""),
        ("commit", "4d75026c0ffee00000000000000000000000beef"),
    ],
)
def test_harmless_values_pass(key: str, value: object) -> None:
    assert secret_in(key, value) is None


def test_no_recipe_of_ours_is_taken_for_one() -> None:
    for recipe in available("recipe"):
        refuse_secrets(leaves(compose(recipe, GIVEN.get(recipe, [])).tree), where=recipe)


def test_the_environment_of_a_lock_holds_listed_names_only() -> None:
    shell = {"AWS_SECRET_ACCESS_KEY": "hunter2", "WANDB_API_KEY": "hunter2", "HF_TOKEN": "hunter2", "TZ": "UTC"}
    lock = build_lock(example.config(), overrides=[], environment=shell, data=None, surroundings=example.SURROUNDINGS)
    assert lock.tree["environment"] == {"TZ": "UTC"}
    assert b"hunter2" not in lock.to_bytes()

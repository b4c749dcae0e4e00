"""Tree -> RunConfig: the strict inverse of to_tree."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apertus_nemo.errors import InputError
from apertus_nemo.recipe import schema
from apertus_nemo.recipe.schema import RunConfig, to_tree
from apertus_nemo.recipe.typed import defaults, fields_of, from_tree, leaf_keys, rule_key, show_value
from apertus_nemo.recipe.values import ALLOWED, INT64_MAX

TINY: dict[str, Any] = {
    "name": "t",
    "model": {
        **defaults()["model"],
        "num_layers": 4,
        "hidden_size": 128,
        "ffn_hidden_size": 672,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "head_dim": 16,
        "vocab_size": 4096,
    },
    "data": defaults()["data"],
    "optim": {**defaults()["optim"], "lr": 1e-3, "min_lr": 1e-4},
    "schedule": {**defaults()["schedule"], "train_samples": 64},
    "parallel": defaults()["parallel"],
    "trainer": {**defaults()["trainer"], "global_batch_size": 8, "micro_batch_size": 4},
    "reproducibility": defaults()["reproducibility"],
    "cluster": defaults()["cluster"],
    "image": defaults()["image"],
}


def strategy(kind: Any, key: str) -> st.SearchStrategy[Any]:
    """Values of a schema's type that the table of allowed values admits: made from the table, not from the code."""
    import types
    import typing

    if isinstance(kind, types.UnionType):
        inner = next(part for part in typing.get_args(kind) if part is not types.NoneType)
        return st.none() | strategy(inner, key)
    if typing.get_origin(kind) is tuple:
        return st.lists(strategy(typing.get_args(kind)[0], key), max_size=3).map(tuple)
    if dataclasses.is_dataclass(kind):
        prefix = f"{key}." if key else ""
        return st.builds(kind, **{name: strategy(inner, prefix + name) for name, inner in fields_of(kind).items()})
    row = ALLOWED[rule_key(key)]
    if row.choices:
        return st.sampled_from(row.choices)
    if kind is bool:
        return st.booleans()
    if key == "trainer.max_time":
        return st.from_regex(r"[0-9]{2}:[01][0-9]:[0-5][0-9]:[0-5][1-9]", fullmatch=True)
    if kind is int:
        assert row.low is not None
        assert row.high is not None
        return st.integers(int(row.low), int(row.high))
    if kind is float:
        return st.floats(row.low, row.high, exclude_min=row.above, allow_nan=False, allow_infinity=False)
    return st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)


@settings(max_examples=60, deadline=None)
@given(config=strategy(RunConfig, ""))
def test_round_trip(config: RunConfig) -> None:
    tree = to_tree(config)
    assert from_tree(tree) == config
    assert to_tree(from_tree(tree)) == tree
    assert from_tree(json.loads(json.dumps(tree))) == config


def test_every_key_has_a_row_and_a_reason() -> None:
    lists = {
        "schedule.batch_ramp": ("from_sample", "global_batch_size"),
        "data.stages": ("name", "from_sample", "seed", "seq_length", "position"),
        "data.stages.mixture": ("source", "weight"),
    }
    expected = [key for key in leaf_keys() if key not in lists]
    expected += [f"{key}.{name}" for key, names in lists.items() for name in names]
    assert sorted(ALLOWED) == sorted(expected)
    assert all(row.reason for row in ALLOWED.values())


def test_defaults_are_allowed_and_are_the_dataclasses() -> None:
    config = from_tree(TINY)
    assert config.model == schema.ModelConfig(4, 128, 672, 8, 4, 16, 4096)
    assert config.data == schema.DataConfig()
    assert config.reproducibility == schema.ReproducibilityConfig()


def changed(key: str, value: Any) -> dict[str, Any]:
    """TINY with one value changed, or taken away (Ellipsis)."""
    tree = copy.deepcopy(TINY)
    inner = tree
    *path, last = key.split(".")
    for part in path:
        inner = inner[part]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return tree


def test_integer_becomes_a_float() -> None:
    config = from_tree(changed("optim.alpha", 8))
    assert (config.optim.alpha, type(config.optim.alpha)) == (8.0, float)


REFUSED = [
    ("model.num_layers", True),
    ("model.num_layers", 4.0),
    ("model.num_layers", "4"),
    ("model.num_layers", None),
    ("model.num_layers", [4]),
    ("model.num_layers", ...),
    ("model.num_layers", "???"),
    ("model.rope_scaling", 1),
    ("model.rope_scaling", "true"),
    ("optim.lr", float("nan")),
    ("optim.lr", float("inf")),
    ("optim.lr", float("-inf")),
    ("optim.lr", True),
    ("optim.lr", 10**400),
    ("optim.alpha", 2**53 + 1),
    ("optim.beta1", 1.0),
    ("optim.beta1", -1e-300),
    ("optim.eps", 0.0),
    ("trainer.seed", INT64_MAX + 1),
    ("trainer.seed", -1),
    ("data.seed", 2**32),
    ("data.path", ""),
    ("data.path", "a\nb"),
    ("data.path", "\udcff"),
    ("data.path", 5),
    ("data", None),
    ("data", []),
    ("schedule.batch_ramp", {}),
    ("schedule.batch_ramp", None),
    ("schedule.batch_ramp", [{"from_sample": 0, "global_batch_size": 8}]),
    ("schedule.batch_ramp", [{"from_sample": 8}]),
    ("schedule.batch_ramp", [{"from_sample": 8, "global_batch_size": 8, "x": 1}]),
    ("name", "a/b"),
    ("name", ".."),
    ("name", ""),
    ("extra", 1),
    ("model.extra", 1),
    ("image", ...),
]


@pytest.mark.parametrize(("key", "value"), REFUSED, ids=lambda v: str(v)[:20])
def test_refused(key: str, value: Any) -> None:
    with pytest.raises(InputError) as error:
        from_tree(changed(key, value))
    (line,) = str(error.value).splitlines()
    assert line.startswith(key)


@pytest.mark.parametrize("tree", [None, [], 5, "x"])
def test_not_a_tree(tree: Any) -> None:
    with pytest.raises(InputError, match=r"^the recipe is .* and must be a mapping of keys to values$"):
        from_tree(tree)


def test_limits_are_inclusive_or_not() -> None:
    from_tree(changed("data.seed", 2**32 - 1))
    from_tree(changed("trainer.seed", INT64_MAX))
    from_tree(changed("optim.beta1", 0))
    from_tree(changed("optim.clip_grad", 0))


def test_show_value() -> None:
    assert [show_value(v) for v in (None, True, "a\n", 1.5, 2**200)] == [
        "null",
        "true",
        '"a\\n"',
        "1.5",
        "an integer of 201 bits",
    ]
    assert len(show_value("x" * 1000)) <= 80

"""Hostile recipes: refused in one line, and nothing happens."""
# ruff: noqa: E501  (messages are held word for word)

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apertus_nemo.cli.main import main
from apertus_nemo.errors import InputError
from apertus_nemo.recipe import text
from apertus_nemo.recipe.compose import compose

HEAD = "# @package _global_\n"
BASE = HEAD + "defaults:\n  - tiny_pretrain\n  - _self_\n"


def refuse(
    folder: Path, content: bytes | str, *, name: str = "recipe/bad.yaml", overrides: tuple[str, ...] = ()
) -> str:
    """The message for a recipe file."""
    path = folder / "own" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as error:
        compose("bad" if name.startswith("recipe/") else "tiny_pretrain", overrides, recipe_dirs=[Path("own")])
    return str(error.value)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


FILES: dict[str, tuple[bytes | str, str]] = {
    "not UTF-8": (b"name: \xff", "own/recipe/bad.yaml is not UTF-8 text: byte 6 is 0xff"),
    "UTF-16": ("name: a".encode("utf-16"), "own/recipe/bad.yaml is not UTF-8 text: byte 0 is 0xff"),
    "NUL": (
        BASE + "name: a\0b",
        "own/recipe/bad.yaml is not YAML: unacceptable character #x0000: special characters are not allowed",
    ),
    "callable": (
        BASE + "model:\n  _target_: os.system\n",
        "own/recipe/bad.yaml, line 6: _target_ is refused; a recipe names nothing to call",
    ),
    "callable in a list": (
        BASE + "x: [{a: 1}, {_call_: os.system}]\n",
        "own/recipe/bad.yaml, line 5: _call_ is refused; a recipe names nothing to call",
    ),
    "callable, quoted": (
        BASE + '"\\x5ftarget_": os.system\n',
        "own/recipe/bad.yaml, line 5: _target_ is refused; a recipe names nothing to call",
    ),
    "Python tag": (
        BASE + "name: !!python/object/apply:os.system [touch pwned]\n",
        "own/recipe/bad.yaml, line 5: the YAML tag 'tag:yaml.org,2002:python/object/apply:os.system' is refused; a recipe holds plain values only",
    ),
    "own tag": (
        BASE + "name: !x a\n",
        "own/recipe/bad.yaml, line 5: the YAML tag '!x' is refused; a recipe holds plain values only",
    ),
    "billion laughs": (
        BASE + "a: &a [x, x]\nb: [*a, *a]\n",
        "own/recipe/bad.yaml, line 5: anchors and aliases are refused; write the value out, or refer to it: ${key}",
    ),
    "itself": (
        BASE + "a: &a\n  b: *a\n",
        "own/recipe/bad.yaml, line 5: anchors and aliases are refused; write the value out, or refer to it: ${key}",
    ),
    "nesting": (
        BASE + "a: " + "[" * 100_000 + "]" * 100_000,
        "own/recipe/bad.yaml, line 5: nested deeper than 16 levels, which no recipe needs",
    ),
    "block nesting": (
        BASE + "".join("  " * i + f"k{i}:\n" for i in range(300)),
        "own/recipe/bad.yaml, line 21: nested deeper than 16 levels, which no recipe needs",
    ),
    "size": (BASE + "#" * (1 << 20), "own/recipe/bad.yaml is larger than 1048576 bytes, which no recipe needs"),
    "duplicate key": (
        BASE + "name: a\nname: b\n",
        "own/recipe/bad.yaml, line 6: while constructing a mapping, found duplicate key name",
    ),
    "not a mapping": (HEAD + "- 1\n", "own/recipe/bad.yaml must be a mapping of keys to values"),
    "two documents": (
        BASE + "---\nname: b\n",
        "own/recipe/bad.yaml, line 5: expected a single document in the stream, but found another document",
    ),
    "Hydra": (
        HEAD + "hydra:\n  searchpath: [pkg://os]\n",
        "own/recipe/bad.yaml, line 2: a recipe does not configure Hydra itself; remove the key hydra",
    ),
    "no header": ("name: a\n", "own/recipe/bad.yaml is a recipe, so its first line must be: # @package _global_"),
    "includes itself": (HEAD + "defaults:\n  - bad\n", "the defaults lists of the recipes form a circle"),
    "unknown file": (
        HEAD + "defaults:\n  - /model: huge\n",
        "recipe/bad.yaml: model=huge does not exist (there are: apertus_70b, apertus_8b, tiny)",
    ),
    "unknown key": (
        BASE + "model:\n  layers: 3\n",
        "model.layers (own/recipe/bad.yaml) is not a key of a recipe; did you mean model.num_layers?",
    ),
    "wrong value": (
        BASE + "trainer: {devices: .nan}\n",
        "trainer.devices is nan (own/recipe/bad.yaml); it must be an integer of at least 1 and at most 1048576: it counts ranks",
    ),
    "section that is none": (
        BASE + "trainer: 5\n",
        "trainer is 5 (own/recipe/bad.yaml) and must be a mapping of keys to values",
    ),
    "circle": (
        BASE + "optim:\n  lr: ${optim.min_lr}\n  min_lr: ${optim.lr}\n",
        "optim.lr refers to itself: the ${...} of the recipe form a circle",
    ),
    "huge integer": (
        BASE + "trainer: {seed: " + "9" * 4000 + "}\n",
        "trainer.seed is an integer of 13288 bits (own/recipe/bad.yaml); it must be an integer of at least 0 and at most 9223372036854775807: generators take a seed of 63 bits",
    ),
    "integer that Python refuses": (
        BASE + "trainer: {seed: " + "9" * 5000 + "}\n",
        "own/recipe/bad.yaml: an integer of thousands of digits, which no recipe needs",
    ),
    "control character": (
        BASE + 'image: {reference: "a\\x1b[2J"}\n',
        'image.reference is "a\\x1b[2J" (own/recipe/bad.yaml); it must be text or null: it names an image',
    ),
    "environment": (
        BASE + "image: {reference: '${oc.env:HOME}'}\n",
        "image.reference: Unsupported interpolation type oc.env; a recipe may use oc.create, oc.decode, oc.dict.keys, oc.dict.values, oc.select and references to its own keys",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_file(case: str, tmp_path: Path) -> None:
    content, message = FILES[case]
    assert refuse(tmp_path, content) == message
    assert os.listdir(tmp_path) == ["own"]  # nothing ran


@pytest.mark.parametrize(
    "case", ["circle", "includes itself", "huge integer", "integer that Python refuses", "wrong value", "nesting"]
)
def test_the_command_says_it_in_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = FILES[case]
    refuse(tmp_path, content)
    for verb in ("show", "plan", "train"):
        assert main([verb, "--recipes", "own", "recipe=bad"]) == 2
        assert capsys.readouterr() == ("", f"apertus-nemo: {message}\n")
    assert os.listdir(tmp_path) == ["own"]


def test_refused_even_where_it_is_overridden(tmp_path: Path) -> None:
    message = refuse(tmp_path, BASE + "name: a\nmodel: {_target_: x}\n", overrides=("~model._target_",))
    assert "_target_ would call something" in message
    assert "nothing to call" in refuse(tmp_path, "_args_: []\n", name="model/tiny.yaml", overrides=("model={}",))


def test_hydra_package(tmp_path: Path) -> None:
    message = refuse(tmp_path, "# @package hydra.job\nenv_copy: [HOME]\n", name="model/tiny.yaml")
    assert message == "own/model/tiny.yaml: a recipe does not configure Hydra itself; remove the package hydra.job"


def test_what_is_no_file(tmp_path: Path) -> None:
    """A folder, a FIFO (which would block for ever), and a link to nothing are not recipes."""
    folder = tmp_path / "own" / "recipe"
    (folder / "folder.yaml").mkdir(parents=True)
    os.mkfifo(folder / "fifo.yaml")
    (folder / "loop.yaml").symlink_to("loop.yaml")
    for name in ("folder", "fifo", "loop", "x" * 5000):
        with pytest.raises(InputError, match=r"does not exist"):
            compose(name, recipe_dirs=[Path("own")])


def test_folders_of_recipes() -> None:
    Path("empty").mkdir()
    with pytest.raises(InputError) as error:
        compose(recipe_dirs=[Path("nothing")])
    assert str(error.value) == "--recipes nothing is not a folder; it must be laid out like recipes/"
    with pytest.raises(InputError) as error:
        compose(recipe_dirs=[Path("empty")])
    assert str(error.value) == (
        "--recipes empty would give nothing: it holds none of the folders adapter, cluster, data, image, model, optim, parallel, recipe, reproducibility, schedule, trainer"
    )


@pytest.mark.parametrize(
    "override",
    [
        "x=" + "[" * 500,
        "optim=" + "{a:" * 200 + "1" + "}" * 200,
        "name=" + "${" * 200,
        "trainer.seed=" + "9" * 5000,
        "trainer.seed=-" + "9" * 4000,
        "optim.lr=\udcff",
        "\udcff=1",
        "name=a\nb",
        "optim.lr=" + "int(" * 200,
        "data.path=" + "a" * 100_000,
        "\0=1",
        "recipe=\0",
    ],
    ids=range(12),
)
def test_override(override: str) -> None:
    with pytest.raises(InputError) as error:
        compose(overrides=[override])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


KEYS = st.sampled_from(
    ["defaults", "model", "optim", "lr", "name", "hydra", "_target_", "a.b", "", "0", "override /model"]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from(["tiny", "_self_", "${optim.lr}", "${oc.env:HOME}", "???", "${", "a@b", "/model", "bad"]),
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=8,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=st.dictionaries(KEYS, TREES, max_size=4))
def test_any_tree(tree: dict[str, object]) -> None:
    """Whatever a recipe holds: a RunConfig or an InputError."""
    import yaml

    path = Path("own/recipe/bad.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEAD + yaml.safe_dump({"defaults": ["tiny_pretrain", "_self_"], **tree}))
    try:
        compose("bad", recipe_dirs=[Path("own")])
    except InputError as error:
        message = str(error)
    else:
        message = "composed"
    assert message.strip()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=60) | st.text(alphabet="ab: -[]{}&*!|>%@`'\"#\n\t,?", max_size=60).map(str.encode))
def test_any_bytes(data: bytes) -> None:
    path = Path("any.yaml")
    path.write_bytes(data)
    try:
        text.read_recipe(path, "any.yaml")
    except InputError as error:
        message = str(error)
    else:
        message = "any.yaml is read"
    assert message.startswith("any.yaml")

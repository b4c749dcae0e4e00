"""Lines of keys, held against `tomllib`: what stands on a line alone parses to the key that was located there."""

from __future__ import annotations

import random
import tomllib
from typing import Any

import pytest

from apertus_nemo.edf.positions import TooComplex, locate


def paths(tree: Any, prefix: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    """All paths in a parsed file."""
    found = set()
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found |= {(*prefix, key)} | paths(value, (*prefix, key))
    return found


TEXT = '''# a comment with [brackets] and = signs
image = "a # b" # c
mounts = [ # one
  "/a:/a",   "/b:/b",

  # "/c:/c"
  '/d:/d',
]
annotations.com.hooks.cxi.enabled = 'true'

[env]
A."b.c" = """
[env2]
x = 1
"""
D = \'\'\'it's\'\'\'\'
E = { f = [1, { g = "}" }], h = 2026-11-25 10:00:00 }
"quo\\u0074ed" = "\\""

[[array]]
x = 1
[[array]]
x = 2
[array.sub]
y = 3
'''


def test_lines() -> None:
    lines = locate(TEXT).lines
    assert set(lines) == paths(tomllib.loads(TEXT))
    expected = {
        ("image",): 2,
        ("mounts",): 3,
        ("mounts", 0): 4,
        ("mounts", 1): 4,
        ("mounts", 2): 7,
        ("annotations", "com", "hooks", "cxi", "enabled"): 9,
        ("env",): 11,
        ("env", "A", "b.c"): 12,
        ("env", "D"): 16,
        ("env", "E", "f", 1, "g"): 17,
        ("env", "quoted"): 18,
        ("array", 0, "x"): 21,
        ("array", 1, "sub", "y"): 25,
    }
    assert {path: lines[path] for path in expected} == expected
    assert locate(TEXT.replace("\n", "\r\n")).lines == lines


def test_what_is_defined_twice() -> None:
    found = locate("[a]\nx = 1\n[b]\n[a]\n")
    assert found.again == [(("a",), 4)]
    assert found.lines[("a",)] == 1


@pytest.mark.parametrize("text", ["a" + ".a" * 40 + " = 1", "x = " + "[" * 100000, "x = " + "{a = [" * 200])
def test_what_no_edf_needs(text: str) -> None:
    with pytest.raises(TooComplex):
        locate(text)


def generated(rng: random.Random) -> str:
    """A random TOML text."""
    words = ["a", "b-c", '"d.e"', "'f g'", '"\\u00e9"', "1", "com"]
    values = [
        '"x"',
        "'y # z'",
        "1",
        "true",
        "[]",
        "[\"a\", 'b']",
        '[\n  "a", # c\n  [1,2],\n]',
        "{ k = 1 }",
        '"""m\nn"""',
        "1.5",
    ]
    lines = []
    for number in range(rng.randrange(1, 12)):
        if rng.random() < 0.2:
            lines.append(f"[t{number}.{rng.choice(words)}]" if rng.random() < 0.7 else "[[list]]")
        else:
            key = ".".join([f"k{number}", *rng.choices(words, k=rng.randrange(3))])
            lines.append(f"{' ' * rng.randrange(3)}{key} = {rng.choice(values)}{rng.choice(['', '  # note'])}")
    return "\n".join(lines)


def test_random_files_have_the_keys_that_tomllib_finds() -> None:
    rng = random.Random(7)
    for _ in range(1500):
        text = generated(rng)
        assert set(locate(text).lines) == paths(tomllib.loads(text)), text

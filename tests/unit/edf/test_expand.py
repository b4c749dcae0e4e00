"""Variables: production by its reference, Sarus Suite against a real bash."""

from __future__ import annotations

import random
import subprocess

import pytest

from apertus_nemo.edf.dialects import CE, SARUS
from apertus_nemo.edf.expand import expand

HOST = {"A": "one", "B_2": "/two/x", "EMPTY": ""}


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("${A}/x", "one/x"),
        ("$A/x", "$A/x"),
        ("$${A}", "${A}"),
        ("${EMPTY:-}", ""),
        ("${NONE:-}", ""),
        ("a${B_2}b${A}", "a/two/xbone"),
        ("5$ and $", "5$ and $"),
        ("${NONE}", "${NONE}"),
        ("$$", "$$"),
    ],
)
def test_production(text: str, result: str) -> None:
    assert expand(text, HOST, CE).text == result


def test_what_is_told() -> None:
    done = expand("${A}${NONE}$B_2${A:-x}${bad!}", HOST, CE)
    assert (done.names, done.missing, done.unbraced, done.odd) == (
        ("A", "NONE", "A"),
        ("NONE",),
        ("B_2",),
        ("${A:-x}", "${bad!}"),
    )
    assert expand("x $(ls)", HOST, CE).command
    assert expand('a "b', HOST, SARUS).refused == '"'


def bash(text: str) -> str:
    """As raster asks bash (src/common.rs), but without `set -u`: undefined variables are told, not tried, by us."""
    script = f'echo -n "{text}"'
    done = subprocess.run(["bash", "-r", "-c", script], env=HOST, capture_output=True, text=True, timeout=20)
    return done.stdout


def test_sarus_suite_against_bash() -> None:
    rng = random.Random(3)
    pieces = [
        "$A",
        "${A}",
        "${B_2}",
        "/",
        "x",
        ":",
        "${NONE:-d}",
        "${EMPTY:-e}",
        "${EMPTY-f}",
        "${A-g}",
        "\\$A",
        "$ ",
        "%",
        "é",
        "'",
    ]
    for _ in range(60):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 8)))
        done = expand(text, HOST, SARUS)
        assert not done.missing
        assert not done.odd
        assert done.text == bash(text), text

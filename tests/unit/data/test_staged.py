"""Samples of a run with stages: Megatron's own blend, and where each sample of any number comes from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.data import manifest as manifests
from apertus_nemo.testing.ranks import Parent

NAMES = ("one", "two/inner")
WEIGHTS = {"a": (0.7, 0.3), "b": (1.0, 3.0), "c": (0.25, 0.75), "d": None}
FIRST = {"a": 0, "b": 24, "c": 64, "d": 104}
TOTAL = 144
LENGTH = {"a": 64, "b": 64, "c": 32, "d": 48}
SEED = {"a": 28, "b": 28, "c": 5, "d": 6}


def mixture(name: str) -> list[dict[str, Any]]:
    weights = WEIGHTS[name]
    return [{"source": s} if weights is None else {"source": s, "weight": weights[i]} for i, s in enumerate(NAMES)]


STAGES: list[dict[str, Any]] = [
    {"name": "a", "from_sample": 0, "mixture": mixture("a")},
    {"name": "b", "from_sample": 24, "position": "continue", "mixture": mixture("b")},
    {"name": "c", "from_sample": 64, "seed": 5, "seq_length": 32, "mixture": mixture("c")},
    {"name": "d", "from_sample": 104, "seed": 6, "seq_length": 48, "mixture": mixture("d")},
]
CHANGES = {"source": "built", "path": "/of/the/recipe", "train_samples": TOTAL, "goldfish": False}


def staged(parent: Parent, folder: Path, cache: Path, world_size: int = 1, stages: Any = None) -> list[list[Any]]:
    arguments = {
        "corpus": str(folder),
        "cache": str(cache),
        "stages": STAGES if stages is None else stages,
        "changes": CHANGES,
    }
    results = parent.run("tests.cases.data:staged", world_size=world_size, arguments=arguments)
    assert all(result == results[0] for result in results)
    assert results[0]["length"] == TOTAL
    return list(results[0]["rows"])


def greedy(weights: tuple[float, ...], samples: int) -> list[tuple[int, int]]:
    """Each sample to the source that is furthest behind its share; the first one where several are."""
    total, drawn, rows = sum(weights), [0] * len(weights), []
    for sample in range(samples):
        behind = [weight / total * max(sample, 1) - count for weight, count in zip(weights, drawn, strict=True)]
        source = behind.index(max(behind))
        rows.append((source, drawn[source]))
        drawn[source] += 1
    return rows


@pytest.fixture
def rows(parent: Parent, mixed_corpora: Path, tmp_path: Path) -> list[list[Any]]:
    return staged(parent, mixed_corpora, tmp_path / "cache")


def test_every_sample_is_where_a_walk_from_the_start_finds_it(rows: list[list[Any]], mixed_corpora: Path) -> None:
    """Against a walk in Python; stage b goes on in each source, c and d start anew, d weighs by size."""
    used = [0, 0]
    for name, end in zip("abcd", (24, 64, 104, TOTAL), strict=True):
        weights = WEIGHTS[name]
        if weights is None:
            tokens = [manifests.load(mixed_corpora / source).tokens for source in NAMES]
            weights = (float((tokens[0] - 1) // 48), float((tokens[1] - 1) // 48))
        if name in "cd":
            used = [0, 0]
        walk = greedy(weights, end - FIRST[name])
        expected = [[name, NAMES[s], used[s] + number, [LENGTH[name]]] for s, number in walk]
        assert [row[:4] for row in rows[FIRST[name] : end]] == expected, name
        used = [used[s] + sum(source == s for source, _ in walk) for s in (0, 1)]
    assert len({(row[1], row[2]) for row in rows[:64]}) == 64  # nothing is read twice while the order goes on


@pytest.mark.parametrize("name", ["a", "c"])
def test_a_stage_is_megatrons_blended_dataset(
    parent: Parent, rows: list[list[Any]], mixed_corpora: Path, tmp_path: Path, name: str
) -> None:
    """Tokens, source and number of each sample, from BlendedDataset over GPTDatasets of as many samples."""
    samples = {"a": 24, "c": 40}[name]
    inside = rows[FIRST[name] : FIRST[name] + samples]
    chain = rows[:64] if name == "a" else inside  # the samples that the order of the stage must have
    arguments = {
        "corpora": [str(mixed_corpora / source) for source in NAMES],
        "cache": str(tmp_path / "megatron"),
        "weights": list(WEIGHTS[name] or ()),
        "seed": SEED[name],
        "seq_length": LENGTH[name],
        "samples": samples,
        "sizes": [sum(row[1] == source for row in chain) for source in NAMES],
    }
    [theirs] = parent.run("tests.cases.data:blended", arguments=arguments)
    assert [[NAMES[source], number, tokens] for source, number, tokens in theirs] == [
        [row[1], row[2], row[5]] for row in inside
    ]


def test_place_cache_and_ranks_change_nothing_and_choices_do(
    parent: Parent, rows: list[list[Any]], mixed_corpora: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tmp_path = tmp_path_factory.mktemp("elsewhere")
    moved = Path(shutil.copytree(mixed_corpora, tmp_path / "moved"))
    shutil.rmtree(mixed_corpora / "one")
    assert staged(parent, moved, tmp_path / "cache", world_size=2) == rows
    other = [{**STAGES[0], "mixture": [{"source": "one", "weight": 0.6}, {"source": "two/inner", "weight": 0.4}]}]
    assert staged(parent, moved, tmp_path / "new", stages=[*other, *STAGES[1:]]) != rows


def test_runs_that_want_one_index_at_once_make_it_once(
    parent: Parent, rows: list[list[Any]], mixed_corpora: Path, tmp_path: Path
) -> None:
    """Four processes that know nothing of each other; the index is there before, damaged, or not at all."""
    for round_ in range(2):
        assert staged(parent, mixed_corpora, tmp_path / "new", world_size=4) == rows
        [folder] = (tmp_path / "new").iterdir()
        (folder / "SHA256SUMS").write_text(f"of round {round_}\n")


def test_a_damaged_blend_is_made_again(
    parent: Parent, rows: list[list[Any]], mixed_corpora: Path, tmp_path: Path
) -> None:
    [folder] = (tmp_path / "cache").iterdir()
    assert len(list(folder.glob("stage-*.npy"))) == 8
    path = folder / "stage-002-source.npy"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    assert staged(parent, mixed_corpora, tmp_path / "cache") == rows
    assert path.read_bytes() != data

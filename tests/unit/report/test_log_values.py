"""The quick reader of a log, against the strict one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.record.canonical import unknown
from apertus_nemo.record.step_log import StepLogHeader, StepLogWriter, StepRecord, read_steps
from apertus_nemo.report.log_values import NAMES, read_log
from tests.unit.record.example import step


def write(folder: Path, records: list[StepRecord]) -> Path:
    with StepLogWriter.open(folder, StepLogHeader("a" * 64, "1" * 32, unknown("an example"))) as log:
        for record in records:
            log.append(record)
    return folder


def values(folder: Path, **options: Any) -> dict[str, dict[int, float]]:
    read = read_log(folder, **options)
    return {name: dict(zip(*read.curves[name].points(), strict=True)) for name in NAMES}


ODD: dict[int, dict[str, Any]] = {
    3: {"loss": math.nan},
    4: {"grad_norm": math.inf},
    5: {"loss": None, "grad_norm": None},
    6: {"loss": 5e-324},  # subnormal, and with four digits in its exponent
    7: {"loss": -0.0, "learning_rate": 0.0},
    8: {"consumed_tokens": None},
}


@pytest.mark.parametrize("odd", [{}, ODD])
def test_the_values_are_those_of_the_strict_reader(tmp_path: Path, odd: dict[int, dict[str, Any]]) -> None:
    records = [StepRecord(step=0, state_digest="b" * 64)]
    records += [replace(step(number), **odd.get(number, {})) for number in range(1, 500)]
    folder = write(tmp_path / "steps", records)
    strict = list(read_steps(folder))
    for name in NAMES:
        expected = {r.step: v for r in strict if (v := getattr(r, name)) is not None and math.isfinite(v)}
        assert values(folder)[name] == expected
    read = read_log(folder)
    assert (read.last_step, read.tokens, read.ended) == (499, 256 * 499, None)
    assert read.header is not None
    assert read.header.run_id == "1" * 32
    assert read.curves["loss"].not_finite == (1 if odd else 0)


def test_a_part_of_the_steps(tmp_path: Path) -> None:
    folder = write(tmp_path / "steps", [step(number) for number in range(1, 50)])
    assert list(values(folder, first=10, last=20)["loss"]) == list(range(10, 21))
    assert list(values(folder, first=45)["loss"]) == list(range(45, 50))
    assert values(folder, first=60)["loss"] == {}
    assert read_log(folder, first=10, last=20).last_step == 49


def test_a_log_that_is_broken_is_read_up_to_there(tmp_path: Path) -> None:
    folder = write(tmp_path / "steps", [step(number) for number in range(1, 50)])
    file = folder / "000000.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:20], b"\x1b[31m{}\n", *lines[21:]]))
    read = read_log(folder)
    assert read.last_step == 19
    assert read.ended is not None
    assert read.ended.startswith("000000.jsonl: is not a line of a step log: ")
    assert read.ended.isprintable()
    file.write_bytes(b"".join([*lines[:20], *lines[22:]]))
    read = read_log(folder)
    assert (read.last_step, read.ended) == (19, "000000.jsonl: step 22 follows step 19")
    file.write_bytes(b"".join(lines)[:-9])
    assert read_log(folder).ended == "000000.jsonl: the last line is torn"
    file.write_bytes(b"".join(lines) + b"x" * 5000)
    assert read_log(folder).ended == "000000.jsonl: a line is longer than 4096 bytes"
    file.rename(folder / "000001.jsonl")
    assert read_log(folder).ended == "000000.jsonl is missing"
    assert read_log(tmp_path / "nothing").last_step is None


def test_a_log_in_several_segments(tmp_path: Path) -> None:
    folder = tmp_path / "steps"
    header = StepLogHeader("a" * 64, "1" * 32, unknown("an example"))
    with StepLogWriter.open(folder, header, segment_lines=8) as log:
        for number in range(1, 30):
            log.append(step(number))
    assert list(values(folder)["loss"]) == list(range(1, 30))


def test_links_and_pipes_are_not_followed(tmp_path: Path) -> None:
    folder = write(tmp_path / "real", [step(1)])
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "000000.jsonl").symlink_to(folder / "000000.jsonl")
    read = read_log(tmp_path / "steps")
    assert (read.last_step, read.ended) == (None, "Too many levels of symbolic links")

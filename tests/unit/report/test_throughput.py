"""Throughput out of TensorBoard's files, against TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from apertus_nemo.report.throughput import Spell, read_throughput
from tests.unit.report.records import T0, events


def test_what_tensorboard_reads(tmp_path: Path) -> None:
    events(tmp_path, 0, range(1, 14))
    events(tmp_path, 1, range(9, 21), speed=500.0, began_s=T0 + 100)
    theirs = EventAccumulator(str(tmp_path / "logs" / "tensorboard"), size_guidance={"scalars": 0})
    theirs.Reload()
    last = {item.step: item.value for item in theirs.Scalars("tokens_per_second")}  # the later attempt's count
    found = read_throughput(tmp_path)
    assert dict(zip(*found.curve.points(), strict=True)) == last
    assert last[8] == 108.0
    assert last[9] == 509.0
    assert found.spells == {0: Spell(T0, T0 + 13, 1, 13), 1: Spell(T0 + 100, T0 + 112, 9, 20)}
    assert found.notes == []


def test_a_part_of_the_steps(tmp_path: Path) -> None:
    events(tmp_path, 0, range(1, 14))
    assert read_throughput(tmp_path, first=3, last=5).curve.points() == ([3, 4, 5], [103.0, 104.0, 105.0])


def test_nothing_there(tmp_path: Path) -> None:
    found = read_throughput(tmp_path)
    assert (found.curve.count, found.spells, found.notes) == (0, {}, [])


def test_a_file_that_is_cut_off_or_no_such_file(tmp_path: Path) -> None:
    path = events(tmp_path, 0, range(1, 14))
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])  # a crash
    assert read_throughput(tmp_path).curve.last == (12, 112.0)
    for data in (b"\xff" * 4000, whole[:200] + b"\xff" * 4000, b"\x04" + b"\0" * 11 + b"\xff" * 100, b"short"):
        path.write_bytes(data)
        assert read_throughput(tmp_path).notes == [f"logs/tensorboard/{path.name} could not be read to its end"]
    path.unlink()
    path.symlink_to("/dev/zero")
    assert read_throughput(tmp_path).curve.count == 0

"""`trainer.max_time`: what it may be, and that a lock does not hold it."""

from __future__ import annotations

import datetime

import pytest

from apertus_nemo.errors import InputError
from apertus_nemo.launch.time_limit import TimeLimit, last_time_limit, time_limit_of, write_start
from apertus_nemo.recipe.compose import compose
from apertus_nemo.recipe.time_limit import time_limit_s, without_time_limit
from apertus_nemo.record.lock import build_lock
from apertus_nemo.record.run_dir import RunDirectory
from tests.unit.record.example import SURROUNDINGS


@pytest.mark.parametrize("text", ["00:03:55:00", "00:00:00:01", "07:00:00:00", "10:23:59:59", "100:00:00:00"])
def test_seconds(text: str) -> None:
    days, hours, minutes, seconds = map(int, text.split(":"))
    duration = datetime.timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    assert time_limit_s(text) == duration.total_seconds()
    assert compose("tiny_pretrain", [f"trainer.max_time={text}"]).config.trainer.max_time == text
    assert time_limit_of([f"++trainer.max_time={text}"]) == text


@pytest.mark.parametrize(
    "value", ["00:00:00:00", "00:24:00:00", "00:00:60:00", "00:00:00:60", "03:55:00", "1:00:00:00", "-1:00:00:00"]
)
def test_what_is_none(value: str) -> None:
    assert time_limit_s(value) is None
    demand = (
        'it must be text or null: it is days, hours, minutes and seconds, as "00:03:55:00", and more than none; '
        "in YAML, in quotes"
    )
    with pytest.raises(InputError) as caught:
        compose("tiny_pretrain", [f"trainer.max_time='{value}'"])
    assert str(caught.value) == (f"trainer.max_time is \"{value}\" (override trainer.max_time='{value}'); {demand}")
    with pytest.raises(InputError) as caught:
        time_limit_of([f"trainer.max_time='{value}'"])
    assert str(caught.value) == f'trainer.max_time is "{value}"; {demand}'


def test_it_is_no_part_of_the_lock() -> None:
    def lock(*overrides: str) -> bytes:
        resolved = compose("tiny_pretrain", ["optim.lr=1e-3", *overrides])
        found = build_lock(
            resolved.config, overrides=resolved.overrides, environment={}, data=None, surroundings=SURROUNDINGS
        )
        return found.to_bytes()

    assert b'"max_time":null' in lock()
    for override in ("trainer.max_time=00:00:10:00", "++trainer.max_time=00:00:10:00", "trainer.max_time=null"):
        assert lock(override) == lock()
    assert lock("trainer.max_steps=3") != lock()
    assert without_time_limit(["trainer.max_times=1", "~trainer.max_time"]) == ["trainer.max_times=1"]


def test_a_start_notes_its_own(tmp_path: object) -> None:
    run = RunDirectory(tmp_path)  # type: ignore[arg-type]
    assert last_time_limit(run) is None
    for limit in ("00:00:10:00", None, "00:00:20:00"):
        write_start(run, attempt=run.new_attempt(), checkpoint_step=None, max_time=limit)
        assert last_time_limit(run) == limit
    assert time_limit_of(["trainer.max_time=00:00:10:00", "trainer.max_time=null"]) is None
    assert TimeLimit("00:00:00:10", 5.0).left_s(17.0) == -2.0
    assert TimeLimit(None, 5.0).left_s(17.0) is None

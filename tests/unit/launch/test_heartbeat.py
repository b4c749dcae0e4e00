"""Silence is measured by the beats of real memory, and the rank that hangs is told from those that wait for it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from apertus_nemo.launch.heartbeat import ALLOWANCE, Beat, Board, Hang, Watch, examine
from apertus_nemo.training.heartbeat import BUILDING, ENDING, FIRST_STEP, SAVING, STARTING, STEP, Heart

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def board() -> Iterator[Board]:
    """Memory for two ranks."""
    board = Board(2)
    yield board
    board.close()


def heart(board: Board, rank: int) -> Heart:
    return Heart.from_environment({"APERTUS_HEARTBEAT_FD": str(os.dup(board.descriptor)), "LOCAL_RANK": str(rank)})


def test_a_beat_is_seen_in_its_slot(board: Board) -> None:
    assert board.read(0) == Beat(0, None, STARTING)
    second = heart(board, 1)
    second.beat(STARTING)
    assert board.read(1) == Beat(1, None, STARTING)
    second.beat(STEP, 7)
    second.beat()
    assert (board.read(0), board.read(1)) == (Beat(0, None, STARTING), Beat(3, 7, STEP))
    Heart().beat(STEP, 1)  # nobody listens
    Heart.from_environment({}).beat()


@pytest.mark.parametrize(
    ("beat", "place"),
    [
        (Beat(1, None, STARTING), "while starting"),
        (Beat(2, None, BUILDING), "while building model and data"),
        (Beat(3, 0, SAVING), "while digesting the initial state"),
        (Beat(3, 1, FIRST_STEP), "in step 1"),
        (Beat(9, 7, STEP), "in step 7"),
        (Beat(9, 7, SAVING), "while saving step 7"),
        (Beat(9, 7, ENDING), "at the end"),
    ],
)
def test_places(beat: Beat, place: str) -> None:
    assert beat.place == place


def pass_time(watch: Watch, start: int, stop: int, alive: tuple[int, ...] = (0, 1)) -> float | None:
    """Look every second; the first answer."""
    return next((quiet for now in range(start, stop) if (quiet := watch.quiet(now, alive)) is not None), None)


def test_a_run_is_quiet_when_no_rank_beats(board: Board) -> None:
    ranks = [heart(board, 0), heart(board, 1)]
    watch = Watch(board, timeout_s=10, now=0)
    for rank in ranks:
        rank.beat(STEP, 2)
    assert pass_time(watch, 1, 3) is None
    ranks[0].beat()
    assert pass_time(watch, 3, 14) is None, "one rank went on at 3"
    assert watch.quiet(14, (0, 1)) == 11
    assert watch.quiet(14, ()) is None, "all have ended"
    ranks[1].beat()
    assert watch.quiet(15, (0, 1)) is None


@pytest.mark.parametrize("phase", [STARTING, BUILDING, FIRST_STEP, SAVING, ENDING])
def test_what_takes_longer_may(board: Board, phase: int) -> None:
    first, second = heart(board, 0), heart(board, 1)
    watch = Watch(board, timeout_s=10, now=0)
    first.beat(phase, 2)
    second.beat(STEP, 2)
    assert watch.quiet(0, (0, 1)) is None
    assert pass_time(watch, 1, int(10 * ALLOWANCE) + 1) is None
    assert watch.quiet(10 * ALLOWANCE + 1, (0, 1)) == 10 * ALLOWANCE + 1


def test_slow_steps_are_no_hang(board: Board) -> None:
    """Once a step has taken 9 s of a timeout of 10, another may take 36."""
    only = heart(board, 0)
    watch = Watch(board, timeout_s=10, now=0)
    only.beat(STEP, 2)
    assert watch.quiet(0, [0]) is None
    assert pass_time(watch, 1, 9, (0,)) is None
    only.beat(STEP, 3)
    assert pass_time(watch, 9, 46, (0,)) is None
    assert watch.quiet(46, [0]) == 37


def test_no_timeout_and_a_launcher_that_slept(board: Board) -> None:
    heart(board, 0).beat(STEP, 2)
    never = Watch(board, timeout_s=0, now=0)
    assert pass_time(never, 0, 10_000, (0,)) is None
    watch = Watch(board, timeout_s=10, now=0)
    assert pass_time(watch, 0, 3, (0,)) is None
    assert watch.quiet(5000, [0]) is None, "what nobody looked at was no silence"
    assert pass_time(watch, 5001, 5011, (0,)) is None
    assert watch.quiet(5011, [0]) == 11


RANK = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
from apertus_nemo.training.heartbeat import Heart
Heart.listen()
def asleep():
    time.sleep(1000)
def reading():
    threading.Event().wait(1000)
threading.Thread(target=reading, daemon=True).start()
what = sys.argv[2]
if what == "waits":
    code = compile("def all_reduce():\\n    time.sleep(1000)\\n", "/x/torch/distributed/distributed_c10d.py", "exec")
    exec(code)
    print("ready", flush=True)
    all_reduce()
elif what == "computes":
    print("ready", flush=True)
    while True: pass
else:
    print("ready", flush=True)
    asleep()
"""


@contextmanager
def rank(folder: Path, number: int, what: str) -> Iterator[tuple[int, Path]]:
    """A process that stands where it stands, and its log."""
    log = folder / f"rank-{number}.log"
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-c", RANK, str(ROOT), what], stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 30
        while "ready" not in log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if what == "stopped":
            os.kill(process.pid, signal.SIGSTOP)
            while Path(f"/proc/{process.pid}/stat").read_text().split()[2] != "T":
                assert time.monotonic() < deadline
        yield process.pid, log
    finally:
        process.kill()
        process.wait()


def found(board: Board, folder: Path, *what: str) -> Hang:
    with ExitStack() as stack:
        ranks = [stack.enter_context(rank(folder, number, each)) for number, each in enumerate(what)]
        return examine(board, [pid for pid, _ in ranks], [log for _, log in ranks], alive=range(len(ranks)))


def test_the_one_that_waits_for_nobody(board: Board, tmp_path: Path) -> None:
    for number in (0, 1):
        heart(board, number).beat(STEP, 7)
    hang = found(board, tmp_path, "waits", "sleeps")
    assert (hang.rank, hang.place) == (1, "in step 7")
    assert re.fullmatch(r"it is in asleep \(<string> line [0-9]+\)", hang.where)
    stacks = [(tmp_path / f"rank-{number}.log").read_text() for number in (0, 1)]
    assert [" in all_reduce\n" in text for text in stacks] == [True, False]
    assert all(" in reading\n" in text for text in stacks), "every thread, not only the one that trains"


def test_the_one_that_is_stopped(board: Board, tmp_path: Path) -> None:
    hang = found(board, tmp_path, "computes", "stopped")
    assert hang == Hang(1, "while starting", "its process is stopped, so its stack cannot be had")
    assert "most recent call first" in (tmp_path / "rank-0.log").read_text()


def test_of_two_that_wait_the_one_that_came_least_far(board: Board, tmp_path: Path) -> None:
    first, second = heart(board, 0), heart(board, 1)
    first.beat(STEP, 3)
    first.beat()
    second.beat(STEP, 3)
    hang = found(board, tmp_path, "waits", "waits")
    assert hang == Hang(1, "in step 3", "it is in all_reduce (distributed_c10d.py line 2), waiting for other ranks")

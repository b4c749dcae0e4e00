"""The command started again: goes on, refuses what is another run or runs already, and says when there is no more."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from apertus_nemo.record.run_dir import RunDirectory
from apertus_nemo.record.step_log import read_steps
from tests.integration.command import TRAIN, apertus, on_a_terminal, ranks_of, shell, started, wait_for
from tests.integration.runs import LAYOUTS, SQUEEZED, STEPS, Run

EVERY = 3  # steps between checkpoints
SETTINGS = [*(s for s in SQUEEZED if "checkpoint_every" not in s), f"trainer.checkpoint_every_steps={EVERY}"]
START_S = 200.0


@pytest.fixture
def environment(cache: Path, corpus: Path, tmp_path: Path) -> dict[str, str]:
    """A user's shell; the embedded corpus is there."""
    return shell(cache, tmp_path / "home")


def lines(run: Path) -> int:
    """Complete lines of the step log: header, initial state, steps."""
    log = run / "steps" / "000000.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def identical(folder: Path, environment: dict[str, str]) -> None:
    """`run` ended as `undisturbed` did."""
    done = apertus(["compare", "undisturbed", "run"], folder=folder, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"identical, {STEPS} of {STEPS} steps")


def train(arguments: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Train to the end of the command, without a traceback."""
    done = apertus([*TRAIN, "--quiet", *arguments], folder=folder, environment=environment)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR2, marks=pytest.mark.full)])
def test_stopped_and_started_again(tmp_path: Path, environment: dict[str, str], number: signal.Signals) -> None:
    run = tmp_path / "run"
    start = ["--run-dir", "run", *SETTINGS]
    with started([*TRAIN, *start], folder=tmp_path, environment=environment) as process:
        # the second step is logged, so the launcher has heard of the first
        wait_for(lambda: lines(run) >= 4 or process.poll() is not None, timeout_s=START_S, what="the second step")
        ranks = ranks_of(process.pid)
        for rank in ranks:  # the run stands still, so that neither it nor the second start can win a race
            os.kill(rank, signal.SIGSTOP)
        second = train(start, tmp_path, environment)
        process.send_signal(number)
        time.sleep(1.0)  # the launcher has passed it on
        for rank in ranks:
            os.kill(rank, signal.SIGCONT)
        out, err = process.communicate(timeout=60.0)
    assert (process.returncode, "Traceback" in err) == (0, False), err
    assert not {"\r", "\x1b"} & set(err)  # where nobody looks there is no bar
    assert out.startswith("stopped after step "), out
    assert (second.returncode, second.stdout) == (3, "")
    assert second.stderr.startswith("apertus-nemo: run: another process is training in this run directory; ")
    step = int(out.split()[3])
    assert out == f"stopped after step {step} of {STEPS}; go on with: apertus-nemo train --resume run\n"
    assert (run / "checkpoints" / f"step-{step:09d}" / "manifest.json").is_file()
    assert lines(run) == 2 + step

    other = train([*start, "optim.weight_decay=0.2"], tmp_path, environment)
    assert other.returncode == 2
    assert other.stderr == (
        "apertus-nemo: run holds a run that cannot go on like this: config.optim.weight_decay is 0.1 in its lock "
        "and 0.2 here; restore that, or choose another folder\n"
    )
    code, out, drawn = on_a_terminal(["train", "--resume", "run"], folder=tmp_path, environment=environment)
    assert (code, out.split(",")[0]) == (0, f"{STEPS} steps"), drawn
    bars = re.findall(r"\r *(\d+)% \|[^|]*\| step (\d+)/(\d+) ", drawn)
    assert bars, drawn
    assert {int(steps) for _, _, steps in bars} == {STEPS}
    assert {int(percent) - 100 * int(at) // STEPS for percent, at, _ in bars} <= {0, 1}  # of the whole run, rounded
    assert (int(bars[0][1]), int(bars[-1][1])) in ((step, STEPS), (step + 1, STEPS))
    for _ in range(2):
        finished = train(["--resume", "run"], tmp_path, environment)
        assert (finished.returncode, finished.stdout) == (0, f"already finished, {STEPS} steps, in run\n")
    assert sorted(path.name for path in (run / "attempts").iterdir()) == ["000", "001"]


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_time_limit(tmp_path: Path, environment: dict[str, str], runs: Callable[..., Run]) -> None:
    """Shorter than any start: one step each, until there is no limit; the end is that of a run without starts."""
    limit = "trainer.max_time=00:00:00:01"
    for step, arguments in enumerate((["--run-dir", "run", *SQUEEZED, limit], ["--resume", "run"]), 1):
        done = train(arguments, tmp_path, environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"stopped after step {step} of {STEPS}; go on with: apertus-nemo train --resume run\n"
    other = train(["--resume", "run", limit, "optim.lr=1e-3"], tmp_path, environment)
    assert other.returncode == 2
    assert other.stderr == (
        "apertus-nemo: --resume takes everything from the lock of the run: give no recipe, --run-dir or override but "
        "trainer.max_time\n"
    )
    shutil.rmtree(tmp_path / "run/checkpoints/step-000000002")  # somebody removes the newest: from the one before
    done = train(["--resume", "run", "trainer.max_time=null"], tmp_path, environment)
    assert (done.returncode, done.stdout.split(",")[0]) == (0, f"{STEPS} steps"), done.stderr
    assert done.stderr == "warning: run/checkpoints/step-000000002 was removed, and not by the run; passed over\n"
    assert apertus(["verify", "run"], folder=tmp_path, environment=environment).returncode == 0
    undisturbed, directory = runs("one"), RunDirectory(tmp_path / "run")
    assert {record.step: record for record in read_steps(directory.steps)} == undisturbed.steps
    assert directory.state(STEPS).read_bytes() == undisturbed.directory.state(STEPS).read_bytes()
    noted = [json.loads((tmp_path / f"run/attempts/00{n}/start.json").read_bytes()) for n in range(3)]
    found = [(note["checkpoint_step"], note["max_time"]) for note in noted]
    assert found == [(None, "00:00:00:01"), (1, "00:00:00:01"), (1, None)]


@contextlib.contextmanager
def usual_port_in_use() -> Iterator[dict[str, str]]:
    """Somebody listens where ranks often meet, and the shell says to meet there."""
    with socket.socket() as listener:
        with contextlib.suppress(OSError):  # another process has it already
            listener.bind(("127.0.0.1", 29500))
            listener.listen()
        yield {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "RANK": "5", "WORLD_SIZE": "9"}


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", ["one", "tp2", "dp2"])
def test_killed_from_outside(tmp_path: Path, environment: dict[str, str], layout: str) -> None:
    """A rank before the others have met it, a rank, the launcher, launcher and ranks, each after a drawn step.

    Then the end. All of it beside a process that has the port where ranks often meet.
    """
    ranks, cut = LAYOUTS[layout]
    chance = random.Random(layout)
    start = ["--run-dir", "run", *SETTINGS, *cut]
    assert train(["--run-dir", "undisturbed", *SETTINGS, *cut], tmp_path, environment).returncode == 0
    with usual_port_in_use() as more:
        environment = {**environment, **more}
        first = 2
        for whom in ("early", "rank", "launcher", "all"):
            first += 0 if whom == "early" else 1 + chance.randrange(3)
            with started([*TRAIN, "--quiet", *start], folder=tmp_path, environment=environment) as process:
                if whom == "early":
                    wait_for(lambda: len(ranks_of(process.pid)) == ranks, timeout_s=START_S, what="ranks")
                else:
                    wait_for(lambda: lines(tmp_path / "run") >= first, timeout_s=START_S, what=f"line {first}")  # noqa: B023
                pids = ranks_of(process.pid)
                assert len(pids) == ranks
                victims = {"early": pids[-1:], "rank": [chance.choice(pids)], "launcher": [process.pid]}
                for pid in victims.get(whom, [process.pid, *pids]):
                    os.kill(pid, signal.SIGKILL)
                _, err = process.communicate(timeout=60.0)
            assert process.returncode == (3 if whom in ("early", "rank") else -signal.SIGKILL)
            if whom == "early":
                assert err.startswith(f"apertus-nemo: rank {ranks - 1} was killed by signal 9 "), err
                assert lines(tmp_path / "run") == 0
                continue
            assert not (tmp_path / "run" / "end.json").exists()
            so_far = apertus(["verify", "run"], folder=tmp_path, environment=environment)
            assert so_far.returncode == 0, so_far.stdout
            assert so_far.stdout.startswith("whole so far: unfinished, ")
        done = train(start, tmp_path, environment)
    assert done.returncode == 0, done.stderr
    identical(tmp_path, environment)
    whole = apertus(["verify", "run"], folder=tmp_path, environment=environment)
    assert (whole.returncode, whole.stdout.splitlines()[0]) == (0, f"whole: finished at step {STEPS}"), whole.stdout

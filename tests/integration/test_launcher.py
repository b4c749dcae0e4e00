"""What the launcher does when something is wrong or ends it: one clear line, the right exit code, no process left."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from apertus_nemo.audit.status import status_of
from tests.integration.command import TRAIN, alive, apertus, ranks_of, shell, started, wait_for
from tests.integration.runs import SQUEEZED

START_S = 60.0  # until ranks exist, on a busy machine
END_S = 20.0  # from the reason to the end


@pytest.fixture
def environment(cache: Path, corpus: Path, tmp_path: Path) -> dict[str, str]:
    """A user's shell; the embedded corpus is there."""
    return shell(cache, tmp_path / "home")


def refused(arguments: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and standard error of a command that must fail without a traceback, quickly."""
    done = apertus([*TRAIN, "--quiet", *arguments], folder=folder, environment=environment, timeout_s=120.0)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte_in_a_built_corpus(corpus: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    flip(copy / "corpus.bin")
    code, text = refused(["--run-dir", "run", "data=built", f"data.path={copy}"], tmp_path, environment)
    assert code == 1
    assert text.startswith(f"apertus-nemo: {copy}/corpus.bin: ")
    assert len(text.splitlines()) == 1
    assert list((tmp_path / "run" / "steps").iterdir()) == []


def test_a_flipped_byte_in_the_embedded_corpus(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    copy = cache / "apertus-nemo" / "corpus" / corpus.name
    shutil.copytree(corpus, copy)
    flip(copy / "corpus.bin")
    code, text = refused([], tmp_path, shell(cache, tmp_path / "home"))
    assert code == 1
    assert text.startswith(f"apertus-nemo: {copy}/corpus.bin: ")
    assert text.endswith(f"; remove {copy} to have it built again\n")
    assert not (tmp_path / "runs" / "tiny_pretrain-1").exists()


def test_a_vocabulary_that_the_model_does_not_have(tmp_path: Path, corpus: Path, environment: dict[str, str]) -> None:
    arguments = ["data=built", f"data.path={corpus}", "data.tokenizer_vocab_size=2048", "model.vocab_size=2048"]
    code, text = refused(arguments, tmp_path, environment)
    assert code == 2
    assert "4096" in text
    assert "model.vocab_size" in text
    assert len(text.splitlines()) == 1


def test_a_folder_that_holds_a_run(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock.json").write_text("{}")
    code, text = refused(["--run-dir", "run"], tmp_path, environment)
    assert (code, text) == (2, "apertus-nemo: run/lock.json: is not a lock\n")
    assert (tmp_path / "run" / "lock.json").read_text() == "{}"


def test_a_folder_that_holds_something_else(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    code, text = refused(["--run-dir", "run"], tmp_path, environment)
    assert (code, len(text.splitlines())) == (2, 1)
    assert "run is not empty (it holds 'thesis.tex')" in text


def test_a_folder_that_cannot_be_made(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "file").write_text("")
    code, text = refused(["--run-dir", "file/run"], tmp_path, environment)
    assert code in (2, 3)
    assert len(text.splitlines()) == 1
    assert "file/run" in text


def test_built_data_that_are_not_there(tmp_path: Path, environment: dict[str, str]) -> None:
    code, text = refused(["data=built", f"data.path={tmp_path}/none"], tmp_path, environment)
    assert code == 2
    assert text.startswith(f"apertus-nemo: {tmp_path}/none is not a built corpus: ")
    assert len(text.splitlines()) == 1


def test_devices_are_ranks_and_a_killed_one_ends_the_others(tmp_path: Path, environment: dict[str, str]) -> None:
    arguments = [*TRAIN, "--run-dir", "run", *SQUEEZED, "trainer.devices=3", "trainer.global_batch_size=6"]
    arguments.remove("schedule.batch_ramp=[{from_sample:20,global_batch_size:8}]")
    with started([*arguments, "schedule.batch_ramp=[]"], folder=tmp_path, environment=environment) as process:
        wait_for(lambda: len(ranks_of(process.pid)) == 3, timeout_s=START_S, what="three ranks")
        pids = ranks_of(process.pid)
        variables = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in pids]
        assert [b"RANK=%d" % rank in variables[rank] for rank in range(3)] == [True] * 3
        assert all(b"WORLD_SIZE=3" in of_rank for of_rank in variables)
        os.kill(pids[1], signal.SIGKILL)
        _, err = process.communicate(timeout=END_S)
    assert process.returncode == 3
    log = Path("run/attempts/000/rank-1.log")
    assert err.splitlines()[-1] == (
        "apertus-nemo: rank 1 was killed by signal 9 (SIGKILL, perhaps for lack of memory); "
        f"the other ranks were stopped; see {log}"
    )
    assert (tmp_path / log).exists()
    assert "Traceback" not in err
    after = status_of(tmp_path / "run")
    assert (after.state, after.step, after.broken) == ("failed", None, None)
    assert (
        after.last_failure
        == f"attempt 0: killed: {err.splitlines()[-1].removeprefix('apertus-nemo: ').replace('run/', '')}"
    )
    assert not any(map(alive, pids))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_launcher_and_ranks_quietly(
    tmp_path: Path, environment: dict[str, str], number: signal.Signals, code: int
) -> None:
    with started([*TRAIN, "parallel=dp2"], folder=tmp_path, environment=environment) as process:
        wait_for(lambda: len(ranks_of(process.pid)) == 2, timeout_s=START_S, what="two ranks")
        pids = ranks_of(process.pid)
        process.send_signal(number)
        _, err = process.communicate(timeout=END_S)
    assert process.returncode == code
    assert "Traceback" not in err
    assert re.fullmatch(r"(starting NeMo \.\.\.\n)?", err)
    assert not any(map(alive, pids))


def test_ranks_do_not_outlive_a_launcher_that_was_killed(tmp_path: Path, environment: dict[str, str]) -> None:
    with started([*TRAIN, "parallel=dp2"], folder=tmp_path, environment=environment) as process:
        wait_for(lambda: len(ranks_of(process.pid)) == 2, timeout_s=START_S, what="two ranks")
        pids = ranks_of(process.pid)
        wait_for(lambda: all(map(_is_python_up, pids)), timeout_s=START_S, what="both ranks read their first module")
        process.kill()
        wait_for(lambda: not any(map(alive, pids)), timeout_s=END_S, what="the ranks end")


def _is_python_up(pid: int) -> bool:
    """The rank has asked the kernel to end it with its launcher: it is past that once torch is mapped."""
    try:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


@pytest.mark.full
@pytest.mark.timeout(400)
def test_a_rank_killed_in_the_middle_of_training(tmp_path: Path, environment: dict[str, str]) -> None:
    arguments = [*TRAIN, "--run-dir", "run", "parallel=tp2", "trainer.micro_batch_size=2"]
    log = tmp_path / "run" / "steps" / "000000.jsonl"
    with started(arguments, folder=tmp_path, environment=environment) as process:
        wait_for(lambda: log.exists() and len(log.read_bytes().splitlines()) > 4, timeout_s=240.0, what="three steps")
        pids = ranks_of(process.pid)
        os.kill(pids[1], signal.SIGKILL)
        since = time.monotonic()
        _, err = process.communicate(timeout=END_S)
    assert time.monotonic() - since < END_S
    assert process.returncode == 3
    assert err.splitlines()[-1].startswith("apertus-nemo: rank 1 was killed by signal 9 ")
    assert "Traceback" not in err
    assert not any(map(alive, pids))
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in left

"""`logs`: every line once, by attempt and rank, harmless to a terminal; followed to the end of the run."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from apertus_nemo.audit.rank_logs import MAX_LINE_CHARACTERS, Ended, Line, follow, read_logs, show
from apertus_nemo.cli.main import main
from apertus_nemo.errors import InputError
from apertus_nemo.launch.resume import claimed
from apertus_nemo.record.attempts import AttemptProgress, Outcome, write_outcome, write_progress

ROOT = Path(__file__).resolve().parents[3]


def attempt(run: Path, number: int, *logs: bytes) -> Path:
    """The folder of an attempt with a log a rank."""
    folder = run / "attempts" / f"{number:03d}"
    folder.mkdir(parents=True, exist_ok=True)
    write_progress(run, number, AttemptProgress("starting"))
    for rank, data in enumerate(logs):
        (folder / f"rank-{rank}.log").write_bytes(data)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two attempts of two ranks."""
    attempt(tmp_path, 0, b"a\nb\n", b"c\n")
    attempt(tmp_path, 1, b"d\n\ne", b"")
    write_outcome(tmp_path, 0, Outcome("killed", "rank 1 was killed", 3, rank=1, signal=9))
    return tmp_path


def texts(run: Path, *, number: int | None = None, rank: int | None = None, last: int | None = None) -> list[str]:
    found = read_logs(run, attempt=number, rank=rank, last_lines=last)
    return [f"{line.attempt}.{line.rank} {line.text}" for line in found]


def test_by_attempt_and_rank(run: Path) -> None:
    assert texts(run) == ["1.0 d", "1.0 ", "1.0 e"]
    assert texts(run, number=0) == ["0.0 a", "0.0 b", "0.1 c"]
    assert texts(run, number=0, rank=1) == ["0.1 c"]
    assert texts(run, number=0, last=1) == ["0.0 b", "0.1 c"]
    assert texts(run, number=0, last=0) == []


@pytest.mark.parametrize("end", [b"", b"\n"])
@pytest.mark.parametrize("width", [1, 7, 5000, 70_000])
def test_the_last_lines_are_those_that_tail_prints(tmp_path: Path, width: int, end: bytes) -> None:
    lines = [str(number).encode() * (width // len(str(number)) or 1) for number in range(40)]
    folder = attempt(tmp_path, 0, b"\n".join(lines) + end)
    for count in (0, 1, 2, 39, 40, 41):
        told = subprocess.run(
            ["tail", "-n", str(count), str(folder / "rank-0.log")], capture_output=True, check=True
        ).stdout
        expected = [show(line) for line in told.removesuffix(b"\n").split(b"\n")] if told else []
        assert [line.text for line in read_logs(tmp_path, attempt=0, rank=0, last_lines=count)] == expected


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"plain \xc3\xa9\ttext\r", "plain é\ttext"),
        (b"\x1b[2J\x1b]0;t\x07\x08", r"\x1b[2J\x1b]0;t\x07\x08"),
        (b"50%\r60%", r"50%\r60%"),
        (b"\xff\xfe", r"\xff\xfe"),
        ("\u202egnp.exe\u009b2J".encode(), r"\u202egnp.exe\x9b2J"),
        (b"\0", r"\x00"),
        (b"x" * 9999, "x" * (MAX_LINE_CHARACTERS - 4) + " ..."),
    ],
)
def test_no_line_drives_the_terminal(data: bytes, text: str) -> None:
    assert show(data) == text
    assert show(data).replace("\t", "").isprintable()


def refusal(*arguments: object) -> str:
    with pytest.raises(InputError) as error:
        list(read_logs(*arguments[:1], attempt=arguments[1], rank=arguments[2], last_lines=None))  # type: ignore[arg-type]
    return str(error.value)


def test_what_is_not_there(run: Path) -> None:
    assert refusal(run / "none", None, None) == (
        f"{run / 'none'} is not a folder: give a run directory; apertus-nemo runs lists them"
    )
    assert refusal(run / "attempts", None, None) == f"{run / 'attempts'} is not a run directory: it holds no attempts"
    assert refusal(run, 2, None) == f"{run} has no attempt 2: its attempts are 0, 1"
    assert refusal(run, 0, 5) == f"attempt 0 of {run} has no log of rank 5: there are 0, 1"
    for rank in range(2, 9):
        (run / "attempts" / "001" / f"rank-{rank}.log").touch()
    assert refusal(run, 1, 9) == f"attempt 1 of {run} has no log of rank 9: there are 0 to 8"
    (run / "attempts" / "001" / "rank-8.log").unlink()
    os.mkfifo(run / "attempts" / "001" / "rank-8.log")
    assert refusal(run, 1, 8) == f"{run / 'attempts/001/rank-8.log'} is not an ordinary file"
    (run / "attempts" / "001" / "rank-7.log").unlink()
    (run / "attempts" / "001" / "rank-7.log").symlink_to("/etc/passwd")
    assert refusal(run, 1, 7).startswith(f"could not read {run / 'attempts/001/rank-7.log'}: ")
    empty = run / "empty"
    (empty / "attempts").mkdir(parents=True)
    assert refusal(empty, None, None) == f"{empty} has no attempt yet: nothing was printed"


def test_a_huge_log_takes_little_memory(tmp_path: Path) -> None:
    """400 MB without a line end (sparse), then a line: shown in a process that may have 200 MB."""
    folder = attempt(tmp_path, 0, b"")
    with open(folder / "rank-0.log", "wb") as stream:
        stream.truncate(400 * 2**20)
        stream.seek(0, os.SEEK_END)
        stream.write(b"\nlast\n")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (200 * 2**20, 200 * 2**20))

    done = subprocess.run(
        [sys.executable, "-m", "apertus_nemo.cli.main", "logs", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=120,
        preexec_fn=limit,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    heading, first, last = done.stdout.splitlines()
    assert (heading, last) == (b"==> attempt 0, rank 0 <==", b"last")
    assert first.startswith(b"\\x00\\x00")


class Following:
    """`follow` in a thread, and what it has said."""

    def __init__(self, run: Path, **options: object) -> None:
        self.items: list[Line | Ended] = []
        arguments = {"rank": None, "last_lines": None, "wait_s": 0.5, **options}
        self.thread = threading.Thread(target=self._run, args=(follow(run, **arguments),), daemon=True)  # type: ignore[arg-type]
        self.thread.start()

    def _run(self, items: Iterator[Line | Ended]) -> None:
        for item in items:
            self.items.append(item)

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + 20
        while len(self.items) < count:
            assert time.monotonic() < deadline, self.items
            time.sleep(0.02)

    def end(self) -> list[Line | Ended]:
        self.thread.join(20)
        assert not self.thread.is_alive()
        return self.items


def append(path: Path, data: bytes) -> None:
    with open(path, "ab") as stream:
        stream.write(data)


def test_following_goes_on_in_the_next_attempt_and_ends_with_the_run(tmp_path: Path) -> None:
    with claimed(tmp_path):
        first = attempt(tmp_path, 0, b"old\nhal")
        following = Following(tmp_path)
        following.wait_for(1)
        append(first / "rank-0.log", b"f a line\n")
        (first / "rank-1.log").write_bytes(b"another rank\n")
        following.wait_for(3)
        append(first / "rank-0.log", b"without an end")
        write_outcome(tmp_path, 0, Outcome("killed", "rank 1 was killed", 3))
        following.wait_for(4)
        second = attempt(tmp_path, 1, b"again\n")
        following.wait_for(5)
        append(second / "rank-0.log", b"last\n")
        write_outcome(tmp_path, 1, Outcome("finished", "finished at step 9", 0, step=9))
        assert following.end() == [
            Line(0, 0, "old"),
            Line(0, 0, "half a line"),
            Line(0, 1, "another rank"),
            Line(0, 0, "without an end"),
            Line(1, 0, "again"),
            Line(1, 0, "last"),
            Ended(1, "finished", "finished at step 9"),
        ]


def test_following_waits_for_the_first_attempt_and_ends_with_a_launcher_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "attempts").mkdir()
    with claimed(tmp_path):
        following = Following(tmp_path, rank=1)
        time.sleep(0.3)
        assert following.thread.is_alive()
        attempt(tmp_path, 0, b"not this rank\n", b"one\n")
        following.wait_for(1)
        time.sleep(0.8)
        assert following.thread.is_alive(), "it goes on"
    first, last = following.end()
    assert first == Line(0, 1, "one")
    assert isinstance(last, Ended)
    assert (last.cause, last.message[:32]) == ("launcher gone", "the launcher was killed, or lost")


def test_following_what_has_ended_says_so_at_once(run: Path) -> None:
    write_outcome(run, 1, Outcome("stopped", "stopped as asked after step 2 of 9", 0, step=2))
    began = time.monotonic()
    *lines, last = Following(run, last_lines=1, wait_s=60.0).end()
    assert time.monotonic() - began < 10
    assert lines == [Line(1, 0, "e")]
    assert last == Ended(1, "stopped", "stopped as asked after step 2 of 9")
    *lines, last = Following(run, attempt=0, rank=1).end()
    assert lines == [Line(0, 1, "c")]
    with pytest.raises(InputError, match=r"^attempt 1 of .* has no log of rank 7: there are 0, 1$"):
        list(follow(run, rank=7, last_lines=None))


def test_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", str(run), "--attempt", "0"]) == 0
    assert capsys.readouterr() == ("==> attempt 0, rank 0 <==\na\nb\n==> attempt 0, rank 1 <==\nc\n", "")
    assert main(["logs", str(run), "--attempt", "0", "--rank", "1", "-n", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"attempt": 0, "event": "line", "rank": 1, "text": "c"}
    write_outcome(run, 1, Outcome("failed", "a \x1b[2J name", 2))
    assert main(["logs", str(run), "--follow", "--wait", "0", "--rank", "0", "-n", "1"]) == 0
    assert capsys.readouterr() == ("==> attempt 1, rank 0 <==\ne\n", "attempt 1: failed: a \\x1b[2J name\n")
    assert main(["logs", str(run), "-f", "--wait", "0", "-n", "0", "--json"]) == 0
    ended = {"attempt": 1, "cause": "failed", "event": "ended", "message": "a \x1b[2J name"}
    assert json.loads(capsys.readouterr().out) == ended
    for wrong in (["--attempt", "-1"], ["--rank", "x"], ["--lines", "1.5"], ["--wait", "nan"], ["--wait", "inf"], []):
        assert main(["logs", *([str(run), *wrong] if wrong else [])]) == 2
        assert "Traceback" not in capsys.readouterr().err

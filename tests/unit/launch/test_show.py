"""What a person, a log file and a program see of a run."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from apertus_nemo.launch import show
from apertus_nemo.launch.show import Display


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step(number: int, steps: int = 40) -> dict[str, Any]:
    return {
        "event": "step",
        "step": number,
        "steps": steps,
        "loss": 8.0 / number,
        "learning_rate": 3e-3,
        "tokens": 1000 * number,
        "seconds": 0.5 * number,
    }


def test_a_log_file_gets_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step, the last, and one every ten seconds in between."""
    now = [100.0]
    monkeypatch.setattr(show.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    display = Display(stream=stream)
    display.phase("starting NeMo")
    display.phase("starting NeMo")
    display.event({"event": "phase", "text": "first step"})
    for number in range(1, 41):
        now[0] += 0.5
        display.tick()
        display.event(step(number))
    display.close()
    assert stream.getvalue() == (
        "starting NeMo ...\n"
        "first step ...\n"
        "step 1/40  loss 8.0000  lr 3.00e-03  2,000 tokens/s  20 s left\n"
        "step 22/40  loss 0.3636  lr 3.00e-03  2,000 tokens/s  9 s left\n"
        "step 40/40  loss 0.2000  lr 3.00e-03  2,000 tokens/s\n"
    )


def test_a_terminal_gets_phases_with_their_time_and_one_bar() -> None:
    stream = Terminal()
    display = Display(stream=stream)
    display.phase("starting NeMo")
    for number in (1, 2):
        display.event(step(number, steps=2))
    display.event({"event": "phase", "text": "saving checkpoint of step 2"})
    display.close()
    text = stream.getvalue()
    assert "\x1b[Kstarting NeMo: 0.0 s\n" in text
    assert "100%" in text
    assert "step 2/2" in text
    assert "loss 4.0000  lr 3.00e-03  2,000 tokens/s" in text
    assert "left" in text
    assert text.endswith("\n")
    assert "saving" not in text  # would tear the bar


def test_a_bar_goes_on_where_the_attempt_before_was() -> None:
    """Percent and step of the whole run; the time left by this attempt's own steps, from the first one on."""
    stream = Terminal()
    display = Display(stream=stream)
    for number in (31, 32):  # of 40; 5 s each
        display.event({**step(number), "tokens": 1000 * (number - 30), "seconds": 5.0 * (number - 30)})
    display.close()
    drawn = [line for line in stream.getvalue().split("\r") if "step 32/40" in line]
    assert drawn
    assert all(line.startswith(" 80% |") and "200 tokens/s  00:40 left" in line for line in drawn)
    assert not any("step 1/" in line or "step 0/" in line for line in stream.getvalue().split("\r"))


@pytest.mark.parametrize(
    ("environment", "drives"),
    [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({"TERM": ""}, False), ({}, False)],
)
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(environment: dict[str, str], drives: bool) -> None:
    stream = Terminal()
    display = Display(stream=stream, environment={**environment, "NO_COLOR": "1"})
    display.phase("starting NeMo")
    display.event(step(1))
    display.event(step(40))
    display.close()
    assert ("\r" in stream.getvalue(), "\x1b" in stream.getvalue()) == (drives, drives)
    assert "\x1b[3" not in stream.getvalue(), "no colours"


@pytest.mark.parametrize("begun", [False, True])
def test_a_name_in_a_warning_does_not_drive_the_terminal(begun: bool) -> None:
    stream = Terminal()
    display = Display(stream=stream)
    if begun:
        display.event(step(1))
    display.warning("runs/\x1b]0;x\x07 is not a checkpoint")
    display.close()
    assert "warning: runs/\\x1b]0;x\\x07 is not a checkpoint\n" in stream.getvalue()
    assert "\x07" not in stream.getvalue()


def test_quiet_is_silent() -> None:
    stream = io.StringIO()
    display = Display(quiet=True, stream=stream)
    display.phase("starting NeMo")
    display.event({"event": "phase", "text": "first step"})
    display.event(step(1))
    display.tick()
    display.close()
    assert stream.getvalue() == ""


def test_a_program_gets_every_event() -> None:
    stream = io.StringIO()
    display = Display(as_json=True, stream=stream)
    events = [{"event": "phase", "text": "first step"}, step(1), step(2)]
    display.phase("not an event of a rank")
    for event in events:
        display.event(event)
    display.close()
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == events

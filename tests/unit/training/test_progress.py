"""Events from a rank: whole lines, whatever the text, and no harm where nobody reads."""

from __future__ import annotations

import json
import os
import select

import pytest

from apertus_nemo.training.progress import Progress


def sent(event: str, **values: object) -> dict[str, object]:
    """What arrives at the other end of the pipe, which must be one line of one write."""
    reading, writing = os.pipe()
    try:
        Progress(writing).send(event, **values)
        data = os.read(reading, 1 << 20)
    finally:
        os.close(reading)
        os.close(writing)
    assert data.endswith(b"\n")
    assert data.count(b"\n") == 1
    assert len(data) <= select.PIPE_BUF
    answer: dict[str, object] = json.loads(data)
    return answer


def test_an_event_arrives_as_it_was_sent() -> None:
    assert sent("step", step=3, loss=0.1, text="a\nb") == {"event": "step", "step": 3, "loss": 0.1, "text": "a\nb"}


@pytest.mark.parametrize("letter", ["x", "ü", "\x00", "𝄞"])
def test_a_text_that_is_too_long_for_one_write_is_cut(letter: str) -> None:
    answer = sent("error", message=letter * 100_000, exit_code=4, rank=1)
    assert answer["message"] == letter * 300 + " ..."
    assert (answer["exit_code"], answer["rank"]) == (4, 1)


def test_a_reader_that_is_gone_is_no_reason_to_stop() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    progress = Progress(writing)
    progress.send("step", step=1)
    progress.send("step", step=2)
    os.close(writing)


def test_without_a_pipe_nothing_is_sent() -> None:
    Progress.from_environment({}).send("step", step=1)

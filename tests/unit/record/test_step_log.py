"""The step log: an independent reader of the chain, tampering, crashes, repeated steps."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import random
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apertus_nemo.errors import ApertusError, Differs, InputError, UnfitEnvironment
from apertus_nemo.record.canonical import dumps, unknown
from apertus_nemo.record.step_line import parse_line, plain
from apertus_nemo.record.step_log import StepLogHeader, StepLogReader, StepLogWriter, StepRecord, new_run_id, read_steps

HEADER = StepLogHeader(lock_digest="1" * 64, run_id="2" * 32, observation_digest=unknown("not taken yet"))


def record(step: int, **changes: object) -> StepRecord:
    if step == 0:
        return replace(StepRecord(step=0, state_digest="a" * 64), **changes)  # type: ignore[arg-type]
    whole = StepRecord(
        step=step,
        consumed_samples=8 * step,
        consumed_tokens=512 * step,
        loss=5.0 / step,
        grad_norm=1.0 / 3 / step,
        learning_rate=1e-3,
        global_batch_size=8,
        batch_digest=hashlib.sha256(str(step).encode()).hexdigest(),
        state_digest="b" * 64 if step % 3 == 0 else None,
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


def write(folder: Path, steps: range, **options: int) -> None:
    with StepLogWriter.open(folder, HEADER, **options) as log:
        for step in steps:
            assert log.append(record(step))


FLOATS = st.none() | st.floats(allow_nan=True, allow_infinity=True)
COUNTS = st.none() | st.integers(0, 2**53 - 1)
DIGESTS = st.none() | st.binary(min_size=32, max_size=32).map(bytes.hex)


@settings(max_examples=150, deadline=None)
@given(
    st.builds(
        StepRecord,
        step=st.integers(0, 2**53 - 1),
        consumed_samples=COUNTS,
        consumed_tokens=COUNTS,
        loss=FLOATS,
        grad_norm=FLOATS,
        learning_rate=FLOATS,
        global_batch_size=COUNTS,
        batch_digest=DIGESTS,
        state_digest=DIGESTS,
    )
)
def test_a_line_is_canonical_json_and_keeps_every_bit(record: StepRecord) -> None:
    line = record.to_line("c" * 64)
    tree = {name: plain(value) for name, value in record.values().items()} | {"step": record.step, "previous": "c" * 64}
    assert line == dumps(tree)
    again, previous = parse_line(line, what="it")
    assert previous == "c" * 64
    assert again.step == record.step
    assert {n: plain(v) for n, v in again.values().items()} == {n: plain(v) for n, v in record.values().items()}


def test_the_chain_holds_for_an_independent_reader(tmp_path: Path) -> None:
    write(tmp_path, range(12))
    lines = (tmp_path / "000000.jsonl").read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert json.loads(lines[0])["lock_digest"] == "1" * 64
    for before, line in itertools.pairwise(lines):
        assert json.loads(line)["previous"] == hashlib.sha256(before).hexdigest()
    assert [json.loads(line)["step"] for line in lines[1:]] == list(range(12))
    assert float.fromhex(json.loads(lines[4])["grad_norm"]) == 1.0 / 3 / 3
    assert list(read_steps(tmp_path)) == [record(step) for step in range(12)]


def test_segments_continue_the_chain(tmp_path: Path) -> None:
    write(tmp_path, range(1, 25), segment_lines=10)
    assert sorted(os.listdir(tmp_path)) == ["000000.jsonl", "000001.jsonl", "000002.jsonl"]
    assert [len((tmp_path / n).read_bytes().splitlines()) for n in sorted(os.listdir(tmp_path))] == [10, 10, 5]
    text = b"".join((tmp_path / name).read_bytes() for name in sorted(os.listdir(tmp_path)))
    write(tmp_path / "one", range(1, 25))
    assert (tmp_path / "one" / "000000.jsonl").read_bytes() == text
    assert [r.step for r in StepLogReader(tmp_path, segment_lines=10)] == list(range(1, 25))
    with StepLogWriter.open(tmp_path, HEADER, segment_lines=10) as log:
        assert not log.append(record(17))
        with pytest.raises(Differs):
            log.append(record(9, loss=1.0))
        for step in range(25, 42):
            log.append(record(step))
    assert [r.step for r in StepLogReader(tmp_path, segment_lines=10)] == list(range(1, 42))
    (tmp_path / "000002.jsonl").rename(tmp_path / "kept")
    with pytest.raises(InputError, match=r"segment 000002.jsonl is missing"):
        StepLogReader(tmp_path, segment_lines=10)


def test_every_edited_byte_is_refused(tmp_path: Path) -> None:
    """Each byte of every line but the last, changed in one bit, and the file read again: hundreds of cases."""
    write(tmp_path, range(3))
    path = tmp_path / "000000.jsonl"
    data = path.read_bytes()
    protected = data[:-1].rindex(b"\n") + 1
    chosen = random.Random(3)
    for position in range(protected):
        edited = bytearray(data)
        edited[position] ^= 1 << chosen.randrange(8)
        path.write_bytes(edited)
        with pytest.raises(InputError):
            list(read_steps(tmp_path))
    path.write_bytes(data)
    assert len(list(read_steps(tmp_path))) == 3


@pytest.mark.parametrize("seed", range(4))
def test_dropped_inserted_and_exchanged_lines_are_refused(tmp_path: Path, seed: int) -> None:
    write(tmp_path, range(9))
    path = tmp_path / "000000.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    chosen = random.Random(seed)
    for case in range(100):
        i, j = sorted(chosen.sample(range(len(lines)), 2))
        edited = list(lines)
        if case % 4 == 0:
            del edited[i]  # never the last one
        elif case % 4 == 1:
            edited.insert(j, edited[i])
        elif case % 4 == 2:
            edited[i], edited[j] = edited[j], edited[i]
        else:
            if i == 0:
                continue
            again, previous = parse_line(lines[i].rstrip(b"\n"), what="it")
            edited[i] = replace(again, loss=chosen.random()).to_line(previous) + b"\n"
        path.write_bytes(b"".join(edited))
        if len(edited) > 1:
            with pytest.raises(InputError, match=r"000000\.jsonl line [0-9]+"):
                list(read_steps(tmp_path))


def test_lines_cut_off_the_end_leave_a_shorter_log_and_a_torn_one_is_told(tmp_path: Path) -> None:
    write(tmp_path, range(4))
    path = tmp_path / "000000.jsonl"
    data = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(data) if byte == ord("\n")]
    for size in sorted({*range(ends[0], len(data), 5), *ends[:-1]}):
        path.write_bytes(data[:size])
        complete = sum(end <= size for end in ends) - 1
        reader = StepLogReader(tmp_path)
        assert len(list(reader)) == complete
        assert (reader.torn is None) == (size in ends)
        if size not in ends:
            with pytest.raises(InputError, match=f"line {complete + 2}: is torn"):
                list(read_steps(tmp_path))


def test_a_torn_last_line_is_dropped_and_written_again(tmp_path: Path) -> None:
    write(tmp_path / "whole", range(6))
    whole = (tmp_path / "whole" / "000000.jsonl").read_bytes()
    for size in range(0, len(whole), 7):
        folder = tmp_path / f"cut-{size}"
        folder.mkdir()
        (folder / "000000.jsonl").write_bytes(whole[:size])
        with StepLogWriter.open(folder, HEADER) as log:
            for step in range(0 if log.last_step is None else log.last_step + 1, 6):
                log.append(record(step))
        assert (folder / "000000.jsonl").read_bytes() == whole


def test_a_torn_line_at_the_edge_of_a_segment(tmp_path: Path) -> None:
    write(tmp_path, range(1, 20), segment_lines=10)
    assert (tmp_path / "000001.jsonl").read_bytes().count(b"\n") == 10
    (tmp_path / "000002.jsonl").write_bytes(b'{"batch_dig')
    with StepLogWriter.open(tmp_path, HEADER, segment_lines=10) as log:
        assert log.last_step == 19
        log.append(record(20))
    assert [r.step for r in StepLogReader(tmp_path, segment_lines=10)] == list(range(1, 21))
    (tmp_path / "000003.jsonl").touch()
    with pytest.raises(InputError, match=r"000002.jsonl: ends after 1 of 10 lines: some were lost"):
        list(StepLogReader(tmp_path, segment_lines=10))


def test_repeated_steps_are_compared_not_logged_twice(tmp_path: Path) -> None:
    write(tmp_path, range(8))
    before = (tmp_path / "000000.jsonl").read_bytes()
    with StepLogWriter.open(tmp_path, HEADER) as log:
        assert log.last_step == 7
        assert not log.append(record(5))
        assert not log.append(record(6, state_digest=None))  # a digest that one attempt took and the other did not
        assert not log.append(record(7, state_digest="c" * 64))
        assert log.repeated == [5, 6, 7]
    assert (tmp_path / "000000.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"loss": math.nextafter(5.0 / 6, 1)},
            "step 6: loss is 0x1.aaaaaaaaaaaacp-1 (0.8333333333333335), but was 0x1.aa",
        ),
        ({"loss": math.nan}, "step 6: loss is nan (nan), but was 0x1.aaaaaaaaaaaabp-1 (0.8333333333333334)"),
        ({"grad_norm": -0.0}, "step 6: grad_norm is -0x0.0p+0 (-0.0)"),
        ({"learning_rate": None}, "step 6: learning_rate is absent, but was 0x1.0624dd2f1a9fcp-10 (0.001)"),
        ({"consumed_samples": 49}, "step 6: consumed_samples is 49, but was 48"),
        ({"consumed_tokens": 1}, "step 6: consumed_tokens is 1"),
        ({"global_batch_size": 4}, "step 6: global_batch_size is 4, but was 8"),
        ({"batch_digest": "0" * 64}, "step 6: batch_digest is 0000"),
        ({"state_digest": "0" * 64}, "step 6: state_digest is 0000"),
    ],
)
def test_a_restart_that_differs_stops(tmp_path: Path, change: dict[str, object], words: str) -> None:
    write(tmp_path, range(8))
    with StepLogWriter.open(tmp_path, HEADER) as log, pytest.raises(Differs) as caught:
        log.append(record(6, **change))
    assert str(caught.value).startswith(words)
    assert str(caught.value).endswith("the restart does not reproduce the run")


def test_a_nan_that_repeats_is_equal_and_zeros_have_signs(tmp_path: Path) -> None:
    with StepLogWriter.open(tmp_path, HEADER) as log:
        log.append(record(1, loss=math.nan, grad_norm=0.0))
        assert not log.append(record(1, loss=math.nan, grad_norm=0.0))
        with pytest.raises(Differs, match=r"grad_norm is -0x0\.0p"):
            log.append(record(1, loss=math.nan, grad_norm=-0.0))


def test_the_log_keeps_its_header_and_refuses_another_lock(tmp_path: Path) -> None:
    write(tmp_path, range(2))
    with StepLogWriter.open(tmp_path, replace(HEADER, run_id=new_run_id())) as log:
        assert log.header == HEADER
    with pytest.raises(InputError, match=f"was written under lock digest {'1' * 64}, not {'9' * 64}"):
        StepLogWriter.open(tmp_path, replace(HEADER, lock_digest="9" * 64))


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    log = StepLogWriter.open(tmp_path, HEADER)
    with pytest.raises(UnfitEnvironment, match="another process is writing this step log"):
        StepLogWriter.open(tmp_path, HEADER)
    log.close()
    log.close()
    StepLogWriter.open(tmp_path, HEADER).close()


def test_what_is_no_record_is_our_own_fault(tmp_path: Path) -> None:
    with StepLogWriter.open(tmp_path, HEADER) as log:
        log.append(record(1))
        with pytest.raises(ApertusError, match="step 3 cannot be logged after step 1"):
            log.append(record(3))
        with pytest.raises(ApertusError, match="the record of step 2 cannot be logged"):
            log.append(record(2, batch_digest="short"))
        with pytest.raises(ApertusError, match="the record of step 2 cannot be logged"):
            log.append(record(2, loss="5.0"))
        with pytest.raises(ApertusError, match="the record of step 2 cannot be logged"):
            log.append(record(2, consumed_tokens=-1))
        with pytest.raises(ApertusError, match="before the first logged step"):
            log.append(record(0))
        log.append(record(2))
    assert [r.step for r in read_steps(tmp_path)] == [1, 2]


def test_a_full_disk_takes_the_part_of_a_line_back(tmp_path: Path) -> None:
    """A real limit on the size of files that falls into a line."""
    log = StepLogWriter.open(tmp_path, HEADER)
    path = tmp_path / "000000.jsonl"
    log.append(record(1))
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
    try:
        with pytest.raises(UnfitEnvironment, match=r"could not write .*000000.jsonl"):
            log.append(record(2))
        assert path.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert log.append(record(2))  # space was made
    log.close()
    assert [r.step for r in read_steps(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"[]", "it is not an object"),
        (b"{", "it: is not JSON"),
        (b'{"step":1}', "missing key 'batch_digest'"),
        (b'{"step":1,"zeal":2}', "missing key 'batch_digest'"),
        (record(1).to_line("0" * 64)[:-1] + b',"tokens_per_s":1}', "unknown key 'tokens_per_s'"),
        (record(1).to_line("0" * 64).replace(b'"loss":"0x1', b'"loss": "0x1'), "the JSON is not canonical"),
        (record(1).to_line("0" * 64).replace(b'"consumed_samples":8', b'"consumed_samples":"8"'), "the wrong form"),
        (record(1).to_line("0" * 64).replace(b'"loss":"0x1', b'"loss":"0x2'), "the wrong form"),
    ],
)
def test_lines_of_another_form_are_described(line: bytes, words: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_line(line, what="steps/000000.jsonl line 2")
    assert str(caught.value).startswith("steps/000000.jsonl line 2: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "has format 2; this version reads 1"),
        ({"kind": "log"}, "is not the header"),
        ({"lock_digest": "short"}, "is no SHA-256"),
        ({"observation_digest": None}, "is no SHA-256"),
        ({"run_id": "x"}, "the run id is not 32 hex digits"),
        ({"more": 1}, "is not the header"),
    ],
)
def test_headers_of_another_form_are_described(change: dict[str, object], words: str) -> None:
    line = dumps(json.loads(HEADER.to_line()) | change)
    with pytest.raises(InputError, match=words):
        StepLogHeader.from_line(line, what="it")


def test_a_folder_without_a_log(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no step log"):
        StepLogReader(tmp_path)
    with pytest.raises(InputError, match="holds no step log"):
        StepLogReader(tmp_path / "absent")


def test_long_logs_are_quick(tmp_path: Path) -> None:
    """A million steps in minutes: 20,000 in seconds of this process, even on a slow one."""
    start = time.process_time()
    write(tmp_path, range(1, 20_001))
    assert time.process_time() - start < 5
    start = time.process_time()
    assert sum(1 for _ in read_steps(tmp_path)) == 20_000
    assert time.process_time() - start < 2.5

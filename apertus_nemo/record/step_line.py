"""One line of the step log: what a step was, exactly, as canonical JSON.

    record = StepRecord(step=1, consumed_samples=8, loss=5.2, ...)
    record.to_line(previous="<SHA-256 of the line before>")
    parse_line(line, what="steps/000000.jsonl line 2")         # (record, previous)

A line is parsed by one expression that admits nothing but what `to_line` writes: it is strict, and quick
enough for logs of a million steps. The format is in docs/run-directory.md.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from apertus_nemo.errors import ApertusError, InputError
from apertus_nemo.record.canonical import dumps, from_hex_float, is_digest, is_unknown, loads, loads_canonical

FORMAT = 1
MAX_LINE_BYTES = 4096  # longest line that is written or read
KIND = "apertus-nemo step log"

_INTEGERS = ("consumed_samples", "consumed_tokens", "global_batch_size")
_FLOATS = ("loss", "grad_norm", "learning_rate")
_DIGESTS = ("batch_digest", "state_digest")

_INT = r"null|0|[1-9][0-9]{0,15}"
_FLOAT = r'null|"-?(?:0x0\.0p\+0|0x[01]\.[0-9a-f]{13}p[+-][0-9]{1,4}|inf)"|"nan"'
_SHA = r'null|"[0-9a-f]{64}"'
_LINE = re.compile(
    (
        rf'\{{"batch_digest":({_SHA}),"consumed_samples":({_INT}),"consumed_tokens":({_INT}),'
        rf'"global_batch_size":({_INT}),"grad_norm":({_FLOAT}),"learning_rate":({_FLOAT}),"loss":({_FLOAT}),'
        r'"previous":"([0-9a-f]{64})",'
        rf'"state_digest":({_SHA}),"step":(0|[1-9][0-9]{{0,15}})\}}'
    ).encode()
)


@dataclass(frozen=True)
class StepRecord:
    """What is known of a step once it is done. None: this step has no such value."""

    step: int  # from 1; 0 is the initial state, and has nothing but its digest
    consumed_samples: int | None = None  # in the whole run, this step included
    consumed_tokens: int | None = None
    loss: float | None = None  # mean over the loss tokens of the global batch
    grad_norm: float | None = None  # before clipping
    learning_rate: float | None = None
    global_batch_size: int | None = None
    batch_digest: str | None = None  # SHA-256 of the samples of the step
    state_digest: str | None = None  # where one was due

    def to_line(self, previous: str) -> bytes:
        """The line, without its newline; the keys stand in the order of RFC 8785."""

        def integer(value: int | None) -> str:
            return "null" if value is None else str(value)

        def text(value: str | None) -> str:
            return "null" if value is None else f'"{value}"'

        def real(value: float | None) -> str:
            return "null" if value is None else f'"{value.hex()}"'

        return (
            f'{{"batch_digest":{text(self.batch_digest)},"consumed_samples":{integer(self.consumed_samples)},'
            f'"consumed_tokens":{integer(self.consumed_tokens)},'
            f'"global_batch_size":{integer(self.global_batch_size)},"grad_norm":{real(self.grad_norm)},'
            f'"learning_rate":{real(self.learning_rate)},"loss":{real(self.loss)},"previous":"{previous}",'
            f'"state_digest":{text(self.state_digest)},"step":{self.step}}}'
        ).encode()

    def values(self) -> dict[str, int | float | str | None]:
        """Every value but the step, causes before effects: what was read, how far to go, what came of it."""
        names = ("consumed_samples", "consumed_tokens", "global_batch_size", "batch_digest")
        return {n: getattr(self, n) for n in (*names, "learning_rate", "loss", "grad_norm", "state_digest")}


@dataclass(frozen=True)
class StepLogHeader:
    """The first line of the log."""

    lock_digest: str
    run_id: str  # 32 random hex digits: two runs of one lock are two runs
    observation_digest: str | dict[str, str]  # SHA-256 of observed.json, or canonical.unknown(reason)

    def to_line(self) -> bytes:
        """The line, without its newline."""
        return dumps(
            {
                "format": FORMAT,
                "kind": KIND,
                "lock_digest": self.lock_digest,
                "observation_digest": self.observation_digest,
                "run_id": self.run_id,
            }
        )

    @classmethod
    def from_line(cls, line: bytes, *, what: str) -> StepLogHeader:
        """Parse the line; raises InputError, beginning with `what`."""
        tree = loads_canonical(line, what=what, max_bytes=MAX_LINE_BYTES)
        if not isinstance(tree, dict) or tree.get("kind") != KIND:
            raise InputError(f"{what}: is not the header of a step log")
        if tree.get("format") != FORMAT:
            raise InputError(f"{what}: has format {tree.get('format')!r}; this version reads {FORMAT}")
        if set(tree) != {"format", "kind", "lock_digest", "observation_digest", "run_id"}:
            raise InputError(f"{what}: is not the header of a step log")
        observation = tree["observation_digest"]
        if not is_digest(tree["lock_digest"]) or not (is_digest(observation) or is_unknown(observation)):
            raise InputError(f"{what}: the lock digest or the digest of the observation is no SHA-256")
        if not isinstance(tree["run_id"], str) or not re.fullmatch("[0-9a-f]{32}", tree["run_id"]):
            raise InputError(f"{what}: the run id is not 32 hex digits")
        return cls(tree["lock_digest"], tree["run_id"], observation)


def new_run_id() -> str:
    """A random run id."""
    return os.urandom(16).hex()


def parse_line(line: bytes, *, what: str) -> tuple[StepRecord, str]:
    """(record, the `previous` that the line holds); raises InputError, beginning with `what`."""
    match = _LINE.fullmatch(line)
    if match is None:
        raise InputError(f"{what}: {_why_not(line)}")
    batch, samples, tokens, size, norm, rate, loss, previous, state, step = (g.decode() for g in match.groups())

    def integer(text: str) -> int | None:
        return None if text == "null" else int(text)

    def string(text: str) -> str | None:
        return None if text == "null" else text[1:-1]

    def real(text: str) -> float | None:
        return None if text == "null" else from_hex_float(text[1:-1], what=what)

    record = StepRecord(
        step=int(step),
        consumed_samples=integer(samples),
        consumed_tokens=integer(tokens),
        loss=real(loss),
        grad_norm=real(norm),
        learning_rate=real(rate),
        global_batch_size=integer(size),
        batch_digest=string(batch),
        state_digest=string(state),
    )
    return record, previous


def _why_not(line: bytes) -> str:
    """Why a line is none of a step log."""
    try:
        tree = loads(line, what="it", max_bytes=MAX_LINE_BYTES)
    except InputError as error:
        return f"is not a line of a step log: {error}"
    keys = {"step", "previous", *_INTEGERS, *_FLOATS, *_DIGESTS}
    if not isinstance(tree, dict):
        return "is not a line of a step log: it is not an object"
    for key in sorted(keys ^ set(tree)):
        return f"is not a line of a step log: {'unknown' if key in tree else 'missing'} key {key!r}"
    return "is not a line of a step log: a value has the wrong form, or the JSON is not canonical"


def plain(value: Any) -> Any:
    """A value so that equal bits are equal (floats as hex: NaN equals NaN, 0.0 is not -0.0)."""
    return value.hex() if isinstance(value, float) else value


def show(value: Any) -> str:
    """A value at full precision, for people: floats in hex and in decimal."""
    return f"{value.hex()} ({value!r})" if isinstance(value, float) else "absent" if value is None else str(value)


def checked(record: StepRecord) -> StepRecord:
    """Refuse, as our own fault, what the reader would refuse."""
    what = f"step {record.step}"
    parse_error = None
    try:
        again, _ = parse_line(record.to_line("0" * 64), what=what)
    except (InputError, AttributeError) as error:
        parse_error = error
    if parse_error is not None:
        raise ApertusError(f"the record of {what} cannot be logged: {parse_error}")
    return again

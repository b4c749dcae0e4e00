"""The lines that a person sees while a run goes on: phases, then one progress bar; or JSON events."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from apertus_nemo.record.places import printable


class Display:
    """Shows events on a stream: a bar on a terminal, a line every ten seconds elsewhere, nothing if quiet.

    No colours are used, so that NO_COLOR has nothing to turn off.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        as_json: bool = False,
        stream: TextIO | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`environment`: the shell's; a terminal that cannot move its cursor (TERM=dumb, or none) gets lines."""
        self._stream = stream if stream is not None else sys.stderr
        self._quiet, self._json = quiet, as_json
        able = environment is None or environment.get("TERM", "dumb") not in ("dumb", "")
        self._terminal = self._stream.isatty() and able
        self._bar: Any = None
        self._phase, self._phase_since, self._drawn = "", time.monotonic(), 0.0
        self._last_line = 0.0
        self._before: int | None = None

    def phase(self, text: str) -> None:
        """Something that takes a while begins."""
        if self._bar is not None or self._quiet or self._json or text == self._phase:
            return
        self._end_phase()
        self._phase, self._phase_since = text, time.monotonic()
        if not self._terminal:
            print(f"{text} ...", file=self._stream, flush=True)

    def _end_phase(self) -> None:
        if self._phase and self._terminal:
            seconds = time.monotonic() - self._phase_since
            print(f"\r\033[K{self._phase}: {seconds:.1f} s", file=self._stream, flush=True)
        self._phase = ""

    def tick(self) -> None:
        """Called several times a second: keeps the clock of the current phase."""
        now = time.monotonic()
        if self._phase and self._terminal and not self._quiet and now - self._drawn > 0.5:
            self._drawn = now
            print(f"\r\033[K{self._phase} ... {now - self._phase_since:.0f} s", end="", file=self._stream, flush=True)

    def event(self, event: dict[str, Any]) -> None:
        """An event from the first rank."""
        if self._json:
            print(json.dumps(event), file=self._stream, flush=True)
        elif event["event"] == "phase":
            self.phase(event["text"])
        elif event["event"] == "step" and not self._quiet:
            self._step(event)
        elif event["event"] == "warning":
            self.warning(event["text"])

    def warning(self, text: str) -> None:
        """One line, above the bar; an event where events are shown. Names in it may come from anywhere."""
        if self._json:
            print(json.dumps({"event": "warning", "text": text}), file=self._stream, flush=True)
        elif self._bar is not None:
            self._bar.write(f"warning: {printable(text)}", file=self._stream)
        else:
            self._end_phase()
            print(f"warning: {printable(text)}", file=self._stream, flush=True)

    def _step(self, event: dict[str, Any]) -> None:
        if self._before is None:  # steps that an earlier attempt did
            self._before = event["step"] - 1
        rate = event["tokens"] / event["seconds"] if event["seconds"] > 0 else 0.0
        stage = f"stage {event['stage']}  " if event.get("stage") is not None else ""
        figures = f"{stage}loss {event['loss']:.4f}  lr {event['learning_rate']:.2e}  {rate:,.0f} tokens/s"
        # By the steps of this attempt alone. tqdm would count the first of them as done in no time.
        left = event["seconds"] / (event["step"] - self._before) * (event["steps"] - event["step"])
        if not self._terminal:
            now = time.monotonic()
            last = event["step"] == event["steps"]
            if last or event["step"] == self._before + 1 or now - self._last_line > 10:
                self._last_line = now
                tail = "" if last else f"  {left:.0f} s left"
                print(f"step {event['step']}/{event['steps']}  {figures}{tail}", file=self._stream, flush=True)
            return
        if self._bar is None:
            self._end_phase()
            from tqdm import tqdm

            layout = "{percentage:3.0f}% |{bar:24}| step {n_fmt}/{total_fmt}  {desc}"
            self._bar = tqdm(
                total=event["steps"],
                initial=self._before,
                file=self._stream,
                bar_format=layout,
                dynamic_ncols=True,
                leave=True,
            )
        self._bar.set_description_str(f"{figures}  {self._bar.format_interval(left)} left", refresh=False)
        self._bar.update(event["step"] - self._bar.n)

    def close(self) -> None:
        """End the bar or the phase; what was drawn stays."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None
        self._end_phase()

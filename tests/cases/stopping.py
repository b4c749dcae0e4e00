"""`Stop` with a clock of its own."""

from __future__ import annotations


def follow(rank: int, world_size: int, *, limit_s: float | None, durations: list[float | list[float]]) -> int | None:
    """The step, from 1, after which a run stops whose steps take so long; a pair: with a checkpoint after it."""
    from apertus_nemo.training.stopping import Stop

    now = [100.0]
    stop = Stop(time_s=limit_s, clock=lambda: now[0])
    stop.begun()
    for number, duration in enumerate(durations, 1):
        step_s, *save_s = duration if isinstance(duration, list) else [duration]
        now[0] += step_s
        if stop.late():
            return number
        for seconds in save_s:
            now[0] += seconds
            stop.saved()
    return None

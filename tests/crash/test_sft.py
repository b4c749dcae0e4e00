"""Fine-tuning that is killed (SIGKILL), one rank or all, goes on at the exact conversation, to the same end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from apertus_nemo.testing.ranks import Parent
from tests.crash.kills import Kill, Survivor, same
from tests.integration.runs import CHAT, SAVED_STEP, Run
from tests.integration.test_sft import PACKED

TWICE = [Kill("step", 3, delay_s=0.02), Kill("commit", 1)]
AGAIN = [Kill("log", 2), Kill("step", SAVED_STEP + 2, delay_s=0.01), Kill("pruning", 1)]
AMONG_OTHERS = [Kill("step", SAVED_STEP + 2, victim=1, delay_s=0.02), Kill("save", 1, victim=1, all_ranks=True)]


@pytest.mark.full
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("layout", "more", "kills"),
    [
        pytest.param("one", (), AGAIN, id="one"),
        pytest.param("one", PACKED, TWICE, id="one packed"),
        pytest.param("dp2", (), AMONG_OTHERS, id="dp2"),
    ],
)
def test_killed(
    tuned: Callable[..., Run],
    parent: Parent,
    chats: Path,
    tmp_path: Path,
    layout: str,
    more: tuple[str, ...],
    kills: list[Kill],
) -> None:
    directory = Survivor(parent, chats, tmp_path / "run", layout, *CHAT, *more).survive(kills)
    undisturbed = tuned(layout, *more)
    same(directory, undisturbed.directory, undisturbed.steps)

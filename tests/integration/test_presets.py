"""xIELU's scalars as the published runs trained them: each tensor-parallel rank its own, kept, resumed and exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from apertus_nemo.record.lock import RunLock
from apertus_nemo.record.state import StateDigest, is_own, published_name
from apertus_nemo.testing.ranks import Parent
from tests.crash.kills import begin
from tests.integration.runs import SAVED_STEP, STEPS, Run
from tests.integration.test_export import exported, logged

PUBLISHED = "model.xielu_tensor_parallel_gradient=as_published"


def lanes(run: Run, step: int) -> dict[tuple[str, str], object]:
    """Of xIELU's scalars and their optimizer states."""
    path = run.directory.state(step)
    state = StateDigest.from_bytes(path.read_bytes(), what="state")
    return {(t.name, t.kind): t.lanes for t in state.tensors if ".act_fn." in t.name}


def test_one_rank_is_as_intended(runs: Callable[..., Run]) -> None:
    assert runs("one", PUBLISHED).steps == runs("one").steps


def test_each_rank_trains_its_own(runs: Callable[..., Run]) -> None:
    intended, published = runs("tp2"), runs("tp2", PUBLISHED)
    first, last = lanes(published, 0), lanes(published, STEPS)
    own = {key for key in last if is_own(key[0])}
    assert {name for name, _ in own} == {f"{name}.tp1" for name, _ in lanes(intended, STEPS)}
    for name, kind in own:
        beside = published_name(name), kind
        assert first[name, kind] == first[beside]  # all begin alike
        assert last[name, kind] != last[beside]  # and see other slices
    assert published.steps[1].loss == intended.steps[1].loss
    assert published.steps[1].grad_norm != intended.steps[1].grad_norm
    assert published.steps[STEPS].loss != intended.steps[STEPS].loss


@pytest.mark.full
def test_the_presets_differ_where_they_must(runs: Callable[..., Run], tmp_path: Path) -> None:
    """Under TP=2: weights and samples are the same; the warm-up's start, masks and ranks' own scalars are not."""
    chosen = {name: f"+preset={name}" for name in ("as_intended", "as_published")}
    intended, published = (runs("tp2", preset) for preset in chosen.values())
    first, second = intended.steps[1], published.steps[1]
    assert (first.learning_rate, second.learning_rate) == (pytest.approx(3e-5), 0.0)
    assert {key for key in lanes(intended, STEPS) if is_own(key[0])} == set()
    own = {key for key in lanes(published, STEPS) if is_own(key[0])}
    assert len(own) == len(lanes(intended, STEPS))
    assert {key: value for key, value in lanes(published, 0).items() if key not in own} == lanes(intended, 0)
    assert first.consumed_samples == second.consumed_samples
    assert first.batch_digest != second.batch_digest, "it covers which document a token is of, where that matters"
    assert intended.steps[STEPS].loss != published.steps[STEPS].loss
    said = {}
    for name, preset in chosen.items():
        lock = RunLock.from_bytes(begin(tmp_path / name, ["parallel=tp2", preset]).lock.read_bytes(), what="it")
        config = lock.tree["config"]
        said[name] = [
            config["model"].get("xielu_tensor_parallel_gradient"),
            config["data"]["document_masking"],
            config["schedule"]["warmup_init_lr"],
        ]
    assert said["as_published"] == ["as_published", "causal", 0.0]
    assert said["as_intended"][1:] == ["per_document", pytest.approx(3e-4)]
    assert said["as_intended"][0] in (None, "as_intended"), "a lock leaves out what is the default of a later key"


def test_what_was_stopped_goes_on_with_all_of_them(runs: Callable[..., Run]) -> None:
    whole = runs("tp2", PUBLISHED)
    rest = runs("tp2", PUBLISHED, checkpoint=whole.directory.checkpoint(SAVED_STEP))
    assert rest.steps == {number: record for number, record in whole.steps.items() if number > SAVED_STEP}
    assert rest.directory.state(STEPS).read_bytes() == whole.directory.state(STEPS).read_bytes()


def test_exports_hold_those_of_the_first_rank(runs: Callable[..., Run], parent: Parent, tmp_path: Path) -> None:
    run = runs("tp2", PUBLISHED)
    answer = exported(parent, run, tmp_path / "out", PUBLISHED)
    assert answer["digest"] == logged(run)


def test_restarts_as_the_published_runs_had_them(runs: Callable[..., Run]) -> None:
    """All ranks take the first one's, and go on elsewhere than the run that was not stopped."""
    restart = (f"{PUBLISHED}_restart", "reproducibility=relaxed")
    whole = runs("tp2", *restart)
    assert whole.steps[STEPS].loss == runs("tp2", PUBLISHED).steps[STEPS].loss  # nobody restarted it
    assert not any(is_own(name) for name, _ in lanes(whole, STEPS))
    rest = runs("tp2", *restart, checkpoint=whole.directory.checkpoint(SAVED_STEP))
    assert rest.steps[SAVED_STEP + 1].batch_digest == whole.steps[SAVED_STEP + 1].batch_digest
    assert rest.steps[STEPS].state_digest != whole.steps[STEPS].state_digest  # the losses may round to one float
    assert abs(rest.steps[STEPS].loss - whole.steps[STEPS].loss) < 0.01  # type: ignore[operator]

"""Adapters: every layout against one process, the frozen weights among them, stopped and resumed, done again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.data.corpus import embedded_chat
from apertus_nemo.record.state import StateDigest, is_adapter
from apertus_nemo.testing.ranks import Parent, RankFailed
from tests.integration.command import apertus, ranks_of, shell, started, wait_for
from tests.integration.runs import SAVED_STEP, SQUEEZED, STEPS, Run, Runs
from tests.integration.test_initial import export, weights_of
from tests.integration.test_layouts import COINS, FIRST_STEP, LATER_FACTOR, deviations

LORA = (
    "data=chat_embedded",
    "data.seq_length=160",
    "optim=[adamw]",
    "optim.lr=5e-3",
    "optim.min_lr=5e-4",
    "schedule=cosine",
    "schedule.decay_samples=68",
    "+adapter=lora",
)
LATER = [pytest.mark.full]
SHORT = ["tp2"]
FULL = ["pp2", "dp2", "tp2_sp", "pp2_vpp2", "cp2", "tp2_pp2"]


@pytest.fixture(scope="module")
def lora_parent() -> Iterator[Parent]:
    """As `parent`, with NeMo's PEFT."""
    root = str(Path(__file__).resolve().parents[2])
    with Parent(paths=[root], modules=["nemo.collections.llm.peft.lora"]) as running:
        yield running


@pytest.fixture(scope="module")
def tuned(lora_parent: Parent, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """`tuned(layout, ...)`: a short run of adapters on the embedded conversations, the weights drawn."""
    corpus = embedded_chat(cache / "apertus-nemo" / "corpus", 4096)
    runs = Runs(lora_parent, corpus, tmp_path_factory.mktemp("tuned"))

    def call(layout: str, *overrides: str, **options: Any) -> Run:
        return runs(layout, *LORA, *overrides, **options)

    return call


def state_of(run: Run, step: int) -> StateDigest:
    path = run.directory.state(step)
    return StateDigest.from_bytes(path.read_bytes(), what=str(path))


@pytest.mark.parametrize("layout", [*SHORT, *(pytest.param(name, marks=LATER) for name in FULL)])
def test_a_layout_is_one_process(tuned: Callable[..., Run], layout: str) -> None:
    one, other = tuned("one"), tuned(layout)
    assert other.directory.state(0).read_bytes() == one.directory.state(0).read_bytes()
    for step, record in one.steps.items():
        for value in ("batch_digest", "global_batch_size", "consumed_samples", "learning_rate"):
            assert getattr(other.steps[step], value) == getattr(record, value), (step, value)
    for value in ("loss", "grad_norm"):
        assert deviations(other, one, value)[0] < FIRST_STEP
    assert one.steps[STEPS].loss < one.steps[1].loss - 0.05


@pytest.mark.full
@pytest.mark.parametrize("value", ["loss", "grad_norm"])
@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_later_steps_stay_within_what_an_ulp_shows(tuned: Callable[..., Run], layout: str, value: str) -> None:
    one = tuned("one")
    moved = [deviations(tuned("one", perturb=coin), one, value) for coin in COINS]
    allowed = [max(FIRST_STEP, LATER_FACTOR * max(at_step)) for at_step in zip(*moved, strict=True)]
    seen = deviations(tuned(layout), one, value)
    assert all(s <= a for s, a in zip(seen, allowed, strict=True)), [seen, allowed]


def test_what_is_trained_and_what_is_frozen(tuned: Callable[..., Run]) -> None:
    """The first state holds both, the later ones what is trained; B begins at zero, and every matrix moves."""
    first, last = state_of(tuned("one"), 0), state_of(tuned("one"), STEPS)
    weights = {tensor.name: tensor for tensor in first.tensors if tensor.kind == "weight"}
    assert {is_adapter(name) for name in weights} == {True, False}
    assert all(is_adapter(tensor.name) for tensor in last.tensors)
    assert {tensor.name for tensor in last.tensors} == {name for name in weights if is_adapter(name)}
    assert len({tensor.name for tensor in last.tensors}) == 4 * (4 + 6)  # layers; A and B, of query, key, value three
    assert all(tensor.lanes == (0, 0, 0, 0) for name, tensor in weights.items() if ".lora_B." in name)
    moved = [tensor.name for tensor in last.tensors if tensor.kind == "weight" and tensor != weights[tensor.name]]
    assert len(moved) == 4 * (4 + 6)


def test_a_checkpoint_holds_adapters_alone(tuned: Callable[..., Run]) -> None:
    """Each tensor of it is an adapter's, or a state of one."""
    from apertus_nemo.convert.unpickle import check_metadata

    folder = tuned("one").directory.checkpoint(STEPS) / "weights"
    check_metadata(folder / ".metadata")
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    index = FileSystemReader(folder).read_metadata()
    tensors = [key for key, entry in index.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)]
    assert tensors
    assert all(".adapter.linear_" in key for key in tensors), tensors


@pytest.mark.parametrize("layout", ["one", *(pytest.param(name, marks=LATER) for name in ("tp2", "pp2_vpp2"))])
def test_it_goes_on_as_if_never_stopped(tuned: Callable[..., Run], layout: str) -> None:
    """A fresh process draws the frozen weights, and loads the checkpoint: the same bits at the end."""
    run = tuned(layout)
    resumed = tuned(layout, checkpoint=run.directory.checkpoint(SAVED_STEP))
    assert sorted(resumed.steps) == list(range(SAVED_STEP + 1, STEPS + 1))
    assert resumed.steps == {step: run.steps[step] for step in resumed.steps}
    assert resumed.directory.state(STEPS).read_bytes() == run.directory.state(STEPS).read_bytes()


@pytest.mark.full
@pytest.mark.parametrize("layout", ["tp2", "pp2_vpp2", "dp2"])
def test_another_layout_goes_on(tuned: Callable[..., Run], layout: str) -> None:
    """What one process saved, loaded under another cut: the state that was saved, bit for bit."""
    one = tuned("one")
    resumed = tuned(layout, checkpoint=one.directory.checkpoint(SAVED_STEP), fill=7.0)
    saved = {f"{tensor.name} {tensor.kind}": tensor.to_list()[2:] for tensor in state_of(one, SAVED_STEP).tensors}
    assert resumed.ranks[0]["start"] == saved


@pytest.mark.full
@pytest.mark.parametrize("layout", ["one", "tp2"])
def test_layers_computed_again_are_the_same_bits(tuned: Callable[..., Run], layout: str) -> None:
    """Of a frozen embedding, too, whose output asks for no gradient."""
    plain, again = tuned(layout), tuned(layout, "parallel.recompute=full")
    assert again.steps == plain.steps
    assert again.directory.state(STEPS).read_bytes() == plain.directory.state(STEPS).read_bytes()


@pytest.mark.full
def test_some_layers_alone(tuned: Callable[..., Run]) -> None:
    run = tuned("tp2", "adapter.targets=[linear_fc1,linear_proj]", "adapter.rank=2")
    names = {tensor.name for tensor in state_of(run, STEPS).tensors}
    assert len(names) == 4 * 4
    assert all(".up_proj.lora_" in name or ".o_proj.lora_" in name for name in names)


def test_frozen_weights_that_changed_are_told(tuned: Callable[..., Run]) -> None:
    """Another seed draws other ones: the checkpoint loads, and the run ends with their name before a step is done."""
    one = tuned("one")
    with pytest.raises(
        RankFailed, match=r"the frozen weights are not those that the run began with: lm_head\.weight is an"
    ):
        tuned(
            "one",
            "trainer.seed=29",
            checkpoint=one.directory.checkpoint(SAVED_STEP),
            first_state=str(one.directory.state(0)),
        )


@pytest.mark.full
def test_peft_computes_the_same(
    runs: Callable[..., Run], parent: Parent, lora_parent: Parent, tuned: Callable[..., Run], tmp_path: Path
) -> None:
    """Beside a folder's weights, under TP=2: exported adapters in peft, and merged ones, give our logits to 1e-5."""
    base = export(parent, runs("one"), tmp_path / "hf", shard_bytes=10**9)
    overrides = ["initial.kind=hugging_face", f"initial.path={base}"]
    run = tuned("tp2", *overrides, initial=str(base), initial_weights=weights_of(runs("one"), STEPS))
    first = state_of(run, 0)
    note = {"base": {"files": None, "weights_digests": [first.digest_of_kind("weight")]}, "source": None}
    arguments = {"checkpoint": str(run.directory.checkpoint(STEPS)), "base": str(base), "folder": str(tmp_path)}
    arguments |= {"overrides": [*SQUEEZED, *LORA, *overrides], "note": note}
    (answer,) = lora_parent.run("tests.cases.lora:converted", arguments=arguments)
    assert (answer["matrices"], answer["in_peft"]) == (4 * 12, 4 * 12)
    assert answer["adapted"] < 1e-5
    assert answer["merged"] < 1e-5
    assert answer["moved"] > 0.01, "the adapters do something"
    assert answer["base"] == "its weights digest"
    assert answer["same"]
    assert answer["digests"][0] == answer["digests"][1]


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("corpus")
def test_from_a_base_to_a_merged_folder(cache: Path, tmp_path: Path) -> None:
    """As typed: killed and resumed, relaunched: identical; exported, merged; where it is from; what is refused."""
    environment = shell(cache, tmp_path / "home")

    def command(*words: str) -> tuple[int, str, str]:
        done = apertus(words, folder=tmp_path, environment=environment, timeout_s=200.0)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout, done.stderr

    def typed(*words: str) -> str:
        code, out, err = command(*words)
        assert code == 0, out + err
        return out

    typed("train", "-q", "--run-dir", "base", *SQUEEZED, "trainer.max_steps=2")
    typed("convert", "export", "base", "hf")
    lora = ["recipe=tiny_lora", "initial.kind=hugging_face", "initial.path=hf", "trainer.max_steps=6"]
    words = ["train", "-q", "--run-dir", "lora", *lora, "trainer.checkpoint_every_steps=2"]
    with started(words, folder=tmp_path, environment=environment) as process:
        wait_for((tmp_path / "lora/checkpoints/step-000000002").is_dir, timeout_s=200, what="a checkpoint")
        for rank in ranks_of(process.pid):
            os.kill(rank, signal.SIGKILL)
        process.wait(60)
    typed("train", "-q", "--resume", "lora")
    assert "identical, 6 of 6 steps" in typed("relaunch", "lora", "-q", "--trust")
    assert "adapter digest" in typed("convert", "export", "lora", "adapter")
    assert "base the right one, by its files" in typed("convert", "merge", "hf", "adapter", "merged")
    assert "logged by lora at step 0" in typed("convert", "digest", "hf", "--run", "lora", "--step", "0")

    out = typed("lineage", "merged")
    assert out.startswith("back to its beginning, 2 links"), out
    assert "equal: lock digest; adapters after step 6; files of the checkpoint, by its manifest" in out
    assert "draws its weights from the seed" in out
    assert typed("lineage", "adapter").startswith("back to its beginning, 2 links")

    code, _, err = command("train", "-q", "recipe=tiny_lora", "initial.kind=run", "initial.path=lora")
    assert code == 2
    assert "the checkpoints of this run hold adapters, and no weights: export them, merge them with their base" in err
    code, _, err = command("train", "-q", "recipe=tiny_lora", "initial.kind=hugging_face", "initial.path=adapter")
    assert code == 2
    assert "this folder holds adapters, and no weights: merge them with their base" in err
    child = ["recipe=tiny_lora", "initial.kind=hugging_face", "initial.path=merged", "trainer.max_steps=1"]
    typed("train", "-q", "--run-dir", "child", *child)
    assert typed("lineage", "child").startswith("back to its beginning, 2 links")

    code, _, err = command("convert", "merge", "merged", "adapter", "other")
    assert code == 1
    assert "merged holds other weights than those beside which adapter was trained: their digest is" in err
    (tmp_path / "hf").rename(tmp_path / "away")
    (tmp_path / "merged").rename(tmp_path / "hf")
    code, _, err = command("train", "-q", "--run-dir", "lora", *lora, "trainer.checkpoint_every_steps=2")
    assert code == 2
    assert "holds a run that cannot go on like this: initial_state.files" in err


@pytest.mark.full
def test_in_bf16(tuned: Callable[..., Run]) -> None:
    """Adapters have float32 master weights, frozen weights none; stopped and resumed, the same bits."""
    run = tuned("tp2", "trainer.precision=bf16")
    kinds = {(is_adapter(tensor.name), tensor.kind, tensor.dtype) for tensor in state_of(run, 0).tensors}
    states = {(True, kind, "float32") for kind in ("master", "exp_avg_fast", "exp_avg_slow", "exp_avg_sq")}
    assert kinds == {(False, "weight", "bfloat16"), (True, "weight", "bfloat16"), *states}
    assert run.steps[STEPS].loss < run.steps[1].loss - 0.05
    resumed = tuned("tp2", "trainer.precision=bf16", checkpoint=run.directory.checkpoint(SAVED_STEP))
    assert resumed.directory.state(STEPS).read_bytes() == run.directory.state(STEPS).read_bytes()

"""Comparing runs: verdicts, the first difference at full precision, what is said to be unchecked, broken records."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.audit.compare import LockDifference, compare, lock_differences
from apertus_nemo.audit.report import text, tree
from apertus_nemo.cli.compare import main
from apertus_nemo.errors import InputError
from apertus_nemo.record.canonical import dumps
from apertus_nemo.record.state import StateDigest
from apertus_nemo.record.step_log import StepRecord
from tests.unit.record.example import make, state, step


def changed(number: int, **values: Any) -> Callable[[StepRecord], StepRecord]:
    return lambda record: replace(record, **values) if record.step == number else record


def changed_state(first: int, *keys: tuple[str, str]) -> Callable[[StateDigest], StateDigest]:
    def change(found: StateDigest) -> StateDigest:
        if found.step < first:
            return found
        tensors = [replace(t, lanes=(0, 0, 0, 0)) if (t.name, t.kind) in keys else t for t in found.tensors]
        return StateDigest.of(found.step, tensors)

    return change


def lines(a: Path, b: Path) -> list[str]:
    return text(compare(a, b)).splitlines()


def test_identical(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", run_id="2" * 32)
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out == (
        "identical, 20 of 20 steps, 132 of 132 tensors\n"
        "  states with equal digests: step 0, 10, 20\n"
        "  note: A ends at step 20 of 25 planned\n"
        "  note: B ends at step 20 of 25 planned\n"
        "  not compared: what was observed on the machines (observed.json)\n"
        "  not compared: files of checkpoints, state of random number generators, speed\n"
    )


def test_a_value_that_differs_in_the_last_bit(tmp_path: Path) -> None:
    make(tmp_path / "a")
    loss = math.nextafter(5.0 / 13, 1)
    make(tmp_path / "b", change=changed(13, loss=loss, grad_norm=0.25), run_id="2" * 32)
    result = compare(tmp_path / "a", tmp_path / "b")
    assert (result.verdict, result.exit_code, result.steps_equal, result.steps_total) == ("different", 1, 19, 20)
    assert text(result).splitlines()[:9] == [
        "different: step 13 differs in loss",
        "  19 of 20 steps are equal",
        "  step 13, the first with a different value:",
        "    loss (relative difference 1.44e-16)",
        "      A 0x1.89d89d89d89d9p-2 (0.38461538461538464)",
        "      B 0x1.89d89d89d89dap-2 (0.3846153846153847)",
        "    grad_norm (relative difference 0.897)",
        "      A 0x1.a41a41a41a41ap-6 (0.02564102564102564)",
        "      B 0x1.0000000000000p-2 (0.25)",
    ]


@pytest.mark.parametrize(
    ("values", "first"),
    [
        ({"batch_digest": "e" * 64, "loss": 1.0}, "batch_digest"),
        ({"learning_rate": 2e-3, "loss": 1.0, "grad_norm": 1.0}, "learning_rate"),
        ({"global_batch_size": 4, "consumed_samples": 100}, "consumed_samples"),
        ({"consumed_tokens": 4}, "consumed_tokens"),
        ({"grad_norm": math.nan}, "grad_norm"),
        ({"loss": None}, "loss"),
    ],
)
def test_causes_come_first(tmp_path: Path, values: dict[str, Any], first: str) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", change=changed(4, **values))
    result = compare(tmp_path / "a", tmp_path / "b")
    assert result.reason == f"step 4 differs in {first}"
    assert {item.name for item in result.values} == set(values)


def test_nan_equals_itself_and_zeros_have_signs(tmp_path: Path) -> None:
    make(tmp_path / "a", change=changed(4, loss=math.nan, grad_norm=0.0))
    make(tmp_path / "b", change=changed(4, loss=math.nan, grad_norm=0.0))
    make(tmp_path / "c", change=changed(4, loss=math.nan, grad_norm=-0.0))
    assert compare(tmp_path / "a", tmp_path / "b").exit_code == 0
    assert compare(tmp_path / "a", tmp_path / "c").reason == "step 4 differs in grad_norm"


def test_tensors_that_differ_are_named_in_the_first_state_that_does(tmp_path: Path) -> None:
    make(tmp_path / "a")
    keys = [(f"model.layers.{n}.mlp.up_proj.weight", kind) for n in (10, 2) for kind in ("weight", "exp_avg_slow")]
    make(tmp_path / "b", change_state=changed_state(10, *keys))
    found = lines(tmp_path / "a", tmp_path / "b")
    assert found[:7] == [
        "different: the state of step 10 differs",
        "  20 of 20 steps are equal",
        "  state of step 10, the first that differs: 4 of 132 tensors",
        "    model.layers.2.mlp.up_proj.weight (weight): float32 [16, 8]",
        "    model.layers.2.mlp.up_proj.weight (exp_avg_slow): float32 [16, 8]",
        "    model.layers.10.mlp.up_proj.weight (weight): float32 [16, 8]",
        "    model.layers.10.mlp.up_proj.weight (exp_avg_slow): float32 [16, 8]",
    ]
    assert found[7] == "  states with equal digests: step 0"
    make(tmp_path / "c", change_state=changed_state(0, keys[0]), change=changed(1, loss=1.0))
    assert lines(tmp_path / "a", tmp_path / "c")[0] == "different: the initial state differs"
    make(tmp_path / "d", change_state=changed_state(20, keys[0]), change=changed(17, loss=1.0))
    found = lines(tmp_path / "a", tmp_path / "d")
    assert found[0] == "different: step 17 differs in loss"
    assert "  state of step 20, the first that differs: 1 of 132 tensors" in found


def test_tensors_of_another_shape_or_in_one_run_only(tmp_path: Path) -> None:
    make(tmp_path / "a", states=(20,))

    def reshape(found: StateDigest) -> StateDigest:
        first, *rest = found.tensors[1:]
        return StateDigest.of(found.step, [replace(first, shape=(8, 16)), *rest])

    make(tmp_path / "b", states=(20,), change_state=reshape)
    found = lines(tmp_path / "a", tmp_path / "b")
    assert "  state of step 20, the first that differs: 2 of 132 tensors" in found
    gone, reshaped = state(20).tensors[:2]
    assert f"    {gone.name} ({gone.kind}): only in A" in found
    assert f"    {reshaped.name} ({reshaped.kind}): float32 [16, 8] in A, float32 [8, 16] in B" in found


def test_one_run_is_shorter(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", steps=17)
    found = lines(tmp_path / "a", tmp_path / "b")
    assert found[:2] == ["different: B ends at step 17, A goes on to step 20", "  17 of 20 steps are equal"]
    assert "  not compared: states that only A has a digest of: step 20" in found
    assert "  not compared: tensors after step 10: no later state has a digest in both" in found


def test_nothing_is_assumed(tmp_path: Path) -> None:
    make(tmp_path / "a", states=())
    make(tmp_path / "b", states=())
    reason = "no state has a digest in both, so nothing is proven of the tensors"
    assert lines(tmp_path / "a", tmp_path / "b")[0] == f"different: {reason}"
    make(tmp_path / "c", states=(0, 20))
    assert compare(tmp_path / "a", tmp_path / "c").reason == reason
    make(tmp_path / "d", steps=0)
    make(tmp_path / "e", steps=0)
    assert compare(tmp_path / "d", tmp_path / "e").reason == "no step was logged, so nothing is proven"
    make(tmp_path / "f", first=3)
    assert compare(tmp_path / "c", tmp_path / "f").reason == "2 steps stand in one log only"


def test_the_state_that_was_compared_is_said_when_it_is_not_the_last(tmp_path: Path) -> None:
    make(tmp_path / "a", states=(0, 10))
    make(tmp_path / "b", states=(0, 5, 10, 20))
    found = lines(tmp_path / "a", tmp_path / "b")
    assert found[0] == "identical, 20 of 20 steps, 132 of 132 tensors (at step 10)"
    assert "  not compared: states that only B has a digest of: step 5, 20" in found
    assert "  not compared: tensors after step 10: no later state has a digest in both" in found


def test_missing_lists_of_tensors(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b")
    b.state(20).unlink()
    assert lines(a.path, b.path)[0] == "identical, 20 of 20 steps, 132 of 132 tensors"
    a.state(20).unlink()
    found = lines(a.path, b.path)
    assert found[0] == "identical, 20 of 20 steps, every tensor by the state digest"
    assert "  not compared: tensors by name at step 20: neither run has step-000000020.json" in found
    c = make(tmp_path / "c", change_state=changed_state(10, (state(0).tensors[0].name, state(0).tensors[0].kind)))
    c.state(10).unlink()
    found = lines(b.path, c.path)
    assert found[0] == "different: the state of step 10 differs"
    assert "  not compared: tensors by name at step 10: the list of B is missing from states/" in found


def test_locks_that_differ_are_told_and_do_not_decide(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", micro_batch_size=4)
    result = compare(tmp_path / "a", tmp_path / "b")
    assert result.verdict == "identical"
    found = text(result).splitlines()
    place = found.index("  the locks differ:")
    assert found[place + 1 : place + 4] == [
        "    config.trainer.micro_batch_size: 2 in A, 4 in B",
        "    stages[0].micro_batch_size: 2 in A, 4 in B",
        "    stages[1].micro_batch_size: 2 in A, 4 in B",
    ]


def test_lock_differences_do_not_mix_types() -> None:
    a = {"x": 1, "y": [1, 2], "z": {"unknown": "why"}, "w": {"q": None}}
    b = {"x": True, "y": [1], "z": "abc", "w": {}}
    assert [(d.field, d.a, d.b) for d in lock_differences(a, b)] == [
        ("x", 1, True),
        ("y", [1, 2], [1]),
        ("z", {"unknown": "why"}, "abc"),
    ]


def test_a_run_against_its_copy_is_told(tmp_path: Path) -> None:
    run = make(tmp_path / "a")
    assert "  note: both have the same run id: one is a copy of the other, or they are one run" in lines(
        run.path, run.path
    )


def test_observations(tmp_path: Path) -> None:
    make(tmp_path / "a", observation="a" * 64)
    make(tmp_path / "b", observation="a" * 64)
    make(tmp_path / "c", observation="c" * 64)
    assert "observed" not in text(compare(tmp_path / "a", tmp_path / "b"))
    assert "  note: the machines' observations (observed.json) differ" in lines(tmp_path / "a", tmp_path / "c")
    (tmp_path / "c" / "observed.json").write_bytes(b"{}")
    assert "  note: B: observed.json is not the one that the log names" in lines(tmp_path / "a", tmp_path / "c")


def test_a_torn_last_line_is_never_identical(tmp_path: Path) -> None:
    a = make(tmp_path / "a")
    make(tmp_path / "b", run_id="2" * 32)
    with open(a.steps / "000000.jsonl", "ab") as stream:
        stream.write(b'{"batch_digest":"01')
    found = lines(a.path, tmp_path / "b")
    assert found[0] == "different: a run ended while it wrote its last line"
    assert any(line.startswith("  note: A: the last line is torn and was passed over") for line in found)


def broken(tmp_path: Path, harm: Callable[[Path], object]) -> str:
    make(tmp_path / "a")
    harm(make(tmp_path / "b").path)
    messages = set()
    for pair in (("a", "b"), ("b", "a")):
        with pytest.raises(InputError) as caught:
            compare(*(tmp_path / name for name in pair))
        messages.add(str(caught.value))
    (message,) = messages
    return message


def edit(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


def test_broken_records_end_the_comparison(tmp_path: Path) -> None:
    cases: list[tuple[Callable[[Path], object], str]] = [
        (lambda p: (p / "lock.json").unlink(), "is not a run directory: it holds no lock.json"),
        (lambda p: edit(p / "lock.json", b'"seed":28', b'"seed":29'), "the lock was changed or exchanged"),
        (
            lambda p: edit(p / "steps/000000.jsonl", b'"consumed_samples":40', b'"consumed_samples":41'),
            "line 8 (step 6): does not hold the SHA",
        ),
        (lambda p: (p / "steps/000000.jsonl").write_bytes(b""), "holds no step log"),
        (lambda p: (p / "states/step-000000020.json").write_bytes(b"{}"), "is not the digest of a state"),
        (lambda p: os.replace(p / "states/step-000000010.json", p / "states/step-000000020.json"), "changed or exch"),
        (lambda p: (p / "states/step-000000020.json").write_bytes(state(19).to_bytes()), "is the state of step 19"),
    ]
    for number, (harm, words) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert words in broken(folder, harm)


def test_a_difference_does_not_hide_a_broken_chain(tmp_path: Path) -> None:
    make(tmp_path / "a")
    b = make(tmp_path / "b", change=changed(2, loss=1.0))
    edit(b.steps / "000000.jsonl", b'"step":15}', b'"step":16}')
    with pytest.raises(InputError, match="line 17"):
        compare(tmp_path / "a", b.path)


def test_nothing_of_a_record_drives_the_terminal(tmp_path: Path) -> None:
    name = "w\x1b[31m"

    def rename(found: StateDigest) -> StateDigest:
        return StateDigest.of(found.step, [replace(found.tensors[0], name=name)])

    make(tmp_path / "a")
    make(tmp_path / "b", change_state=rename)
    assert "\x1b" not in text(compare(tmp_path / "a", tmp_path / "b"))


def test_nothing_of_a_record_fills_the_terminal(tmp_path: Path) -> None:
    """Not a tensor's name, and not the name of a field of the lock."""
    name = "w" * 100_000

    def rename(found: StateDigest) -> StateDigest:
        return StateDigest.of(found.step, [replace(found.tensors[0], name=name)])

    make(tmp_path / "a")
    make(tmp_path / "b", change_state=rename)
    result = compare(tmp_path / "a", tmp_path / "b")
    result.lock = [LockDifference(name, 1, name)]
    told = text(result)
    assert "wwwww...wwwwwwwwww" in told
    assert len(told) < 5000
    assert name in json.dumps(tree(result))


def test_json_holds_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a")
    first = state(0).tensors[0]
    make(tmp_path / "b", change=changed(3, loss=2.0), change_state=changed_state(10, (first.name, first.kind)))
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found == tree(compare(tmp_path / "a", tmp_path / "b"))
    assert (found["verdict"], found["exit_code"], found["state_step"]) == ("different", 1, 10)
    assert found["reason"] == "step 3 differs in loss"
    assert found["value_differences"] == [
        {
            "a": {"decimal": "1.6666666666666667", "hex": "0x1.aaaaaaaaaaaabp+0"},
            "b": {"decimal": "2.0", "hex": "0x1.0000000000000p+1"},
            "name": "loss",
            "step": 3,
        }
    ]
    assert [(t["name"], t["kind"]) for t in found["tensor_differences"]] == [(first.name, first.kind)]
    assert found["tensor_differences"][0]["b"] == ["float32", [16, 8], ["0" * 16] * 4]
    dumps(found)


def test_wrong_usage_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["only-one"])
    assert caught.value.code == 2
    assert "the following arguments are required: B" in capsys.readouterr().err


def test_no_heavy_module_is_imported(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b")
    script = (
        "import sys\nfrom apertus_nemo.cli.compare import main\ncode = main(sys.argv[1:])\n"
        "heavy = {'torch', 'numpy', 'nemo', 'megatron', 'hydra', 'omegaconf', 'yaml'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else code)"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a", tmp_path / "b"],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"identical, ")


def test_the_example_is_what_it_seems(tmp_path: Path) -> None:
    """So that no test above passes on an empty log."""
    run = make(tmp_path / "a")
    assert len((run.steps / "000000.jsonl").read_bytes().splitlines()) == 22
    assert step(3) != step(4)

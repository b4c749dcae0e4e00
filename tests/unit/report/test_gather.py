"""The data of a report, against what `verify`, `compare` and the record itself say."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.audit import report as compare_words
from apertus_nemo.audit import verify_report
from apertus_nemo.audit.compare import compare
from apertus_nemo.audit.verify import verify
from apertus_nemo.errors import InputError
from apertus_nemo.record.canonical import dumps
from apertus_nemo.record.copies import push
from apertus_nemo.record.relaunched import Relaunched
from apertus_nemo.record.step_log import read_steps
from apertus_nemo.report import page
from apertus_nemo.report.gather import gather
from tests.unit.record.example import make, step
from tests.unit.report.records import HOSTILE, events, lock_with, sealed


def one(record: Path | str, **options: Any) -> dict[str, Any]:
    run: dict[str, Any] = gather([str(record)], **options)["runs"][0]
    return run


def test_a_run(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "run")
    events(folder, 1, range(1, 21))
    run = one(folder)
    steps = [record for record in read_steps(folder / "steps") if record.step]
    for name in ("loss", "grad_norm", "learning_rate"):
        curve = run["curves"][name]
        assert dict(zip(curve["steps"], curve["values"], strict=True)) == {r.step: getattr(r, name) for r in steps}
    assert run["curves"]["tokens_per_second"]["last"] == (20, 120.0)
    theirs = verify_report.tree(verify(folder))
    assert {name: run["verification"][name] for name in theirs} == theirs
    assert run["verification"]["headline"] == "whole: finished at step 20"
    assert (run["last_step"], run["planned_steps"], run["tokens"]) == (20, 25, 5120)
    assert run["lineage"]["run_id"] == "1" * 32
    assert run["lineage"]["initial_state"] == {"initial state": "none: from the seed"}
    assert run["what"]["Recipe"]["overrides"] == "trainer.devices=4"
    assert run["what"]["Parallelism"]["tensor"] == "2"
    assert run["what"]["Data"]["manifest digest"] == f"sha256:{'d' * 64}"
    assert run["what"]["Source"]["commit"] == "c" * 40
    assert run["what"]["Source"]["uncommitted changes"] == "no"
    assert run["what"]["Environment"]["image"].startswith("unknown: no image")
    assert run["what"]["Environment"]["torch"] == "2.13.0+cpu"
    assert run["what"]["Machine"]["host"] == "example"
    assert [item["step"] for item in run["checkpoints"]["listed"]] == [10, 20]
    size = sum(p.stat().st_size for p in (folder / "checkpoints/step-000000010").rglob("*") if p.is_file())
    size -= (folder / "checkpoints/step-000000010/manifest.json").stat().st_size
    assert run["checkpoints"]["listed"][0] == {"files": 3, "size_bytes": size, "step": 10}
    assert run["notes"] == []
    json.dumps(run, allow_nan=False)


def test_throughput_that_was_not_recorded(tmp_path: Path) -> None:
    curve = one(sealed(tmp_path / "run"))["curves"]["tokens_per_second"]
    assert curve["absent"] == "not recorded: nothing of these steps stands in logs/tensorboard/"
    assert curve["steps"] == []


def test_runs_are_compared_with_the_first_and_called_by_their_letters(tmp_path: Path) -> None:
    folders = [make(tmp_path / "a").path, make(tmp_path / "b", run_id="2" * 32).path]
    folders.append(make(tmp_path / "c", change=lambda r: replace(r, loss=9.0) if r.step == 7 else r).path)
    folders.append(make(tmp_path / "d", steps=10, states=(0, 10)).path)
    report = gather([str(folder) for folder in folders])
    assert [(item["a"], item["b"], item["verdict"]) for item in report["comparisons"]] == [
        ("A", "B", "identical"),
        ("A", "C", "different"),
        ("A", "D", "different"),
    ]
    for item, folder in zip(report["comparisons"], folders[1:], strict=True):
        assert item["verdict"] == compare(folders[0], folder).verdict
    words = compare_words.text(compare(folders[0], folders[1])).splitlines()
    assert report["comparisons"][0]["headline"] == words[0] == "identical, 20 of 20 steps, 132 of 132 tensors"
    assert report["comparisons"][1]["headline"] == "different: step 7 differs in loss"
    assert f"    C {(9.0).hex()} (9.0)" in report["comparisons"][1]["details"]
    assert report["comparisons"][2]["headline"] == "different: D ends at step 10, A goes on to step 20"
    assert "D ends at step 10 of 25 planned" in report["comparisons"][2]["notes"]
    assert all(item["not_compared"] for item in report["comparisons"])


def test_a_relaunch_names_its_original(tmp_path: Path) -> None:
    first, again = make(tmp_path / "a"), make(tmp_path / "b", run_id="2" * 32)
    note = Relaunched("a" * 64, "1" * 32, {"host": "x"}, ("packages.numpy",))
    again.relaunch.write_bytes(note.to_bytes())
    of = {"lock_digest": "a" * 64, "run_id": "1" * 32}
    assert one(again.path)["lineage"]["relaunch_of"] == {**of, "label": None}
    runs = gather([str(first.path), str(again.path)])["runs"]
    assert [run["lineage"]["relaunch_of"] for run in runs] == [None, {**of, "label": "A"}]
    tree = {"relaunch_of": {"allowed": [{"field": "packages.numpy", "found": "2", "locked": "1"}], "lock_digest": "a"}}
    pinned = lock_with({})
    sealed(tmp_path / "c", pinned=type(pinned)({**pinned.tree, **tree}))
    assert one(tmp_path / "c")["lineage"]["allowed"] == [{"field": "packages.numpy", "found": "2", "locked": "1"}]


def test_what_a_run_began_with(tmp_path: Path) -> None:
    """Whatever a lock says of it, and by its letter the run that it names."""
    parent = sealed(tmp_path / "parent")
    digest = gather([str(parent)])["runs"][0]["lock_digest"]
    files = {f"weights-{number}.bin": f"{number:064x}" for number in range(9)}
    tree = {
        "carries": ["weights"],
        "files": files,
        "kind": "run",
        "parent": {"lock_digest": digest, "step": 20},
        "weights_digest": {"unknown": "the state of that step was not digested"},
    }
    child = sealed(tmp_path / "child", pinned=lock_with({"initial_state": tree}))
    report = gather([str(parent), str(child)])
    assert report["runs"][1]["lineage"]["initial_state"] == {
        "initial state": "run",
        "initial carries": "weights",
        "initial files": f"9, digest of the list sha256:{hashlib.sha256(dumps(files)).hexdigest()}",
        "initial parent": f"lock_digest={digest}, step=20 (the lock digest of A)",
        "initial weights digest": "unknown: the state of that step was not digested",
    }
    rows = next(group for group in page._what(report["runs"]) if group["name"] == "Run")["rows"]
    cells = {row["name"]: (row["cells"], row["differs"]) for row in rows}
    assert cells["initial state"] == (["none: from the seed", "run"], True)
    assert cells["initial carries"] == ([None, "weights"], True)
    for strange in ({}, [], {"unknown": "lost"}, "seed", 5):
        run = one(sealed(tmp_path / f"strange {strange}", pinned=lock_with({"initial_state": strange})))
        assert list(run["lineage"]["initial_state"]) == ["initial state"]


def test_each_stage_says_what_it_was_made_of(tmp_path: Path) -> None:
    run = one(sealed(tmp_path / "plain"))
    assert run["what"]["Stages"] == {
        "stage 1": "from step 1, samples 0 to 160, batch 8, seed 28",
        "stage 2": "from step 21, samples 160 to 240, batch 16, seed 28",
    }
    parts = [{"source": "library", "weight": 0.9}, {"source": "documentation", "weight": "by samples"}]
    stage = {"data": {"mixture": parts, "seed": 3, "seq_length": 64, "stage": "code"}, "from_sample": 0}
    stages = [stage | {"global_batch_size": 4, "to_sample": 80}, {"odd": 1}, 7, *range(60)]
    found = one(sealed(tmp_path / "odd", pinned=lock_with({"stages": stages})), check=False)["what"]["Stages"]
    assert found["stage 1"] == (
        "code: samples 0 to 80, batch 4, sequence 64, seed 3, library 0.9, documentation by samples"
    )
    assert (found["stage 2"], found["stage 3"], len(found)) == ("odd=1", "7", 41)
    assert found["stages in all"].startswith("63, digest of the list sha256:")


def test_lists_and_locks_that_differ_are_told_by_their_digests(tmp_path: Path) -> None:
    """As many packages, but not the same: the rows are not equal, and the field is named."""
    first = sealed(tmp_path / "a")
    other = lock_with({"packages.torch": {"version": "2.13.1+cpu"}, "data.stage": 5})
    second = sealed(tmp_path / "b", pinned=other)
    report = gather([str(first), str(second)])
    packages = [run["what"]["Environment"]["packages"] for run in report["runs"]]
    assert [text.split(",")[0] for text in packages] == ["1", "1"]
    assert packages[1].endswith(hashlib.sha256(dumps(other.tree["packages"])).hexdigest())
    assert packages[0] != packages[1]
    differences = {item["field"]: item for item in report["comparisons"][0]["lock_differences"]}
    assert differences["data.stage"] == {"a": "absent", "b": "5", "field": "data.stage"}


def test_a_changed_record_is_reported_as_changed(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "run")
    file = folder / "steps" / "000000.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[8] = lines[8].replace(step(7).loss.hex().encode(), (0.5).hex().encode())  # type: ignore[union-attr]
    file.write_bytes(b"".join(lines))
    report = gather([str(folder), str(make(tmp_path / "b").path)])
    found = report["runs"][0]["verification"]
    assert (found["verdict"], found["findings"][0]["step"]) == ("changed", 7)
    assert found["headline"].startswith("changed: steps/000000.jsonl line 9 (step 7)")
    assert report["comparisons"][0]["verdict"] is None
    assert report["comparisons"][0]["headline"].startswith("not compared: ")
    file.write_bytes(b"".join([*lines[:5], b"{}\n", *lines[6:]]))
    run = one(folder)
    assert run["last_step"] == 3
    assert run["notes"][0].startswith("the curves end after step 3: 000000.jsonl: is not a line of a step log")
    (folder / "lock.json").write_bytes(b"[]")
    assert one(folder)["notes"][1] == "what ran is not known: lock.json: is not a lock"
    assert one(folder)["verification"]["verdict"] == "changed"
    shutil.rmtree(folder / "steps")
    run = one(folder)
    assert run["curves"]["loss"]["absent"] == "not recorded: the log has no finite value of these steps"


def test_nothing_is_verified_where_it_was_not_asked_for(tmp_path: Path) -> None:
    folder = str(sealed(tmp_path / "run"))
    report = gather([folder, folder], check=False)
    for run in report["runs"]:
        assert run["verification"]["verdict"] is None
        assert run["verification"]["not_checked"] == ["anything: --no-verify was given"]
    comparison = report["comparisons"][0]
    assert (comparison["verdict"], comparison["headline"]) == (None, "not compared: --no-verify was given")


def test_a_copy_behind_an_url_and_its_curves(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "run")
    events(folder, 0, range(1, 21))
    url = "memory://reports/copy"
    push(folder, url)
    here, there = one(folder), one(url)
    assert there["verification"]["verdict"] == "whole"
    assert there["curves"]["loss"] == here["curves"]["loss"]
    assert there["curves"]["tokens_per_second"]["absent"].startswith("not recorded")  # copies hold no logs/
    assert there["what"] == here["what"]


@pytest.mark.parametrize("check", [True, False])
def test_what_is_no_record(tmp_path: Path, check: bool) -> None:
    with pytest.raises(InputError, match=r"is not the record of a run: it holds neither lock.json nor a step log"):
        gather([str(tmp_path)], check=check)
    with pytest.raises(InputError, match="is not a folder"):
        gather([str(tmp_path / "nothing")], check=check)
    with pytest.raises(InputError, match="27 runs are too many for one report: it shows 26 at most"):
        gather([str(tmp_path)] * 27, check=check)


def test_hostile_values_are_one_printable_line(tmp_path: Path) -> None:
    pinned = lock_with(
        {
            "config.name": HOSTILE,
            "config.trainer.seed": [[HOSTILE] * 100] * 100,
            "data": HOSTILE,
            "image": {"unknown": HOSTILE},
            "initial_state": HOSTILE,
            "overrides": [HOSTILE],
            "packages": None,
            "stages": 7,
        }
    )
    run = one(sealed(tmp_path / "run", pinned=pinned))
    assert len(run["what"]["Recipe"]["seed"]) <= 500

    def leaves(tree: Any) -> Any:
        if isinstance(tree, dict):
            for key, value in tree.items():
                yield key
                yield from leaves(value)
        elif isinstance(tree, list):
            for value in tree:
                yield from leaves(value)
        elif isinstance(tree, str):
            yield tree

    assert all(text.isprintable() for text in leaves(run)), [text for text in leaves(run) if not text.isprintable()]
    assert "\\u202egnp\\x1b[31m" in run["name"]

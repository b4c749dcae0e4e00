"""`lineage`: chains of records, each child's lock pinned by what pins it in a real start (`find_initial`)."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.audit import lineage as module
from apertus_nemo.audit.lineage import Lineage, lineage
from apertus_nemo.audit.lineage_checks import logged_state
from apertus_nemo.cli.main import main
from apertus_nemo.errors import InputError
from apertus_nemo.recipe.hf_config import to_hf
from apertus_nemo.recipe.schema import AdapterConfig, InitialConfig
from apertus_nemo.record.canonical import dumps, sha256_hex, unknown
from apertus_nemo.record.files import tree_manifest
from apertus_nemo.record.initial import EXPORTED, find_initial
from apertus_nemo.record.lock import RunLock, build_lock
from apertus_nemo.record.run_dir import RunDirectory
from apertus_nemo.record.state import StateDigest, TensorDigest
from apertus_nemo.record.step_log import StepLogHeader, StepLogWriter, StepRecord
from tests.unit.audit.sealed import checkpoint, small_state
from tests.unit.record.example import DATA, SURROUNDINGS, config, step

ROOT = Path(__file__).resolve().parents[3]
LAST = 20


def own_state(number: int, salt: int) -> StateDigest:
    """Of a step, another one for each salt."""
    tensors = [dataclasses.replace(tensor, lanes=(salt, number, 0, 1)) for tensor in small_state(number).tensors]
    return StateDigest.of(number, tensors)


def written(path: Path, lock: RunLock, *, salt: int, first: StateDigest | None = None, log: bool = True) -> Path:
    """A run of 20 steps with this lock: a log of several segments, states of steps 0, 10 and 20, two checkpoints."""
    run = RunDirectory.create(path, lock=lock, recipe_yaml="")
    states = {number: own_state(number, salt) for number in (0, 10, LAST)}
    if first is not None:
        states[0] = StateDigest.of(0, first.tensors)
    for number, state in states.items():
        run.state(number).write_bytes(state.to_bytes())
        if number:
            checkpoint(run.checkpoint(number), (number + 30 * salt) % 256)
            manifest = json.loads((run.checkpoint(number) / "manifest.json").read_bytes())
            (run.checkpoint(number) / "manifest.json").write_bytes(dumps({**manifest, "step": number}))
    if log:
        header = StepLogHeader(lock.digest, "1" * 32, unknown("an example"))
        with StepLogWriter.open(run.steps, header, segment_lines=8) as lines:
            for number in range(LAST + 1):
                record = StepRecord(step=0) if number == 0 else step(number)
                digest = states[number].digest if number in states else None
                lines.append(dataclasses.replace(record, state_digest=digest))
    return path


def lock_of(name: str, initial: InitialConfig | None = None, *, folder: Path | None = None) -> RunLock:
    """The lock that a start makes; `folder` in the place of what the recipe names, as a relaunch does it."""
    run = dataclasses.replace(config(), name=name, initial=initial or InitialConfig())
    found = find_initial(run, folder=folder)
    tree = None if found is None else found.tree
    return build_lock(run, overrides=[], environment={}, data=DATA, surroundings=SURROUNDINGS, initial=tree)


def base(path: Path, **values: Any) -> Path:
    """A run that draws its weights."""
    return written(path, lock_of("base"), salt=1, **values)


def child(path: Path, parent: Path, *, number: int = LAST, salt: int = 2, name: str = "child") -> Path:
    """A run from a checkpoint of another."""
    lock = lock_of(name, InitialConfig("run", str(parent), number))
    began = StateDigest.from_bytes(RunDirectory(parent).state(number).read_bytes(), what="")
    return written(path, lock, salt=salt, first=began)


def exported(path: Path, run: Path, *, weights: bool = True) -> Path:
    """What `convert export` leaves but for the tensors, which nothing here reads."""
    path.mkdir(parents=True)
    tree = to_hf(
        config().model, dtype="torch.float32", tokens={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    )
    (path / "config.json").write_text(json.dumps(tree))
    (path / "model.safetensors").write_bytes(b"weights")
    state = StateDigest.from_bytes(RunDirectory(run).state(LAST).read_bytes(), what="")
    source = {
        "checkpoint_manifest_sha256": sha256_hex((RunDirectory(run).checkpoint(LAST) / "manifest.json").read_bytes()),
        "lock_digest": sha256_hex((run / "lock.json").read_bytes()),
        "step": LAST,
        "weights_digest": state.digest_of_kind("weight") if weights else None,
    }
    note = {"format": 1, "kind": "apertus-nemo export", "source": source, "shard_bytes": 1}
    (path / EXPORTED).write_bytes(dumps(note))
    return path


def imported(path: Path, folder: Path) -> Path:
    """What `convert import` leaves of such a folder, but for the tensors."""
    path.mkdir(parents=True)
    (path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (path / "weights").write_bytes(b"weights")
    source = json.loads((folder / EXPORTED).read_bytes())["source"] if (folder / EXPORTED).exists() else None
    weights = source["weights_digest"] if source else "1" * 64
    note = {"files": {}, "format": 1, "kind": "apertus-nemo import", "nonfinite": [], "source": source}
    (path / EXPORTED).write_bytes(dumps({**note, "weights_digest": weights}))
    (path / "manifest.json").write_bytes(dumps({"files": tree_manifest(path), "step": 0, "version": 1}))
    return path


def from_folder(path: Path, folder: Path, parent: Path | None, *, kind: str = "hugging_face") -> Path:
    """A run from a folder of weights."""
    lock = lock_of("tuned", InitialConfig(kind, str(folder)))
    began = parent and StateDigest.from_bytes(RunDirectory(parent).state(LAST).read_bytes(), what="")
    return written(path, lock, salt=3, first=began)


def edited(path: Path, **fields: Any) -> None:
    """A lock with other fields, in canonical form, as a careful hand would leave it."""
    tree = json.loads((path / "lock.json").read_bytes())
    (path / "lock.json").write_bytes(dumps({**tree, **fields}))


def paths(chain: Lineage) -> list[Path]:
    return [member.path for member in chain.members]


def results(chain: Lineage, number: int = 0) -> dict[str, str]:
    return {check.what: check.result for check in chain.links[number].checks}


def test_a_run_that_draws_its_weights_is_its_own_beginning(tmp_path: Path) -> None:
    chain = lineage(base(tmp_path / "a"))
    assert (chain.end, chain.exit_code, chain.links) == ("beginning", 0, [])
    assert chain.reason == f"{tmp_path}/a draws its weights from the seed 28"


def of_adapters(path: Path, parent: Path) -> Path:
    """A run that trains adapters beside the weights of another: the first state holds both, later ones adapters."""
    run = dataclasses.replace(config(), name="lora", initial=InitialConfig("run", str(parent), LAST))
    run = dataclasses.replace(run, adapter=AdapterConfig(kind="lora"))
    found = find_initial(run)
    assert found is not None
    lock = build_lock(run, overrides=[], environment={}, data=DATA, surroundings=SURROUNDINGS, initial=found.tree)
    began = StateDigest.from_bytes(RunDirectory(parent).state(LAST).read_bytes(), what="")
    matrix = TensorDigest("model.layers.0.mlp.up_proj.lora_A.weight", "weight", "float32", (8, 4), (1, 2, 3, 4))
    made = written(path, lock, salt=5, first=StateDigest.of(0, [*began.tensors, matrix]), log=False)
    states = {0: StateDigest.of(0, [*began.tensors, matrix])}
    for number in (10, LAST):
        states[number] = StateDigest.of(number, [dataclasses.replace(matrix, lanes=(number, 2, 3, 4))])
        RunDirectory(made).state(number).write_bytes(states[number].to_bytes())
    header = StepLogHeader(lock.digest, "1" * 32, unknown("an example"))
    with StepLogWriter.open(RunDirectory(made).steps, header, segment_lines=8) as lines:
        for number in range(LAST + 1):
            record = StepRecord(step=0) if number == 0 else step(number)
            digest = states[number].digest if number in states else None
            lines.append(dataclasses.replace(record, state_digest=digest))
    return made


def merged(path: Path, run: Path, *, digest: str | None = None) -> Path:
    """What `convert merge` leaves of a run's adapters, but for the tensors."""
    folder = exported(path, run)
    note = json.loads((folder / EXPORTED).read_bytes())
    state = StateDigest.from_bytes(RunDirectory(run).state(LAST).read_bytes(), what="")
    source = {**note["source"], "adapter_digest": digest or state.adapter_digest, "weights_digest": "7" * 64}
    (folder / EXPORTED).write_bytes(dumps({"format": 1, "kind": "apertus-nemo merge", "source": source}))
    return folder


def test_through_adapters_that_were_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = base(tmp_path / "a")
    b = of_adapters(tmp_path / "b", a)
    folder = merged(tmp_path / "merged", b)
    chain = lineage(folder)
    assert (chain.end, chain.exit_code, paths(chain)) == ("beginning", 0, [folder, b, a])
    assert results(chain)["adapters after step 20"] == "equal"
    assert results(chain, 1)["weights that it began with"] == "equal"
    assert main(["lineage", str(folder)]) == 0
    assert "adapters after step 20 of the run" in capsys.readouterr().out
    c = from_folder(tmp_path / "c", folder, None)
    pinned = json.loads((c / "lock.json").read_bytes())["initial_state"]
    assert (pinned["weights_digest"], len(pinned["parent"]["adapter_digest"])) == ("7" * 64, 64)
    assert results(lineage(c))["adapters after step 20"] == "equal"
    other = lineage(merged(tmp_path / "other", b, digest="8" * 64))
    assert (other.end, other.exit_code) == ("contradicted", 1)
    assert other.reason.startswith("adapters after step 20: what ")


def test_a_run_of_adapters_is_no_start(tmp_path: Path) -> None:
    b = of_adapters(tmp_path / "b", base(tmp_path / "a"))
    with pytest.raises(InputError) as error:
        lock_of("child", InitialConfig("run", str(b), LAST))
    assert str(error.value) == (
        f"initial.path={b}: the checkpoints of this run hold adapters, and no weights: export them, merge them with "
        "their base (apertus-nemo convert merge), and start from that folder with initial.kind=hugging_face"
    )
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="this folder holds adapters, and no weights: merge them with their base"):
        lock_of("child", InitialConfig("hugging_face", str(tmp_path / "adapter")))


def test_one_link(tmp_path: Path) -> None:
    a = base(tmp_path / "a")
    b = child(tmp_path / "b", a, number=10)
    chain = lineage(b)
    assert (chain.end, chain.exit_code, paths(chain)) == ("beginning", 0, [b, a])
    assert chain.links[0].origin.step == 10
    assert chain.links[0].found == "recorded path"
    assert results(chain) == {
        "lock digest": "equal",
        "weights after step 10": "equal",
        "files of the checkpoint, by its manifest": "equal",
        "weights that it began with": "equal",
    }


def test_three_links_one_through_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = base(tmp_path / "pre" / "a")
    b = child(tmp_path / "long" / "b", a)
    hf = exported(tmp_path / "hf", b)
    c = from_folder(tmp_path / "sft" / "c", hf, b)
    out = exported(tmp_path / "out", c)
    assert main(["lineage", str(out), "--runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "back to its beginning, 3 links"
    assert lines[1] == f"  {out}, a folder"
    digest = sha256_hex((c / "lock.json").read_bytes())
    assert lines[2] == (
        f"    weights after step 20 of the run {digest}, from a folder that was exported from it; found: beside"
    )
    assert lines[3] == "    equal: lock digest; weights after step 20; files of the checkpoint, by its manifest"
    assert lines[4].startswith("    not checked: weights of the folder: ")
    assert lines[5] == f"  {c}, tuned, lock digest {digest}"
    assert lines[-1] == f"  end: {a} draws its weights from the seed 28"

    assert main(["lineage", str(out), "--runs", str(tmp_path), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert [item["path"] for item in tree["members"]] == [str(path) for path in (out, c, b, a)]
    assert [item["kind"] for item in tree["members"]] == ["folder", "run", "run", "run"]
    assert [item["through"] for item in tree["links"]] == ["hugging_face", "hugging_face", "run"]
    assert [item["found"] for item in tree["links"]] == ["beside", "--runs", "recorded path"]
    assert (tree["end"], tree["exit_code"], tree["format"]) == ("beginning", 0, 1)

    chain = lineage(out, runs=[tmp_path], max_links=2)
    assert (chain.end, chain.exit_code, len(chain.links)) == ("too long", 0, 2)


def test_where_a_parent_is_looked_for(tmp_path: Path) -> None:
    a = base(tmp_path / "there" / "a")
    b = child(tmp_path / "runs" / "b", a)
    moved = tmp_path / "elsewhere" / "x"
    shutil.move(str(a.parent), moved.parent)
    moved.parent.joinpath("a").rename(moved)

    chain = lineage(b)
    digest = sha256_hex((moved / "lock.json").read_bytes())
    assert (chain.end, chain.exit_code, paths(chain)) == ("not found", 0, [b])
    assert chain.reason == (
        f"no run with the lock digest {digest} was found in {a}, {tmp_path}/runs; --runs DIR says where else to look"
    )
    assert results(chain) == {"weights that it began with": "equal"}

    attempt = b / "attempts" / "000"
    attempt.mkdir()
    (attempt / "environment.json").write_text(json.dumps({"APERTUS_INITIAL": f"{moved}/checkpoints/step-000000020"}))
    chain = lineage(b)
    assert (chain.end, paths(chain), chain.links[0].found) == ("beginning", [b, moved], "recorded path")
    (attempt / "environment.json").unlink()

    chain = lineage(b, runs=[tmp_path / "elsewhere"])
    assert (chain.end, paths(chain), chain.links[0].found) == ("beginning", [b, moved], "--runs")

    shutil.move(moved, tmp_path / "runs" / "y")
    chain = lineage(b)
    assert (chain.end, paths(chain), chain.links[0].found) == ("beginning", [b, tmp_path / "runs" / "y"], "beside")


def test_a_folder_that_is_not_ours(tmp_path: Path) -> None:
    hf = exported(tmp_path / "hf", base(tmp_path / "a"))
    (hf / EXPORTED).unlink()
    chain = lineage(hf)
    reason = f"holds no {EXPORTED}: it was not exported from a run of ours"
    assert (chain.end, chain.exit_code, chain.reason) == ("not exported", 0, f"{hf} {reason}")
    c = from_folder(tmp_path / "c", hf, None)
    chain = lineage(c)
    assert (chain.end, chain.exit_code) == ("not exported", 0)
    assert chain.reason == f"{c} starts from {hf}: the folder {reason}"


def test_what_cannot_be_checked_is_said(tmp_path: Path) -> None:
    a = base(tmp_path / "a")
    b = child(tmp_path / "b", a)
    shutil.rmtree(RunDirectory(a).checkpoint(LAST))
    RunDirectory(a).state(LAST).unlink()
    chain = lineage(b)
    assert (chain.end, chain.exit_code) == ("beginning", 0)
    said = {check.what: check.reason for check in chain.links[0].checks if check.result == "not checked"}
    assert said == {
        "weights after step 20": f"{a} holds no state of step 20",
        "files of the checkpoint": f"{a} no longer holds the checkpoint of step 20",
    }
    hf = exported(tmp_path / "hf", b, weights=False)
    said = {check.what: check.reason for check in lineage(hf).links[0].checks if check.result == "not checked"}
    assert said["weights after step 20"] == "their digest is unknown: nobody has logged it"


def test_a_state_that_no_log_names_is_not_taken_for_checked(tmp_path: Path) -> None:
    a = base(tmp_path / "a", log=False)
    chain = lineage(child(tmp_path / "b", a))
    assert results(chain)["weights after step 20"] == "not checked"


def test_a_relaunch_of_the_parent_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has the lock of its original; of those that have it, the one whose weights fit is taken."""
    a = base(tmp_path / "z")
    b = child(tmp_path / "b", a)
    written(tmp_path / "a", lock_of("base"), salt=9)  # with the same lock, and other weights
    other = base(tmp_path / "c")
    shutil.rmtree(RunDirectory(other).checkpoint(LAST))
    checkpoint(RunDirectory(other).checkpoint(LAST), 99)
    manifest = json.loads((RunDirectory(other).checkpoint(LAST) / "manifest.json").read_bytes())
    (RunDirectory(other).checkpoint(LAST) / "manifest.json").write_bytes(dumps({**manifest, "step": LAST}))
    shutil.rmtree(a)
    chain = lineage(b)
    assert (chain.end, chain.exit_code, paths(chain)) == ("beginning", 0, [b, other])
    assert results(chain)["weights after step 20"] == "equal"
    assert results(chain)["files of the checkpoint"] == "not checked"
    [(path, check)] = chain.links[0].passed_over
    assert (path, check.what) == (tmp_path / "a", "weights after step 20")
    assert main(["lineage", str(b)]) == 0
    over = f"    passed over: {path}: weights after step 20: what {path} logged has the digest "
    assert any(line.startswith(over) for line in capsys.readouterr().out.splitlines())
    assert main(["lineage", str(b), "--json"]) == 0
    [link] = json.loads(capsys.readouterr().out)["links"]
    assert link["passed_over"] == [{"path": str(path), "reason": check.reason, "what": check.what}]


def test_other_weights_contradict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = base(tmp_path / "a")
    b = child(tmp_path / "b", a)
    pinned = own_state(LAST, 1).digest_of_kind("weight")
    shutil.rmtree(a)
    written(a, lock_of("base"), salt=9)
    found = own_state(LAST, 9).digest_of_kind("weight")
    assert main(["lineage", str(b)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "contradicted, 1 link"
    assert lines[-1] == (
        f"  end: weights after step 20: what {a} logged has the digest {found}, and {pinned} was pinned"
    )
    assert main(["lineage", str(b), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["end"] == "contradicted"


def test_a_child_that_began_with_other_weights_contradicts(tmp_path: Path) -> None:
    a = base(tmp_path / "a")
    lock = lock_of("child", InitialConfig("run", str(a), LAST))
    chain = lineage(written(tmp_path / "b", lock, salt=2))
    assert chain.exit_code == 1
    assert chain.reason.startswith(f"weights that it began with: the first state of {tmp_path}/b has the digest ")


@pytest.mark.parametrize("number", [0, 10, LAST])
def test_a_state_that_was_exchanged(tmp_path: Path, number: int) -> None:
    a = base(tmp_path / "a")
    b = child(tmp_path / "b", a)
    hit, at = (b, 0) if number == 0 else (a, number)
    RunDirectory(hit).state(at).write_bytes(own_state(at, 77).to_bytes())
    chain = lineage(b)
    path = RunDirectory(hit).state(at)
    assert chain.exit_code == (0 if number == 10 else 1), "the state of another step is none of this link"
    if number != 10:
        assert chain.reason.endswith(f"{path} is not the state that the step log of {hit} names")


def test_a_lock_that_was_changed(tmp_path: Path) -> None:
    a = base(tmp_path / "a")
    b = child(tmp_path / "b", a)
    before = sha256_hex((a / "lock.json").read_bytes())
    edited(a, level="relaxed")
    after = sha256_hex((a / "lock.json").read_bytes())
    chain = lineage(b)
    assert (chain.end, paths(chain)) == ("contradicted", [b])
    assert chain.reason == (
        f"lock digest: the step log of {a} is of the run that is looked for, and its lock.json is another, "
        f"of digest {after}: it was changed or exchanged"
    )
    chain = lineage(a)
    assert (chain.end, chain.exit_code) == ("contradicted", 1)
    assert chain.reason == (
        f"{a}/lock.json has the digest {after}, and its step log is of a lock with {before}: "
        "it was changed or exchanged"
    )


def test_a_cycle_can_only_be_forged_and_ends(tmp_path: Path) -> None:
    a = base(tmp_path / "a")
    b = child(tmp_path / "b", a)
    tree = json.loads((b / "lock.json").read_bytes())["initial_state"]
    parent = {"lock_digest": sha256_hex((b / "lock.json").read_bytes()), "step": LAST}
    edited(a, initial_state={**tree, "parent": parent})
    chain = lineage(b)
    assert (chain.end, paths(chain)) == ("contradicted", [b])


def test_a_parent_that_this_version_cannot_read_further(tmp_path: Path) -> None:
    tree = dict(lock_of("base").tree)
    a = written(tmp_path / "a", RunLock({**tree, "initial_state": {"kind": "telepathy"}}), salt=1)
    chain = lineage(child(tmp_path / "b", a))
    assert (chain.end, chain.exit_code, len(chain.members)) == ("unreadable", 0, 2)
    assert chain.reason == f"{a}/lock.json: this version knows no initial state of kind 'telepathy'"
    c = written(tmp_path / "c", RunLock({**tree, "initial_state": unknown("not looked at")}), salt=1)
    chain = lineage(child(tmp_path / "d", c, name="d"))
    assert (chain.end, chain.reason) == ("unreadable", f"{c}: what it starts from is unknown: not looked at")


def test_through_a_folder_that_was_imported(tmp_path: Path) -> None:
    """A run from it, and the folder itself; of weights that are of no run of ours, too."""
    a = base(tmp_path / "a")
    megatron = imported(tmp_path / "megatron", exported(tmp_path / "hf", a))
    b = from_folder(tmp_path / "b", megatron, a, kind="megatron")
    for chain, first in ((lineage(b), b), (lineage(megatron), megatron)):
        assert (chain.end, paths(chain)) == ("beginning", [first, a])
        assert results(chain)["lock digest"] == "equal"
    assert lineage(b).links[0].through == "megatron"
    (tmp_path / "hf" / EXPORTED).unlink()
    other = imported(tmp_path / "other", tmp_path / "hf")
    chain = lineage(other)
    assert (chain.end, chain.exit_code, paths(chain)) == ("not exported", 0, [other])
    assert chain.reason == f"{other}: the weights were imported from a folder that was not exported by us"
    c = from_folder(tmp_path / "c", other, None, kind="megatron")
    chain = lineage(c)
    assert (chain.end, paths(chain)) == ("not exported", [c])
    assert chain.reason == f"{c} starts from {other}: {EXPORTED} in the folder names no run of ours"
    back = {"weights_digest": "1" * 64}
    (tmp_path / "hf" / EXPORTED).write_bytes(dumps({"format": 1, "kind": "apertus-nemo export", "source": back}))
    chain = lineage(tmp_path / "hf")
    assert (chain.end, paths(chain)) == ("not exported", [tmp_path / "hf"])


HOSTILE = "\x1b[2J\x07\n\u202eevil" + "x" * 5000


def test_hostile_text_stays_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = base(tmp_path / "a")
    hf = exported(tmp_path / "hf", a)
    tree = dict(lock_of("tuned", InitialConfig("hugging_face", str(hf))).tree)
    tree["config"] = {**tree["config"], "name": HOSTILE, "initial": {"path": HOSTILE}, "trainer": HOSTILE}
    tree["initial_state"] = {**tree["initial_state"], "weights_digest": unknown(HOSTILE)}
    b = written(tmp_path / "b", RunLock(tree), salt=2)
    (b / "attempts" / "000").mkdir()
    for note in ("[]", json.dumps({"APERTUS_INITIAL": "\0"}), json.dumps({"APERTUS_INITIAL": "/dev/zero"})):
        (b / "attempts" / "000" / "environment.json").write_text(note)
        assert main(["lineage", str(b)]) == 0
        out = capsys.readouterr().out
        assert all(line.isprintable() and len(line) < 600 for line in out.splitlines())
        assert "evil" in out
    assert main(["lineage", str(b), "--json"]) == 0
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.splitlines())
    assert json.loads(out)["members"][0]["name"] == HOSTILE


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([], "does not say what the run starts from"),
        ({"kind": "run", "parent": None}, "initial_state: names no run by its lock digest"),
        ({"kind": "run", "parent": {"lock_digest": "a" * 63, "step": 1}}, "initial_state: names no run by its lock"),
        ({"kind": "run", "parent": {"lock_digest": "a" * 64, "step": -1}}, "initial_state: names no step of that run"),
        ({"kind": "run", "parent": {"lock_digest": "a" * 64, "step": 10**9}}, "initial_state: names no step"),
        (
            {"kind": "run", "parent": {"lock_digest": "a" * 64, "step": 1}, "weights_digest": HOSTILE},
            "initial_state: the weights digest is no SHA-256",
        ),
        ({"kind": HOSTILE}, "this version knows no initial state of kind "),
    ],
)
def test_a_lock_that_makes_no_sense(
    tmp_path: Path, state: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written(tmp_path / "a", RunLock({**lock_of("base").tree, "initial_state": state}), salt=1)
    assert main(["lineage", str(run)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert all(line.isprintable() for line in error.splitlines())


def test_bad_input(tmp_path: Path) -> None:
    a = base(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    hf = exported(tmp_path / "hf", a)
    (hf / EXPORTED).write_text('{"source": 7}')
    for path, message in [
        (tmp_path / "none", "is not a folder: give a run directory, or a folder that was exported from one"),
        (tmp_path / "empty", "is neither a run directory nor a folder of a model: it holds no lock.json, no "),
        (hf, "apertus-nemo.json does not say which run it was exported from"),
    ]:
        with pytest.raises(InputError, match=message):
            lineage(path)
    with pytest.raises(InputError, match="is not a folder"):
        lineage(a, runs=[tmp_path / "none"])
    (hf / EXPORTED).write_text('{"source": ')
    with pytest.raises(InputError, match="is not JSON"):
        lineage(hf)
    (a / "lock.json").write_text("{}")
    with pytest.raises(InputError, match="is not a lock"):
        lineage(a)


def test_the_line_of_a_step_is_found_in_any_segment(tmp_path: Path) -> None:
    a = base(tmp_path / "a")
    assert len(list((a / "steps").iterdir())) == 3
    assert {n: logged_state(a, n) for n in (0, 5, 10, LAST, LAST + 1)} == {
        **{n: own_state(n, 1).digest for n in (0, 10, LAST)},
        5: None,
        LAST + 1: None,
    }


def test_it_imports_nothing_heavy(tmp_path: Path) -> None:
    child(tmp_path / "b", base(tmp_path / "a"))
    probe = (
        "import sys; from apertus_nemo.cli.main import main; main(sys.argv[1:]); "
        "print(sorted({'torch', 'numpy', 'nemo', 'megatron', 'yaml', 'hydra'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, "lineage", str(tmp_path / "b")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines()[0] == "back to its beginning, 1 link"
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_page_names_every_end() -> None:
    text = (ROOT / "docs" / "lineage.md").read_text()
    ends = [module.BEGINNING, module.NOT_OURS, module.NOT_FOUND, module.UNREADABLE, module.TOO_LONG]
    for end in [*ends, module.CONTRADICTED]:
        assert f"| `{end}` | {Lineage(end=end).exit_code} |" in text
    assert f"more than {module.MAX_LINKS} links" in text

"""A record that was edited by hand: every command that takes one says so in one line, and leaves it as it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.cli.main import main
from apertus_nemo.record.canonical import dumps, loads
from apertus_nemo.record.files import tree_manifest
from tests.unit.audit.sealed import make_sealed

LONG = 100_000  # lines of a segment
EXIT_CODES = {"train": 2, "relaunch": 2, "compare": 2, "verify": 1, "runs": 0}


def edited(tree: dict[str, Any], path: str, value: Any) -> bytes:
    """The lock with one field changed, as one would who knows canonical JSON; ... removes it."""
    tree = copy.deepcopy(tree)
    node = tree
    *parents, last = path.split(".")
    for parent in parents:
        node = node[parent]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return dumps(tree)


EDITS: dict[str, tuple[str, Any]] = {
    "a value": ("config.optim.lr", 0.002),
    "a type": ("config.model.num_layers", "x"),
    "a size": ("config.model.num_layers", 2**52),
    "ranks": ("config.trainer.devices", 10**6),
    "no recipe": ("config", {}),
    "no tree": ("config", 5),
    "overrides": ("overrides", 5),
    "an unknown key": ("config.optim.foo", 1),
    "a field more": ("host", "x"),
    "a field less": ("data", ...),
    "no data": ("data", None),
    "stages": ("stages", [5]),
    "steps": ("config.trainer.max_steps", 10**15),
    "environment": ("environment", {"LD_PRELOAD": "/tmp/x.so"}),
    "a name that drives": ("config.name", "a\x1b[2J"),
    "a note of a relaunch": ("relaunch_of", 5),
}
BYTES: dict[str, bytes] = {
    "empty": b"",
    "zeros": bytes(500),
    "half": b'{"config":{"data"',
    "spaces": b'{ "config": 5 }',
}


@pytest.mark.parametrize("edit", [*EDITS, *BYTES])
def test_an_edited_lock(
    tmp_path: Path, edit: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = make_sealed(tmp_path / "run", finished=False, segment_lines=LONG)
    lock = run / "lock.json"
    tree = loads(lock.read_bytes(), what="lock.json")
    lock.write_bytes(BYTES[edit] if edit in BYTES else edited(tree, *EDITS[edit]))
    before = tree_manifest(run)
    commands = {
        "train": ["train", "--allow-dirty", "--resume", str(run)],
        "relaunch": ["relaunch", "--trust", str(run), "--run-dir", str(tmp_path / "again")],
        "compare": ["compare", str(run), str(run)],
        "verify": ["verify", str(run)],
        "runs": ["runs", str(run)],
    }
    for verb, code in EXIT_CODES.items():
        assert main(commands[verb]) == code, verb
        output = capsys.readouterr()
        told = output.err if code == 2 else output.out
        assert "lock.json" in told, (verb, told)
        assert told.replace("\n", "").isprintable()
        if code == 2:
            assert len(told.splitlines()) == 1, (verb, told)
    assert main(["logs", str(run)]) == 0, "needs no lock"
    assert tree_manifest(run) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"], "nothing was prepared or begun"


def test_the_words_for_an_edited_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_sealed(tmp_path / "run", finished=False, segment_lines=LONG)
    lock = run / "lock.json"
    tree = loads(lock.read_bytes(), what="lock.json")
    named = loads((run / "steps" / "000000.jsonl").read_bytes().splitlines()[0], what="")["lock_digest"]
    lock.write_bytes(edited(tree, "config.optim.lr", 0.002))
    assert main(["train", "--allow-dirty", "--resume", str(run)]) == 2
    assert capsys.readouterr().err == (
        f"apertus-nemo: {lock} is not the lock of the step log, whose digest is {named}: it was changed or exchanged; "
        "put the first one back, or choose another folder\n"
    )
    assert main(["relaunch", "--trust", str(run), "--run-dir", str(tmp_path / "again")]) == 2
    assert capsys.readouterr().err.startswith(
        f"apertus-nemo: {lock} is not the lock of the step log, and {run / 'recipe.yaml'}, the second copy of the "
        "recipe, is no whole one: "
    )
    assert main(["runs", str(run)]) == 0
    assert capsys.readouterr().out.endswith(
        "cannot be read: lock.json is not the lock of the step log: it was changed or exchanged\n"
    )


def test_an_edited_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A loss that was made nicer: the next line holds another hash."""
    run = make_sealed(tmp_path / "run", finished=False, segment_lines=LONG)
    log = run / "steps" / "000000.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    lines[9] = lines[9].replace(b'"loss":"0x1', b'"loss":"0x0', 1).replace(b"0x0.", b"0x1.8", 1)
    log.write_bytes(b"".join(lines))
    assert main(["verify", str(run)]) == 1
    assert "steps/000000.jsonl line 10" in capsys.readouterr().out
    assert main(["compare", str(run), str(run)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"apertus-nemo: {log} line 1")
    assert len(told.splitlines()) == 1

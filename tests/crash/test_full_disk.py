"""A disk that is really full, at each kind of write: one line, nothing lost, and the same end once there is space."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from apertus_nemo.audit.verify import verify
from apertus_nemo.audit.verify import verify as verify_record
from apertus_nemo.errors import UnfitEnvironment
from apertus_nemo.record.copies import pull, push
from apertus_nemo.testing.ranks import Parent
from tests.crash.kills import Survivor, begin, same
from tests.crash.small_disk import SmallDisk, small_disk
from tests.integration.command import TRAIN, apertus, shell, started, wait_for
from tests.integration.runs import SQUEEZED, STEPS, Run
from tests.unit.audit.sealed import SEGMENT_LINES, make_sealed

SIZE_BYTES = 192 * 2**20  # a checkpoint of these runs has 25 MB, and two are there when one is pruned
ADVICE = "the disk is full; free some space, then run the command again"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A small file system."""
    with small_disk(tmp_path / "disk", size_bytes=SIZE_BYTES) as made:
        yield made


# Moment (tests/cases/crash.py), how often it has come, and the file that could not be written.
PARTIAL = "attempts/000/checkpoint-step-000000006.partial"
WRITES = {
    "the observation": ("open /.observed.json.", 1, "observed.json"),
    "the header of the step log": ("open /steps/000000.jsonl", 1, "steps/000000.jsonl"),
    "a line of the step log": ("log", 9, "steps/000000.jsonl"),
    "a state": ("state", 2, "states/step-000000006.json"),
    "a seal": ("open /.seal.json.", 1, "attempts/000/seal.json"),
    "a checkpoint": ("save", 1, PARTIAL),
    "tensors of a checkpoint": ("open .distcp", 1, PARTIAL),
    "metadata of a checkpoint": ("open /weights/.metadata", 1, PARTIAL),
    "a manifest": ("open /.manifest.json.", 1, f"{PARTIAL}/manifest.json"),
    "the list of checkpoints, before a commit": ("note", 1, "checkpoints.json"),
    "the list of checkpoints, after it": ("committed", 2, "checkpoints.json"),
    "the end": ("open /.end.json.", 1, "end.json"),
    "the seal of the end": ("open /.seal.json.", 3, "attempts/000/seal.json"),
}


SHORT = ("a line of the step log", "tensors of a checkpoint")  # in the short tier


@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.full) for name in WRITES]
)
def test_full_while_training(
    runs: Callable[..., Run], parent: Parent, corpus: Path, disk: SmallDisk, name: str
) -> None:
    moment, number, file = WRITES[name]
    survivor = Survivor(parent, corpus, disk.folder / "run", "one")
    more = {"moment": moment, "number": number, "disk": str(disk.folder)}
    (answer,) = survivor.attempt(None, function="tests.cases.crash:filled", **more)
    assert answer == {"error": f"could not write {disk.folder / 'run' / file}: {ADVICE}", "exit_code": 3}
    so_far = verify(disk.folder / "run")
    assert (so_far.findings, so_far.finished, so_far.removed) == ([], name == "the seal of the end", [])
    disk.free()
    survivor.attempt(None)
    undisturbed = runs("one")
    same(survivor.directory, undisturbed.directory, undisturbed.steps)


def refused(arguments: list[str], folder: Path, environment: dict[str, str]) -> str:
    """What a command says that this disk does not allow."""
    done = apertus(arguments, folder=folder, environment=environment)
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    return done.stderr


@pytest.fixture
def environment(cache: Path, corpus: Path, tmp_path: Path) -> dict[str, str]:
    """A user's shell; the embedded corpus is there."""
    return shell(cache, tmp_path / "home")


def test_full_at_the_start(tmp_path: Path, disk: SmallDisk, environment: dict[str, str]) -> None:
    run = disk.folder / "run"
    start = [*TRAIN, "--quiet", "--run-dir", str(run), *SQUEEZED]
    disk.fill()
    line = f"apertus-nemo: could not write {run}/{{}}: {ADVICE}\n"
    assert refused(start, tmp_path, environment) == line.format("source.tar")
    assert not (run / "lock.json").exists()


def test_a_read_only_disk(tmp_path: Path, disk: SmallDisk, environment: dict[str, str]) -> None:
    run = begin(disk.folder / "run", list(SQUEEZED))
    read_only = "the file system is read-only; choose another folder or its permissions\n"
    with disk.read_only():
        text = refused([*TRAIN, "--quiet", "--run-dir", f"{disk.folder}/new"], tmp_path, environment)
        assert text == f"apertus-nemo: could not write {disk.folder}/new: {read_only}"
        with pytest.raises(UnfitEnvironment) as caught:
            run.new_attempt()
        assert f"{caught.value}\n" == f"could not write {run.attempt(0)}: {read_only}"
        assert verify(run.path).findings == []
    assert run.new_attempt() == 0


def test_copies_on_a_full_and_on_a_read_only_disk(tmp_path: Path, disk: SmallDisk) -> None:
    run = make_sealed(tmp_path / "run")
    disk.fill()
    there = str(tmp_path / "there")
    push(run, there)
    for target, action in (
        (disk.folder / "copy", lambda folder: push(run, str(folder))),
        (disk.folder / "pulled", lambda folder: pull(there, folder)),
    ):
        with pytest.raises(UnfitEnvironment) as caught:
            action(target)
        assert str(caught.value) == f"could not write {target}: {ADVICE}"
        assert sorted(path.name for path in disk.folder.iterdir()) == ["ballast"]
    disk.free()
    with disk.read_only(), pytest.raises(UnfitEnvironment, match=r": the file system is read-only; "):
        push(run, str(disk.folder / "copy"))
    push(run, str(disk.folder / "copy"))
    assert verify_record(disk.folder / "copy", segment_lines=SEGMENT_LINES).findings == []


@pytest.mark.full
@pytest.mark.timeout(400)
def test_full_under_a_command(tmp_path: Path, disk: SmallDisk, environment: dict[str, str]) -> None:
    """The command says the same, in an attempt that the launcher notes as failed; then it goes on to its end."""
    inside, run = disk.folder / "run", disk.mount_point / "run"
    start = [*TRAIN, "--quiet", "--run-dir", str(run), *SQUEEZED]
    with started(start, folder=tmp_path, environment=environment, inside=disk.inside) as process:
        began = inside / "states/step-000000000.json"
        wait_for(lambda: began.exists() or process.poll() is not None, timeout_s=200.0, what="the initial state")
        disk.fill()
        out, err = process.communicate(timeout=100.0)
    assert (process.returncode, out) == (3, ""), err
    said = [line for line in err.splitlines() if "progress.json" not in line and "outcome.json" not in line]
    full = rf"apertus-nemo: could not write {re.escape(str(run))}/[\w./-]+: {re.escape(ADVICE)}"  # whichever came first
    assert re.fullmatch(full, said[-1]), err
    disk.free()
    with disk.read_only():
        resume = ["train", "--quiet", "--resume", str(run)]
        done = apertus(resume, folder=tmp_path, environment=environment, inside=disk.inside)
        assert (done.returncode, done.stdout) == (3, "")
        read_only = "the file system is read-only; choose another folder or its permissions"
        assert done.stderr == f"apertus-nemo: could not write {run}/attempts/001: {read_only}\n"
    done = apertus(start, folder=tmp_path, environment=environment, inside=disk.inside)
    assert (done.returncode, done.stdout.split(",")[0]) == (0, f"{STEPS} steps"), done.stderr
    assert verify(inside).findings == []

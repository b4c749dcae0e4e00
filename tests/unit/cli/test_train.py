"""`apertus-nemo train`: what is handed to the launcher, and what is refused before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.cli.main import main
from apertus_nemo.errors import UnfitEnvironment
from apertus_nemo.launch import local


class Launcher:
    """In the place of launch.local.train: keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Path, dict[str, Any]]] = []
        self.error: BaseException | None = None

    def __call__(self, resolved: Any, run_directory: Path, **options: Any) -> local.Summary:
        self.calls.append((resolved, run_directory, options))
        if self.error is not None:
            raise self.error
        run_directory.mkdir(parents=True, exist_ok=True)
        (run_directory / "lock.json").touch()
        return local.Summary(run_directory=str(run_directory), steps=60, loss=3.25, tokens=10, seconds=1.0)


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launcher:
    replacement = Launcher()
    monkeypatch.setattr(local, "train", replacement)
    monkeypatch.chdir(tmp_path)
    return replacement


def test_defaults(launcher: Launcher, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 0
    ((resolved, folder, _),) = launcher.calls
    assert resolved.recipe == "tiny_pretrain"
    assert resolved.overrides == ()
    assert folder == Path("runs/tiny_pretrain-1")
    assert capsys.readouterr().out == "60 steps, last loss 3.2500, in runs/tiny_pretrain-1\n"


def test_first_free_number(launcher: Launcher) -> None:
    Path("runs/tiny_pretrain-1").mkdir(parents=True)
    Path("runs/tiny_pretrain-3").mkdir()
    assert main(["train"]) == main(["train"]) == main(["train", "name=other"]) == 0
    assert [str(folder) for _, folder, _ in launcher.calls] == [
        "runs/tiny_pretrain-2",
        "runs/tiny_pretrain-4",
        "runs/other-1",
    ]


def test_options_among_overrides(launcher: Launcher, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["train", "optim.lr=2e-3", "--quiet", "parallel=tp2", "--run-dir", "here", "~optim.beta3", "--json"]) == 0
    )
    ((resolved, folder, options),) = launcher.calls
    assert resolved.overrides == ("optim.lr=2e-3", "parallel=tp2", "~optim.beta3")
    assert folder == Path("here")
    assert options["cache"].is_absolute()
    assert json.loads(capsys.readouterr().out)["event"] == "done"


def test_refused_before_anything_is_made(launcher: Launcher, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "model.head_dim=15", "optim.min_lr=1.0"]) == 2
    assert main(["train", "model.head_dim=x"]) == 2
    assert launcher.calls == []
    assert not Path("runs").exists()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("=")[0] for line in lines[:2]] == ["apertus-nemo: model.head_dim", "apertus-nemo: optim.min_lr"]


@pytest.mark.parametrize("how", ["--multirun", "-m", "hydra.mode=MULTIRUN"])
def test_multirun(launcher: Launcher, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", how, "optim.lr=1e-3,2e-3", "parallel=single,tp2"]) == 0
    assert [(r.config.optim.lr, r.config.trainer.devices) for r, _, _ in launcher.calls] == [
        (1e-3, 1),
        (1e-3, 2),
        (2e-3, 1),
        (2e-3, 2),
    ]
    assert [str(folder) for _, folder, _ in launcher.calls] == [f"runs/tiny_pretrain-{n}" for n in (1, 2, 3, 4)]
    assert capsys.readouterr().err.splitlines()[1] == "run 2 of 4: optim.lr=0.001 parallel=tp2"


def test_multirun_in_a_given_folder(launcher: Launcher) -> None:
    assert main(["train", "-m", "optim.lr=1e-3,2e-3", "--run-dir", "sweep"]) == 0
    assert [str(folder) for _, folder, _ in launcher.calls] == ["sweep/000", "sweep/001"]
    assert main(["train", "-m", "optim.lr=1e-3", "--run-dir", "one"]) == 0
    assert str(launcher.calls[-1][1]) == "one"


def test_a_sweep_with_an_impossible_member_does_not_start(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "-m", "model.head_dim=16,15"]) == 2
    assert launcher.calls == []
    assert not Path("runs").exists()
    assert capsys.readouterr().err.splitlines()[0] == (
        "apertus-nemo: the member model.head_dim=15 of the sweep cannot run:"
    )


def test_a_sweep_wants_multirun(launcher: Launcher, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "optim.lr=1e-3,2e-3"]) == 2
    assert launcher.calls == []
    assert capsys.readouterr().err == (
        "apertus-nemo: the override optim.lr=1e-3,2e-3 is a sweep over several values; add --multirun\n"
    )


@pytest.mark.parametrize(("error", "code"), [(UnfitEnvironment("no space"), 3), (KeyboardInterrupt(), 130)])
def test_nothing_is_left_of_a_run_that_did_not_start(launcher: Launcher, error: BaseException, code: int) -> None:
    launcher.error = error
    assert main(["train"]) == code
    assert list(Path("runs").iterdir()) == []
    Path("mine").mkdir()
    Path("mine/precious").touch()
    assert main(["train", "--run-dir", "mine"]) == code
    assert Path("mine/precious").exists()


def test_a_place_that_cannot_be_written(launcher: Launcher, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs").touch()
    assert main(["train"]) == 2
    assert capsys.readouterr().err == (
        "apertus-nemo: runs/tiny_pretrain-1 cannot be made (Not a directory); give another place with --run-dir\n"
    )

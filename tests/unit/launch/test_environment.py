"""What of the shell reaches a rank, and what of that is written down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.launch import local
from apertus_nemo.launch.environment import FIXED, rank_environment, secrets
from apertus_nemo.recipe.compose import compose
from apertus_nemo.record.run_dir import RunDirectory

KEY = "d41d8cd98f00b204e9800998ecf8427e0badcafe"
SHELL = {
    "PATH": "/usr/bin",
    "HOME": "/home/somebody",
    "LC_ALL": "de_CH",
    "OMP_NUM_THREADS": "64",
    "WANDB_API_KEY": KEY,
    "WANDB_MODE": "disabled",
    "AWS_SECRET_ACCESS_KEY": "x",
    "LD_PRELOAD": "evil.so",
    "MASTER_ADDR": "127.0.0.1",  # ranks of one machine meet through a file: no port of the shell's can be in use
    "MASTER_PORT": "29500",
}


def test_the_shell_is_no_hidden_input() -> None:
    run = compose("tiny_pretrain", ["trainer.wandb=online"]).config
    environment = rank_environment(run, SHELL)
    assert {name for name in SHELL if name in environment} == {"PATH", "HOME", "LC_ALL", "OMP_NUM_THREADS"}
    assert environment["LC_ALL"] == FIXED["LC_ALL"]
    assert environment["OMP_NUM_THREADS"] == "1"
    assert KEY not in environment.values()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {}),
        (["trainer.wandb=offline"], {}),
        (["trainer.wandb=online"], {"WANDB_API_KEY": KEY}),
    ],
)
def test_the_key_of_wandb_is_only_for_a_run_that_uploads(overrides: list[str], expected: dict[str, str]) -> None:
    assert secrets(compose("tiny_pretrain", overrides).config, SHELL) == expected


def test_the_key_goes_to_the_first_rank_and_is_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, str]] = []

    class Process:
        pid = -1

        def __init__(self, *_: Any, env: dict[str, str], **__: Any) -> None:
            started.append(env)

    run = compose("tiny_pretrain", ["trainer.wandb=online", "parallel=dp2"]).config
    directory = RunDirectory(tmp_path / "run")
    directory.attempt(0).mkdir(parents=True)
    monkeypatch.setattr(local.subprocess, "Popen", Process)
    monkeypatch.setattr(local.os, "environ", SHELL)
    places = local.Places(tmp_path / "corpus", tmp_path / "cache")
    ranks = local._Ranks(run, local.Start(directory=directory, attempt=0, step=None, places=places, claim=0))
    ranks._start(9)
    assert [environment.get("WANDB_API_KEY") for environment in started] == [KEY, None]
    text = (directory.attempt(0) / "environment.json").read_text()
    assert '"WANDB_API_KEY": "(secret)"' in text
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()

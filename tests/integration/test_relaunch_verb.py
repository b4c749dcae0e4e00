"""A run again from its record alone: elsewhere, as somebody else, with other code installed and the recipes gone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from apertus_nemo.record.observed import TABLE
from tests.integration.command import ROOT, shell
from tests.integration.runs import SQUEEZED

STEPS = 3
TENSORS = 204


def copy_of_the_source(folder: Path) -> Path:
    """Our source in no checkout."""
    for name in ("apertus_nemo", "recipes", "requirements"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "resources"))
    return folder


def apertus(source: Path, *arguments: str, folder: Path, environment: dict[str, str]) -> tuple[int, str, str]:
    """Exit code, output and errors of the command, with the package of `source`."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "apertus_nemo.cli.main", *arguments],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(source)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("corpus")
def test_a_relaunch_needs_nothing_but_the_record(cache: Path, tmp_path: Path) -> None:
    source = copy_of_the_source(tmp_path / "source")
    ann = shell(
        cache, tmp_path / "ann", WANDB_API_KEY="correct-horse-9f3a", HTTPS_PROXY="http://ann:correct-horse-9f3a@proxy"
    )
    overrides = [*SQUEEZED, f"trainer.max_steps={STEPS}"]
    code, _, err = apertus(
        source, "train", "-q", "--run-dir", "run", *overrides, folder=tmp_path / "a", environment=ann
    )
    assert code == 0, err
    run = (tmp_path / "a" / "run").rename(tmp_path / "record")
    assert set(json.loads((run / "observed.json").read_bytes())) == set(TABLE)
    for path in run.rglob("*"):
        assert not path.is_file() or b"correct-horse-9f3a" not in path.read_bytes(), path

    # the source moves on, the recipes go away
    (source / "apertus_nemo" / "errors.py").write_text((source / "apertus_nemo" / "errors.py").read_text() + "# new\n")
    shutil.rmtree(source / "recipes")
    bob = shell(cache, tmp_path / "bob", USER="bob", TZ="Asia/Tokyo", LANG="de_CH.UTF-8", OMP_NUM_THREADS="3")
    elsewhere = tmp_path / "b" / "deeper"
    code, out, err = apertus(source, "relaunch", str(run), folder=elsewhere, environment=bob)
    assert (code, out) == (2, "")
    assert "add --trust if you trust where that file comes from" in err
    assert list((elsewhere / "runs").iterdir()) == []
    code, out, err = apertus(source, "relaunch", str(run), "--trust", folder=elsewhere, environment=bob)
    assert code == 0, out + err
    assert f"identical, {STEPS} of {STEPS} steps, {TENSORS} of {TENSORS} tensors\n" in out
    again = elsewhere / "runs" / "tiny_pretrain-1"
    for name in ("lock.json", "recipe.yaml", "source.tar", "observed.json"):
        assert (again / name).read_bytes() == (run / name).read_bytes(), name
    note = json.loads((again / "relaunch.json").read_bytes())
    assert (
        note["relaunch_of"]["run_id"] == json.loads((run / "steps/000000.jsonl").read_text().splitlines()[0])["run_id"]
    )

    # a relaunch can be relaunched; an observation that was another one stops it before the first step
    observed = json.loads((again / "observed.json").read_bytes())
    assert observed["host"] == os.uname().nodename
    (source / "apertus_nemo" / "errors.py").unlink()
    shutil.copy(ROOT / "apertus_nemo" / "errors.py", source / "apertus_nemo")
    (again / "lock.json").write_bytes((again / "lock.json").read_bytes().replace(b'"seed":28', b'"seed":29'))
    code, _, err = apertus(source, "relaunch", str(again), folder=elsewhere, environment=bob)
    assert code == 2
    assert "lock.json: its lock digest is " in err
    assert "config.data.seed: locked 29, found 28" in err

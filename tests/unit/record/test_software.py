"""Installed packages against importlib.metadata; our source against git."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import time
from pathlib import Path

from apertus_nemo.record.software import packages, source


def test_packages_are_those_of_importlib() -> None:
    expected: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        expected.setdefault(name, distribution.version)
    start = time.process_time()
    found = packages()
    assert time.process_time() - start < 0.3
    assert found == expected
    assert list(found) == sorted(found)
    assert "torch" in found


def test_the_first_folder_of_the_path_wins(tmp_path: Path) -> None:
    for folder, name in (
        ("a", "My_Pkg-2.0.dist-info"),
        ("b", "my.pkg-1.0.dist-info"),
        ("b", "old-3.1-py3.11.egg-info"),
    ):
        (tmp_path / folder / name).mkdir(parents=True)
    (tmp_path / "b" / "bare.egg-info").mkdir()
    path = [str(tmp_path / "absent"), str(tmp_path / "a"), str(tmp_path / "b")]
    assert packages(path) == {"bare": "unknown", "my-pkg": "2.0", "old": "3.1"}


def git(root: Path, *arguments: str) -> str:
    names = ("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL")
    env = {"PATH": os.environ["PATH"], "HOME": str(root), **dict.fromkeys(names, "a@b")}
    return subprocess.run(["git", *arguments], cwd=root, env=env, capture_output=True, check=True, text=True).stdout


def test_source_of_a_checkout_and_without_one(tmp_path: Path) -> None:
    package = tmp_path / "apertus_nemo"
    package.mkdir()
    (package / "a.py").write_text("x = 1\n")
    alone = source(package)
    assert alone["commit"] == alone["tree"] == alone["dirty"] == {"unknown": "not a git checkout"}
    git(tmp_path, "init", "-q")
    assert source(package)["commit"] == {"unknown": "git does not take it for a checkout of this user"}  # no commit
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    clean = source(package)
    assert clean["commit"] == git(tmp_path, "rev-parse", "HEAD").strip()
    assert clean["tree"] == git(tmp_path, "rev-parse", "HEAD^{tree}").strip()
    assert clean["dirty"] is False
    assert clean["files_digest"] == alone["files_digest"]
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "a.py").write_text("")
    assert source(package) == clean
    (package / "a.py").write_text("x = 2\n")
    changed = source(package)
    assert changed["dirty"] is True
    assert changed["files_digest"] != clean["files_digest"]


def test_without_git_the_files_still_have_a_digest(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / ".git").mkdir()
    (tmp_path / "apertus_nemo").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    found = source(tmp_path / "apertus_nemo")
    assert found["commit"] == {"unknown": "git is not installed"}
    assert len(found["files_digest"]) == 64

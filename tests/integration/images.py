"""Images of the families that come with the package, built as a user does it: from a clean checkout, by the command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.image.checkout import cache_folder
from apertus_nemo.image.families import LOCK, containers_folder
from apertus_nemo.image.inputs import absent
from apertus_nemo.image.lock import read_lock
from apertus_nemo.image.oci import Platform
from tests.unit.image.tools import needs

ROOT = Path(__file__).resolve().parents[2]
PLATFORM = str(Platform.of_machine(os.uname().machine))
PACKAGES = cache_folder(os.environ)  # `image build --download-only` fills it; no test does
TOOLS = ("buildah", "git", "mmdebstrap")
LIMIT_S = 1500  # of one build
RUN = "import sys; from apertus_nemo.cli.main import main; sys.exit(main(sys.argv[1:]))"


def needs_packages(family: str, *, python: bool = True) -> None:
    """Skip unless the tools and every package of the family's lock are there; `python`: Python's, too."""
    needs(*TOOLS)
    if os.geteuid() != 0:
        pytest.skip("images are built by root")
    debs, files = absent(read_lock(containers_folder() / family / LOCK), PLATFORM, PACKAGES)
    files = files if python else []
    if debs or files:
        pytest.skip(
            f"{len(debs)} Debian and {len(files)} Python packages of {family} are not in {PACKAGES}: "
            f"run `apertus-nemo image build {family} --download-only`"
        )


def commit(target: Path) -> Path:
    """The tree as it is, committed in a repository of its own; the same tree gives the same commit."""
    if not (ROOT / ".git").exists():
        pytest.skip(f"{ROOT} is no checkout in git")
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    who = {
        f"GIT_{one}_{what}": value
        for one in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "tests"), ("EMAIL", "tests@example.org"), ("DATE", "2026-01-01T00:00:00Z"))
    }
    for command in (["init", "-q"], ["add", "--force", "."], ["commit", "-q", "--no-verify", "-m", "as it is"]):
        subprocess.run(["git", "-C", target, *command], check=True, env={**os.environ, **who}, timeout=120)
    return target


def build(
    checkout: Path, output: Path, family: str, *options: str, before: list[str] | None = None, **environment: str
) -> Any:
    """What `image build --json` prints; `before` stands in front of the command, `environment` is added to ours."""
    command = [*(before or []), sys.executable, "-c", RUN, "image", "build", family, "--json", "--output", str(output)]
    done = subprocess.run(
        [*command, "--cache", str(PACKAGES), *options],
        cwd=output.parent,
        env={**os.environ, "PYTHONPATH": str(checkout), **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

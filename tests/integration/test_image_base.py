"""The base of the cpu image, from its locked Debian packages: built twice from nothing, side by side."""

from __future__ import annotations

import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from apertus_nemo.image.debian import fetch, make_base
from apertus_nemo.image.definition import read_definition
from apertus_nemo.image.families import DEFINITION, LOCK, containers_folder
from apertus_nemo.image.lock import read_lock
from apertus_nemo.record.files import file_sha256
from tests.integration import images


@pytest.mark.timeout(600)
def test_the_base_is_a_function_of_its_packages(tmp_path: Path) -> None:
    images.needs_packages("cpu", python=False)
    folder = containers_folder() / "cpu"
    debs = fetch(read_lock(folder / LOCK).debian(images.PLATFORM), {}, images.PACKAGES / "debian")

    def made(open_to_all: bool) -> str:
        """`open_to_all`: apt downloads as its own user, which may read the folder; else as root."""
        work = Path(tempfile.mkdtemp(dir=None if open_to_all else tmp_path))
        work.chmod(0o755 if open_to_all else 0o700)
        make_base(
            debs,
            work / "base.tar",
            architecture=images.PLATFORM.rpartition("/")[2],
            epoch=read_definition(folder / DEFINITION).epoch,
            work=work,
        )
        digest = file_sha256(work / "base.tar")
        shutil.rmtree(work)
        return digest

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(made, [True, False])
    assert first == second

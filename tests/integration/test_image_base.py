"""The base of the cpu image, from its locked Debian packages: built twice from nothing, side by side."""

from __future__ import annotations

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

    def made(name: str) -> str:
        work = tmp_path / name
        work.mkdir(mode=0o755)
        make_base(
            debs,
            work / "base.tar",
            architecture=images.PLATFORM.rpartition("/")[2],
            epoch=read_definition(folder / DEFINITION).epoch,
            work=work,
        )
        return file_sha256(work / "base.tar")

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(made, ["first", "second"])
    assert first == second

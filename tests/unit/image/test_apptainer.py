"""Definition files for Apptainer, read back by spython's parser; Apptainer itself was not at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from spython.main.parse.parsers import get_parser  # type: ignore[import-untyped]

from apertus_nemo.cli.main import main
from apertus_nemo.image.definition import read_definition
from apertus_nemo.image.families import DEFINITION, containers_folder

PINNED = f"127.0.0.1:5000/apertus/cpu@sha256:{'1a' * 32}"


@pytest.mark.parametrize("family", ["cpu", "gh200"])
def test_spython_reads_what_we_write(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "apptainer", family, PINNED]) == 0
    path = tmp_path / "Singularity"
    path.write_text(capsys.readouterr().out)
    definition = read_definition(containers_folder() / family / DEFINITION)
    (recipe,) = get_parser("singularity")(str(path)).recipe.values()
    assert recipe.fromHeader == PINNED
    assert {one.partition("=")[0] for one in recipe.environ} == set(definition.environment)
    assert {one.partition(" ")[0] for one in recipe.labels} == {
        *definition.labels, "org.opencontainers.image.title", "org.opencontainers.image.version"
    }  # fmt: skip
    assert f"org.opencontainers.image.version {definition.version}" in recipe.labels
    assert recipe.cmd == 'exec "$@"'
    assert recipe.test == "/bin/bash /tests.sh"


def test_a_tag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "apptainer", "cpu", "127.0.0.1:5000/apertus/cpu:1.0.0"]) == 2
    assert "write the image by its digest, HOST/NAME@sha256:...: a tag can be moved\n" in capsys.readouterr().err

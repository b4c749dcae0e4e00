"""Tools of the machine that tests of images need: where one is missing the test is skipped, but never in CI."""

from __future__ import annotations

import os

import pytest

from apertus_nemo.errors import UnfitEnvironment
from apertus_nemo.image.programs import find_program


def needs(*programs: str) -> None:
    """Skip the test unless all are there; in CI, where `.ci/run` installs them, fail."""
    for program in programs:
        try:
            find_program(program)
        except UnfitEnvironment as error:
            if os.environ.get("CI") == "true":
                raise
            pytest.skip(str(error))

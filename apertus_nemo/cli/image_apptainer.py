"""`apertus-nemo image apptainer`: the definition file of an image for Apptainer; see docs/image.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from apertus_nemo.cli.arguments import explained


def main(arguments: Sequence[str]) -> int:
    """0 when printed. Errors leave as ApertusError, wrong usage as SystemExit(2)."""
    options = parser().parse_args(arguments)
    from apertus_nemo.image.apptainer import definition_file
    from apertus_nemo.image.definition import read_definition
    from apertus_nemo.image.families import DEFINITION, find
    from apertus_nemo.image.reference import Reference

    definition = read_definition(find(options.family).folder / DEFINITION)
    sys.stdout.write(definition_file(definition, Reference.parse(options.reference)))
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="apertus-nemo image apptainer",
        **explained(
            "Print the definition file of an image for Apptainer or Singularity.",
            examples={
                'apertus-nemo image apptainer cpu "$IMAGE"': "to a terminal, where IMAGE is HOST/NAME@sha256:DIGEST"
            },
            exit_codes={0: "printed", 2: "no such family, or a reference without a digest"},
        ),
    )
    options.add_argument("family", metavar="FAMILY", help="a folder of containers/: cpu, gh200")
    options.add_argument("reference", metavar="REFERENCE", help="the image by its digest, HOST/NAME@sha256:...")
    return options

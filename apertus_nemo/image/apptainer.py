"""Definition files of Apptainer and Singularity, from the definition of a family and a pinned image.

    text = definition_file(read_definition(path), Reference.parse("registry.example/apertus/cpu@sha256:..."))

Written from the same source as the image, not converted from a Containerfile. The image is named by its digest alone.
"""

from __future__ import annotations

import shlex

from apertus_nemo.errors import InputError
from apertus_nemo.image.definition import Definition
from apertus_nemo.image.reference import Reference


def definition_file(definition: Definition, reference: Reference) -> str:
    """The text; the same input gives the same text. Raises InputError where the reference names no digest."""
    if reference.digest is None:
        raise InputError(f"{reference}: write the image by its digest, HOST/NAME@sha256:...: a tag can be moved")
    labels = {
        **definition.labels,
        "org.opencontainers.image.title": definition.title,
        "org.opencontainers.image.version": definition.version,
    }
    environment = [f"    export {name}={shlex.quote(text)}" for name, text in sorted(definition.environment.items())]
    lines = [
        "Bootstrap: docker",
        f"From: {reference.registry}/{reference.repository}@{reference.digest}",
        "",
        "%labels",
        *(f"    {name} {' '.join(text.split())}" for name, text in sorted(labels.items())),
        "",
        "%environment",
        *environment,
        "",
        "%runscript",
        '    exec "$@"',
        "",
        "%test",
        f"    {definition.prefix}/bin/python3 -c {shlex.quote('import ' + ', '.join(definition.imports))}",
    ]
    return "\n".join(lines) + "\n"

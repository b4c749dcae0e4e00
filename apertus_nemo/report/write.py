"""Where a report goes. It stands beside the record or elsewhere, and never in the place of anything but a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apertus_nemo.errors import InputError, UnfitEnvironment
from apertus_nemo.record.files import reading, write_atomic
from apertus_nemo.record.places import REPORT
from apertus_nemo.record.urls import is_url, local_path
from apertus_nemo.report.page import MARK, page


def default_place(records: Sequence[str]) -> Path:
    """RUN/report.html for one run directory, else report.html in the current folder."""
    if len(records) == 1:
        local = local_path(records[0]) if is_url(records[0]) else records[0]
        if local is not None:
            return Path(local) / REPORT
    return Path(REPORT)


def refuse_other_file(target: Path) -> None:
    """Raise InputError where `target` is there and is no report."""
    if target.is_dir():
        raise InputError(f"{target} is a folder; name the file of the report")
    if not target.exists() and not target.is_symlink():
        return
    found = b""
    if target.is_file() and not target.is_symlink():
        with reading(target), open(target, "rb") as stream:
            found = stream.read(len(MARK))
    if found != MARK:
        raise InputError(f"{target} is there already and is no report of apertus-nemo: name another file with -o")


def make(report: Mapping[str, Any], target: Path) -> int:
    """Write the page, whole or not at all; its size in bytes.

    Raises UnfitEnvironment where the disk refuses, or a package that draws is not there.
    """
    try:
        data = page(report)
    except ModuleNotFoundError as error:
        raise UnfitEnvironment(f"the package {error.name} is missing: install the locked requirements") from None
    write_atomic(target, data)
    return len(data)

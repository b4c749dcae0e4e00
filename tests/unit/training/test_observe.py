"""Each attempt is held against the first, a relaunch against the original, before the first step."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.record.canonical import dumps, unknown
from apertus_nemo.record.machine import machine
from apertus_nemo.record.observed import TABLE
from apertus_nemo.record.relaunched import Relaunched
from apertus_nemo.testing.ranks import Parent

REFUSED = "this machine is not as the run found it:"


def attempts(parent: Parent, folder: Path, *machines: dict[str, Any]) -> list[Any]:
    (answer,) = parent.run(
        "tests.cases.observe:attempts",
        world_size=1,
        arguments={"folder": str(folder), "machines": list(machines)},
        timeout_s=60.0,
    )
    return list(answer)


def test_later_attempts(parent: Parent, tmp_path: Path) -> None:
    first, same, elsewhere, other = attempts(parent, tmp_path, {}, {}, {"host": "x", "kernel": "y"}, {"torch": "2.12"})
    observed = json.loads(first)
    assert set(observed) == set(TABLE)
    assert observed["cpu_model"] == machine()["cpu_model"]
    assert observed["host"] == platform.node()
    assert dumps(observed) == first.encode() == (tmp_path / "observed.json").read_bytes()
    assert same == elsewhere == first
    assert other[0] == REFUSED
    assert other[1].startswith(f'observed.torch: first "{observed["torch"]}", now "2.12"; must be equal: ')
    kept = sorted(path.parent.name for path in tmp_path.glob("attempts/*/observed.json"))
    assert kept == ["002", "003"]
    assert json.loads((tmp_path / "attempts/003/observed.json").read_bytes())["torch"] == "2.12"


@pytest.mark.parametrize(
    ("allowed", "observed", "passes"),
    [
        ((), {"torch": "2.12"}, False),
        (("observed.torch",), {"torch": "2.12"}, True),
        (("observed",), {"torch": "2.12"}, True),
        (("observed.mkl",), {"torch": "2.12"}, False),
        ((), {"host": "x"}, True),
        ((), unknown("lost"), True),
    ],
)
def test_a_relaunch(
    parent: Parent, tmp_path: Path, allowed: tuple[str, ...], observed: dict[str, Any], passes: bool
) -> None:
    (own,) = attempts(parent, tmp_path / "original", {})
    was = observed if "unknown" in observed else {**json.loads(own), **observed}
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "relaunch.json").write_bytes(Relaunched("d" * 64, "1" * 32, was, allowed).to_bytes())
    (answer,) = attempts(parent, tmp_path / "again", {})
    if passes:
        assert answer == own
    else:
        assert answer[0] == REFUSED
        assert not (tmp_path / "again" / "observed.json").exists()

"""docs/edf.md says what is: its tables, and the output that it shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from apertus_nemo.cli.main import main
from apertus_nemo.edf.dialects import table
from apertus_nemo.edf.sites import FAMILIES, SITES, fit

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "edf.md").read_text()
CORPUS = Path(__file__).parent / "corpus"


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table after a line, without its head."""
    lines = PAGE.split(heading, 1)[1].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def test_what_differs_between_the_engines() -> None:
    assert rows("## Two engines") == [[cell.strip() for cell in row] for row in table()]


def test_sites_and_families() -> None:
    found = {row[0].strip("`"): row for row in rows('it says `image = ""`.')}
    assert set(found) == set(SITES)
    for name, site in SITES.items():
        for column, family in ((2, "gh200"), (3, "cpu")):
            assert found[name][column].startswith("yes" if fit(FAMILIES[family], site) is None else "no")
        if site.netstack is not None:
            assert site.netstack[1] in found[name][4]


@pytest.mark.parametrize(("command", "name"), [("check", "pretraining"), ("explain", "NCCL_CROSS_NIC")])
def test_output_of_the_page(
    command: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CORPUS)
    argument = f"{name}.toml" if command == "check" else name
    main(["edf", command, argument])
    output = capsys.readouterr().out.splitlines()
    block = PAGE.split(f"    $ apertus-nemo edf {command} {argument}\n")[1].split("\n\n")[0]
    shown = [line.removeprefix("    ") for line in block.splitlines() if line.strip() != "..."]
    assert len(shown) >= 4
    assert [line for line in shown if line not in output] == []

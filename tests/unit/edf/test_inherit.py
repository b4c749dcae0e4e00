"""Inheritance: order, what is overwritten and what is appended, where names are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from apertus_nemo.edf.check import View
from apertus_nemo.edf.dialects import CE, DIFFERENCES, SARUS, undocumented
from apertus_nemo.edf.document import read_document
from apertus_nemo.edf.effective import effective
from apertus_nemo.edf.finding import Fault
from apertus_nemo.edf.inherit import Lookup, load_chain, merge, search_folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "site.toml").write_text(
        'image = "site:1"\nwritable = false\nmounts = ["/s:/s"]\n[env]\nA = "site"\nB = "site"\n'
        '[annotations.com.hooks.cxi]\nenabled = "true"\n'
    )
    (tmp_path / "team.toml").write_text(
        'base_environment = "site"\nimage = "team:1"\nmounts = ["/t:/t"]\n[env]\nB = "team"\nC = "team"\n'
    )
    (tmp_path / "extra.toml").write_text('workdir = "/extra"\n[env]\nA = "extra"\n')
    (tmp_path / "mine.toml").write_text(
        'base_environment = ["team", "extra"]\nmounts = ["/m:/m"]\n[env]\nC = "mine"\nTOKEN = "hunter2"\n'
        'LINK = "${TOKEN}"\nGONE = ""\n[annotations]\ncom.hooks.cxi.enabled = "false"\n'
    )
    return tmp_path


def test_order_and_merging(folder: Path) -> None:
    document = read_document(folder / "mine.toml")
    chain = load_chain(document, Lookup(CE, (folder,), {}))
    assert [Path(link.document.name).stem for link in chain.links] == ["site", "team", "extra", "mine"]
    merged = merge(chain.links)
    assert {key: value.value for key, value in merged.single.items()} == {
        "image": "team:1",
        "writable": False,
        "workdir": "/extra",
    }
    assert [value.value for value in merged.mounts] == ["/s:/s", "/t:/t", "/m:/m"]
    env = {key: (value.value, Path(value.origin.file).stem, value.origin.line) for key, value in merged.env.items()}
    assert env["A"] == ("extra", "extra", 3)
    assert env["B"] == ("team", "team", 5)
    assert env["C"] == ("mine", "mine", 4)
    cxi = merged.annotations["com.hooks.cxi.enabled"]
    assert (cxi.value, cxi.origin.line, [Path(origin.file).stem for origin in cxi.replaced]) == ("false", 9, ["site"])


def test_effective(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    document = read_document(Path("mine.toml"))
    result = effective(document, View(CE, {"TOKEN": "from-the-host"}, None, [Path()]))
    text = result.text()
    assert 'image = "team:1"' in text
    lines = {line.split(" = ")[0]: line for line in text.splitlines() if " = " in line}
    assert lines["image"].endswith("# team.toml:2, through mine.toml; instead of site.toml:1")
    assert lines["env.A"].endswith("# extra.toml:3, through mine.toml; instead of site.toml:5")
    assert lines["mounts[0]"].endswith("# site.toml:3, through mine.toml -> team.toml")
    assert lines["entrypoint"].endswith("# default of the engine")
    assert lines["env.GONE"].endswith("# mine.toml:7; unset in the container")
    assert "hunter2" not in text
    assert "from-the-host" not in text
    assert 'env.TOKEN = "***"' in text
    assert 'env.LINK = "***"' in text
    assert "hunter2" not in str(result.tree())


def test_effective_needs_all_bases(folder: Path) -> None:
    (folder / "site.toml").unlink()
    with pytest.raises(Fault, match=r"team\.toml:1: base_environment 'site' was not found: searched: "):
        effective(read_document(folder / "mine.toml"), View(CE, {}, None, [folder]))


def test_search_path() -> None:
    here = {"EDF_PATH": "/a:/b", "HOME": "/home/ada"}
    assert search_folders(here, CE) == (Path("/a"), Path("/b"))
    assert search_folders({"HOME": "/home/ada"}, CE) == (Path("/home/ada/.edf"),)
    assert search_folders({}, CE) == ()
    assert search_folders(here, SARUS) == (Path("/a:/b"), Path("/etc/edf"))


def test_first_folder_wins(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.toml").touch()
    lookup = Lookup(CE, (tmp_path / "none", tmp_path / "two", tmp_path / "one"), {})
    assert lookup.find("x") == tmp_path / "two" / "x.toml"
    assert lookup.find("x.toml") is None
    assert lookup.find(str(tmp_path / "one" / "x.toml")) == tmp_path / "one" / "x.toml"
    assert lookup.find("\0") is None


def test_a_wide_tree_ends(tmp_path: Path) -> None:
    """Ten bases in each of ten levels would be ten thousand million files."""
    for level in range(10):
        name = ", ".join([f'"{tmp_path}/l{level + 1}.toml"'] * 10)
        (tmp_path / f"l{level}.toml").write_text(f"base_environment = [{name}]\n" if level < 9 else "[env]\n")
    chain = load_chain(read_document(tmp_path / "l0.toml"), Lookup(CE, (), {}))
    assert [fault.rule for fault in chain.faults] == ["too-many-bases"]
    assert len(chain.links) <= 201


def test_every_difference_has_its_reason() -> None:
    assert undocumented() == set()
    for what, reason, source in DIFFERENCES.values():
        assert "" not in (what, reason, source)

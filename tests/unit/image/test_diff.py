"""What changed between two images: locks, definitions, layouts; files held against what umoci unpacks."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.cli.image_diff import _file
from apertus_nemo.cli.main import main
from apertus_nemo.errors import InputError
from apertus_nemo.image import effects
from apertus_nemo.image.diff import Changes, diff, side
from apertus_nemo.image.families import containers_folder
from apertus_nemo.image.layers import CorruptBlob
from apertus_nemo.image.layout import Layout
from apertus_nemo.record.software import packages
from tests.unit.image.images import entry, layout_with, link, tar
from tests.unit.image.servers import needs

AMD64 = "linux/amd64"
COMMITTED = containers_folder() / "cpu" / "lock.json"


def changed_lock(folder: Path) -> Path:
    """The cpu image's, with another numpy, another file of rich, without plotly, with one more Debian package."""
    tree: dict[str, Any] = json.loads(COMMITTED.read_text())
    entries = tree["platforms"][AMD64]["python"]
    by_name = {one["name"]: one for one in entries}
    by_name["numpy"]["version"] = "1.26.5"
    by_name["rich"]["sha256"] = "0" * 64
    entries.remove(by_name["plotly"])
    tree["platforms"][AMD64]["debian"].append({**tree["platforms"][AMD64]["debian"][0], "name": "zzz"})
    path = folder / "changed.json"
    path.write_text(json.dumps(tree))
    return path


def told(changes: Changes) -> list[tuple[str, str, str | None, str | None, str]]:
    return [(one.kind, one.name, one.old, one.new, one.effect) for one in changes.changes]


def test_packages_are_named_with_versions_and_what_they_may_do(tmp_path: Path) -> None:
    old, new = side("cpu", AMD64), side(str(changed_lock(tmp_path)), AMD64)
    locked = {one.name: one for one in old.lock.python(AMD64)}
    found = diff(old, new, AMD64)
    first = old.lock.debian(AMD64)[0]
    assert told(found) == [
        ("debian", "zzz", None, first.version, "bits"),
        ("python", "numpy", locked["numpy"].version, "1.26.5", "bits"),
        ("python", "plotly", locked["plotly"].version, None, "nothing"),
        ("python", "rich", f"{locked['rich'].version} ({locked['rich'].sha256[:12]})",
         f"{locked['rich'].version} (000000000000)", "nothing"),
    ]  # fmt: skip
    assert found.effect == "bits"
    assert [line.partition(":")[0] for line in found.not_compared] == ["environment", "labels", "settings", "files"]
    assert all(one.reason for one in found.changes)
    assert diff(old, side("cpu-1.0.0", AMD64), AMD64).changes == []


def test_the_verb_prints_lines_and_ends_with_1_where_something_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed_lock(tmp_path)
    assert main(["image", "diff", "cpu", str(path), "--platform", AMD64]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "nothing  python plotly: 7.1.0 -> nothing  (draws in reports)" in lines
    assert lines[-1] == "4 changes for linux/amd64; together they may change: bits"
    assert main(["image", "diff", "cpu", str(COMMITTED), "--platform", "linux/arm64"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing changed for linux/arm64"
    assert main(["image", "diff", "cpu", str(path), "--platform", AMD64, "--json"]) == 1
    tree = json.loads(capsys.readouterr().out)
    assert (tree["effect"], len(tree["changes"]), tree["platform"]) == ("bits", 4, AMD64)


def test_of_a_file_what_changed_is_shown() -> None:
    one, two = "a" * 64, "b" * 64
    assert _file(f"644 0:0 {one}", f"644 0:0 {two}") == ("a" * 12, "b" * 12)
    assert _file(f"644 0:0 {one}", f"755 0:0 {one}") == ("644", "755")
    assert _file(None, f"755 0:7 {two}") == (None, f"755 0:7 {'b' * 12}")
    assert _file("777 0:0 link to x y", "777 0:0 link to z") == ("link to x y", "link to z")
    assert _file("hard link", f"644 0:0 {one}") == ("hard link", f"644 0:0 {'a' * 12}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cpu-9.0.0", "cpu"], "apertus-nemo: cpu has no version 9.0.0; there are cpu-1.0.0"),
        (["images/none", "cpu"], "apertus-nemo: images/none is neither a lock nor a folder with an OCI layout"),
        (["gh200", "cpu"], "apertus-nemo: gh200-1.0.0 is not for linux/amd64; it is for linux/arm64"),
        ([__file__, "cpu"], f"apertus-nemo: {__file__}: "),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["image", "diff", *arguments, "--platform", AMD64]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)


LOCK = entry("etc/apertus-nemo/lock.json", COMMITTED.read_bytes())
BASE = [
    entry("etc"), entry("etc/apertus-nemo"), LOCK, entry("usr"), entry("usr/kept", b"1"), entry("usr/gone", b"2"),
    entry("usr/old"), entry("usr/old/a", b"3"), entry("usr/.hidden", b"4"), link("usr/link", "kept"),
]  # fmt: skip


def layouts(folder: Path) -> Iterator[Path]:
    """Two with one base: the second removes a file, empties a folder, changes a mode, a link and a content."""
    first = [entry("./usr/mine", b"1", mode=0o755), link("usr/same", "usr/mine", hard=True)]
    second = [
        entry("usr/mine", b"1", mode=0o644), entry("usr/.wh.gone", b""), entry("usr/old/.wh..wh..opq", b""),
        entry("usr/old/b", b"5"), link("usr/link", "mine"), entry("usr/.hidden", b"6"),
    ]  # fmt: skip
    for name, top, environment in (("a", first, ["A=1", "NCCL_ALGO=Ring"]), ("b", second, ["A=1", "NCCL_ALGO=Tree"])):
        config = {"Env": environment, "Labels": {"x": name}, "WorkingDir": "/"}
        layout_with(folder / name, tar(BASE), tar(top), config=config)
        yield folder / name


def unpacked(layout: Path, target: Path) -> dict[str, str]:
    """What umoci makes of it: path -> content or target of a link."""
    command = ["umoci", "raw", "unpack", "--image", f"{layout}:1", target]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return {
        str(path.relative_to(target)): f"link {path.readlink()}"
        if path.is_symlink()
        else f"{path.stat().st_mode & 0o7777:o} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in sorted(target.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def test_files_of_layouts_are_those_that_umoci_unpacks(tmp_path: Path) -> None:
    needs("umoci")
    folders = list(layouts(tmp_path))
    a = side(str(folders[0]), AMD64)
    b = side(f"{folders[1]}:1", AMD64, like=a)
    assert a.layers is not None
    assert b.layers is not None
    assert a.layers[0] is b.layers[0]  # the common layer was read once
    found = {one.name: one for one in diff(a, b, AMD64).changes if one.kind == "file"}
    old, new = (unpacked(folder, tmp_path / f"{folder.name}-files") for folder in folders)
    assert set(found) == {name for name in {*old, *new} if old.get(name) != new.get(name)}
    assert (
        {name for name, one in found.items() if one.new is None}
        == set(old) - set(new)
        == {"usr/gone", "usr/old/a", "usr/same"}
    )
    assert set(b.files or ()) == set(new)
    others = [one for one in diff(a, b, AMD64).changes if one.kind != "file"]
    assert [(one.kind, one.name, one.effect) for one in others] == [
        ("environment", "NCCL_ALGO", "bits"),
        ("label", "x", "nothing"),
    ]


def test_a_definition_and_an_image_are_compared_in_what_the_definition_sets(tmp_path: Path) -> None:
    config = {"Env": ["PATH=/bin", "LANG=C", "PYTHONNOUSERSITE=1", "HF_HUB_OFFLINE=1"]}
    layout_with(tmp_path / "a", tar([LOCK]), config=config)
    found = diff(side("cpu", AMD64), side(str(tmp_path / "a"), AMD64), AMD64)
    assert [one[:4] for one in told(found) if one[0] == "environment"] == [("environment", "LANG", "C.UTF-8", "C")]
    assert found.not_compared[-1].startswith("environment and labels beyond what a definition sets")


def test_a_layout_that_is_damaged_or_not_ours_is_refused(tmp_path: Path) -> None:
    other = layout_with(tmp_path / "other", tar([entry("usr/a", b"1")]))
    with pytest.raises(InputError, match=r"other is not an image of ours: it holds no etc/apertus-nemo/lock.json"):
        side(str(other.root), AMD64)
    layout = layout_with(tmp_path / "damaged", tar([LOCK, entry("usr/a", random.Random(1).randbytes(9000))]))
    (layer,) = layout.image(images_platform()).manifest.layers
    path = layout.blobs.path(layer.digest)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptBlob):
        side(str(layout.root), AMD64)
    assert Layout.open(layout.root).index().manifests


def images_platform() -> Any:
    from tests.unit.image.images import PLATFORM

    return PLATFORM


def test_effects_are_known_of_what_runs_import_most_and_the_worst_is_assumed_of_the_rest() -> None:
    for name in ("torch", "numpy", "megatron-core", "nemo-toolkit", "transformer-engine", "libc6", "python3.11"):
        assert effects.effect_of_package(name).what == "bits"
        assert effects.effect_of_package(name) != effects.effect_of_package("never-heard-of")
    assert effects.effect_of_package("never-heard-of").reason == "not in the table: the worst is assumed"
    assert effects.effect_of_variable("NCCL_PROTO").what == "bits"
    assert effects.effect_of_variable("FI_PROVIDER").what == "speed"
    assert effects.effect_of_file("opt/x/lib/python3.11/site-packages/numpy/__pycache__/a.pyc").what == "speed"
    assert effects.effect_of_file("opt/x/lib/python3.11/site-packages/numpy/a.so").what == "bits"
    assert effects.effect_of_setting("entrypoint").what == "bits"


def test_a_package_that_a_lock_of_a_run_pins_and_that_does_nothing_has_its_reason() -> None:
    """What the table calls harmless is either pinned by runs all the same, or stands in their own list."""
    pinned = set(packages())
    harmless = [name for name in pinned if effects.effect_of_package(name).what == "nothing"]
    assert harmless
    assert all(len(effects.effect_of_package(name).reason) > 5 for name in harmless)

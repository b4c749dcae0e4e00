"""Installed packages against importlib.metadata and against hashes made by hand; what the cache may not hide."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.record import software
from apertus_nemo.record.software import NOT_PINNED, interpreter, packages

ROOT = Path(__file__).resolve().parents[3]


def test_packages_are_those_of_importlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and versions; the hashing of gigabytes is left out."""
    expected: dict[str, str] = {}
    for distribution in importlib.metadata.distributions(path=list(software.import_path())):
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        expected.setdefault(name, distribution.version)
    monkeypatch.setattr(software, "file_sha256", lambda path: "0" * 64)
    found = packages()
    assert {name: entry["version"] for name, entry in found.items()} == {
        name: version for name, version in expected.items() if name not in NOT_PINNED
    }
    assert list(found) == sorted(found)
    assert "torch" in found


def install(site_packages: Path, name: str = "one", **files: str) -> Path:
    """A distribution as pip leaves it; its folder."""
    content = {f"{name}/{file.replace('__', '.')}": text for file, text in files.items()} or {f"{name}/a.py": "x = 1\n"}
    info = f"{name}-1.0.dist-info"
    content |= {f"{info}/METADATA": "Name: one\n", f"{info}/INSTALLER": "pip\n", f"../../../bin/{name}": "#!/here\n"}
    for path, text in content.items():
        (site_packages / path).parent.mkdir(parents=True, exist_ok=True)
        (site_packages / path).write_text(text)
    lines = [f"{path},sha256=wrong,1" for path in content]
    (site_packages / info / "RECORD").write_text("\n".join([*lines, f"{info}/RECORD,,", f"{name}/a.pyc,,"]) + "\n")
    return site_packages / name


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "lib" / "python3.11" / "site-packages"
    install(folder)
    install(folder, "two")
    return folder


def test_the_hash_is_over_the_files_and_not_over_what_record_says(place: Path) -> None:
    files = {"one-1.0.dist-info/METADATA": "Name: one\n", "one/a.py": "x = 1\n"}
    rows = [[name, hashlib.sha256(text.encode()).hexdigest()] for name, text in sorted(files.items())]
    expected = hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()
    assert packages([str(place)])["one"] == {"sha256": expected, "version": "1.0"}


def test_place_installer_and_byte_code_do_not_count(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "lib" / "python3.11" / "site-packages"
    for name in ("one", "two"):
        install(other, name)
        (other / f"{name}-1.0.dist-info" / "INSTALLER").write_text("uv\n")
        (other / f"{name}-1.0.dist-info" / "direct_url.json").write_text("{}")
        (other / name / "a.pyc").write_text("byte code")
        (other / "../../../bin" / name).write_text("#!/there\n")
    assert packages([str(other)]) == packages([str(place)])


def test_a_warm_cache_gives_the_same_and_reads_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = place / "cache.json"
    cold = packages([str(place)], cache=cache)
    assert cold == packages([str(place)])
    monkeypatch.setattr(software, "file_sha256", lambda path: pytest.fail(f"{path} was read"))
    assert packages([str(place)], cache=cache) == cold


def same_size(path: Path) -> None:
    path.write_text("x = 2\n")


def same_size_and_times(path: Path) -> None:
    before = path.stat()
    path.write_text("x = 2\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    before = path.stat()
    new = path.with_name("new")
    new.write_text("x = 2\n")
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.rename(new, path)


@pytest.mark.parametrize("change", [same_size, same_size_and_times, replaced, Path.unlink])
def test_a_changed_file_is_seen_through_the_cache(place: Path, change: Any) -> None:
    cache = place / "cache.json"
    before = packages([str(place)], cache=cache)
    time.sleep(0.02)  # times of files move in ticks
    change(place / "one" / "a.py")
    after = packages([str(place)], cache=cache)
    assert after["one"] != before["one"]
    assert after["two"] == before["two"]
    assert after == packages([str(place)])


def test_a_file_that_record_gains_is_seen_through_the_cache(place: Path) -> None:
    cache = place / "cache.json"
    before = packages([str(place)], cache=cache)
    (place / "one" / "b.py").write_text("")
    assert packages([str(place)], cache=cache) == before
    with (place / "one-1.0.dist-info" / "RECORD").open("a") as stream:
        stream.write("one/b.py,,\n")
    assert packages([str(place)], cache=cache)["one"] != before["one"]


@pytest.mark.parametrize("content", [b"", b"\xff", b"1 0\n{}", b"[]", b'1 44136fa355b3678a\n{"a": 1}'])
def test_a_broken_cache_is_made_again(place: Path, content: bytes) -> None:
    cache = place / "cache.json"
    expected = packages([str(place)], cache=cache)
    good = cache.read_bytes()
    cache.write_bytes(content)
    assert packages([str(place)], cache=cache) == expected
    assert cache.read_bytes() == good


def test_an_edited_cache_is_not_believed(place: Path) -> None:
    cache = place / "cache.json"
    expected = packages([str(place)], cache=cache)
    cache.write_bytes(cache.read_bytes().replace(expected["one"]["sha256"].encode(), b"0" * 64))
    assert packages([str(place)], cache=cache) == expected


def test_a_cache_that_cannot_be_written_is_none(place: Path) -> None:
    (place / "file").touch()
    assert packages([str(place)], cache=place / "file" / "cache.json") == packages([str(place)])


def test_the_first_folder_of_the_path_wins(tmp_path: Path) -> None:
    for folder, name in (
        ("a", "My_Pkg-2.0.dist-info"),
        ("b", "my.pkg-1.0.dist-info"),
        ("b", "old-3.1-py3.11.egg-info"),
    ):
        (tmp_path / folder / name).mkdir(parents=True)
    (tmp_path / "b" / "bare.egg-info").mkdir()
    path = [str(tmp_path / "absent"), str(tmp_path / "a"), str(tmp_path / "b")]
    reason = {"unknown": "its installer left no list of its files (RECORD)"}
    versions = {"bare": "unknown", "my-pkg": "2.0", "old": "3.1"}
    assert packages(path) == {name: {"sha256": reason, "version": version} for name, version in versions.items()}


def test_packages_are_looked_for_where_ranks_import_from(tmp_path: Path) -> None:
    """Neither PYTHONPATH nor the user's own nor the current folder, nor what a library has put on the path since."""
    user = tmp_path / "home" / "lib" / "python3.11" / "site-packages"
    install(user, "of_user")
    install(tmp_path / "path", "of_path")
    install(tmp_path / "cwd", "of_cwd")
    install(tmp_path / "later", "of_later")
    script = (
        "import sys, json; from apertus_nemo.record import software; software.file_sha256 = lambda path: '0'\n"
        f"sys.path.insert(0, {str(tmp_path / 'later')!r})\n"
        "print(json.dumps([list(software.packages()), sys.path, software.import_path()]))"
    )
    environment = {
        "PYTHONPATH": f"{ROOT}:{tmp_path / 'path'}",
        "PYTHONUSERBASE": str(tmp_path / "home"),
        "PATH": "/bin",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path / "cwd",
        env=environment,
        check=True,
        capture_output=True,
        timeout=60,
    )
    found, path, used = json.loads(done.stdout)
    assert "torch" in found
    assert not [name for name in found if name.startswith("of-")]
    assert set(used) < set(path)


def test_every_tool_of_the_tests_is_among_what_is_not_pinned() -> None:
    """So that `scripts/test` in the environment of a run does not make it another one."""
    for lock in ROOT.glob("requirements/dev-linux-*.txt"):
        names = re.findall(r"^([a-z0-9-]+)==", lock.read_text(), re.MULTILINE)
        assert names
        assert set(names) <= set(NOT_PINNED)
    assert all(NOT_PINNED.values())


def test_the_interpreter() -> None:
    found = interpreter()
    assert found["version"] == ".".join(map(str, sys.version_info[:3]))
    assert found["build"].startswith(found["version"])
    assert found["implementation"] == "CPython"
    assert re.fullmatch(r"(glibc|musl) [0-9.]+", found["libc"])

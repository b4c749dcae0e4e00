"""The part of the self-test that compares packages: what is not as the lock says is named."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from apertus_nemo.cli.main import main
from apertus_nemo.errors import InputError
from apertus_nemo.image.lock import ImageLock
from apertus_nemo.selftest.check import Check
from apertus_nemo.selftest.expected import look
from apertus_nemo.selftest.run import Result, selftest
from tests.unit.selftest import roots


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Result]:
    """The packages of a root folder, as the Python of that image would compare them, on x86-64."""

    def run(root: Path) -> Result:
        monkeypatch.setattr(sys, "prefix", str(root / "opt/apertus-nemo"))
        name = os.uname()
        monkeypatch.setattr(os, "uname", lambda: os.uname_result((*name[:4], "x86_64")))
        return selftest(lock=None, only=["packages"], shell={}, root=root, path=[str(roots.site(root))])

    return run


def of(result: Result, name: str) -> Check:
    """The check of that name."""
    (found,) = [check for check in result.checks if check.name == name]
    return found


def test_an_image_that_is_as_locked(tmp_path: Path, compared: Callable[[Path], Result]) -> None:
    result = compared(roots.make_root(tmp_path))
    assert [(check.name, check.state) for check in result.checks] == [
        ("python", "ok"),
        ("python packages", "ok"),
        ("python files", "ok"),
        ("debian packages", "ok"),
    ]
    assert result.exit_code == 0
    assert of(result, "python packages").reason == "2 as in the lock of cpu-1.2.3 for linux/amd64"
    tree = result.tree()
    assert (tree["image"], tree["lock_digest"], tree["verdict"]) == ("cpu-1.2.3", roots.lock().digest, "ok")


@pytest.mark.parametrize(
    ("python", "reason"),
    [
        ({"numpy": "1.26.3", "torch": "2.13.0+cpu"}, "numpy is 1.26.3, the lock says 1.26.4"),
        ({"torch": "2.13.0+cpu"}, "numpy 1.26.4 is missing"),
        (roots.PACKAGES | {"left_pad": "1.0"}, "left-pad 1.0 is installed, and not in the lock"),
        (roots.PACKAGES | {"torch": "2.13.0"}, "torch is 2.13.0, the lock says 2.13.0+cpu"),
    ],
)
def test_another_python_package_is_named(
    tmp_path: Path, compared: Callable[[Path], Result], python: dict[str, str], reason: str
) -> None:
    result = compared(roots.make_root(tmp_path, python=python))
    assert (of(result, "python packages").state, of(result, "python packages").reason) == ("failed", reason)
    assert (result.exit_code, result.tree()["verdict"]) == (1, "failed")


@pytest.mark.parametrize(
    ("debian", "reason"),
    [
        ({"libc6": "2.36-9", "tzdata": "2026a-0+deb12u1"}, "libc6 is 2.36-9 amd64, the lock says 2.36-9+deb12u13"),
        ({"libc6": "2.36-9+deb12u13"}, "tzdata 2026a-0+deb12u1 is missing"),
        (roots.DEBIAN | {"cowsay": "3"}, "cowsay 3 is installed, and not in the lock"),
    ],
)
def test_another_debian_package_is_named(
    tmp_path: Path, compared: Callable[[Path], Result], debian: dict[str, str], reason: str
) -> None:
    result = compared(roots.make_root(tmp_path, debian=debian))
    assert (of(result, "debian packages").state, of(result, "debian packages").reason) == ("failed", reason)
    assert result.exit_code == 1


def test_a_package_over_another_version_of_itself(tmp_path: Path, compared: Callable[[Path], Result]) -> None:
    root = roots.make_root(tmp_path)
    shutil.copytree(roots.site(root) / "numpy-1.26.4.dist-info", roots.site(root) / "numpy-2.0.0.dist-info")
    assert of(compared(root), "python packages").reason == "numpy is there in several versions: 1.26.4, 2.0.0"


def test_a_changed_file_and_a_missing_one(tmp_path: Path, compared: Callable[[Path], Result]) -> None:
    root = roots.make_root(tmp_path)
    (roots.site(root) / "numpy.py").write_text("version = '1.26.4'  \n")
    (roots.site(root) / "torch.py").unlink()
    result = compared(root)
    assert of(result, "python packages").state == "ok"
    assert of(result, "python files").reason == "numpy: numpy.py was changed; torch: torch.py is missing"
    assert result.exit_code == 1


def test_an_edited_lock(tmp_path: Path, compared: Callable[[Path], Result]) -> None:
    tree = json.loads(roots.lock().to_bytes())
    tree["platforms"]["linux/amd64"]["python"][0]["version"] = "1.26.3"
    result = compared(roots.make_root(tmp_path, ours=ImageLock(tree)))
    assert of(result, "python packages").reason == "numpy is 1.26.4, the lock says 1.26.3"
    assert result.exit_code == 1


def test_a_lock_of_another_definition(tmp_path: Path, compared: Callable[[Path], Result]) -> None:
    tree = json.loads(roots.lock().to_bytes())
    tree["definition_digest"] = "sha256:" + "0" * 64
    result = compared(roots.make_root(tmp_path, ours=ImageLock(tree)))
    assert of(result, "python").line() == (
        "not checked  python: there is no definition that the lock of cpu-1.2.3 for linux/amd64 was resolved from"
    )


def test_a_lock_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = json.loads(roots.lock().to_bytes())
    del tree["platforms"]["linux/arm64"]
    (tmp_path / "lock.json").write_text(json.dumps(tree))
    message = f"{tmp_path}/lock.json: is a lock for linux/amd64, and this machine is linux/arm64"
    with pytest.raises(InputError, match=message):
        look(tmp_path / "lock.json", machine="aarch64")
    (tmp_path / "lock.json").write_text("[]")
    assert main(["selftest", "--only", "packages", "--lock", str(tmp_path / "lock.json")]) == 2
    assert capsys.readouterr().err == f"apertus-nemo: {tmp_path}/lock.json: is not the lock of an image\n"


def test_this_environment_against_the_requirements(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["selftest", "--only", "packages"])
    said = capsys.readouterr().out
    assert code == 0, said
    assert "not checked  debian packages: this is no image: there is no /etc/apertus-nemo/lock.json\n" in said
    assert main(["selftest", "--only", "packages", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert (tree["image"], tree["lock_digest"], tree["verdict"]) == (None, None, "ok")
    assert tree["compared_with"].startswith("requirements/torch-")

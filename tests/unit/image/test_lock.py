"""Locks of images: what is in those that come with the package, what is refused, what makes one stale."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.errors import InputError
from apertus_nemo.image.definition import Definition, read_definition
from apertus_nemo.image.families import containers_folder, family_names
from apertus_nemo.image.lock import ImageLock, differences, parse_lock, read_lock, stale
from apertus_nemo.image.python_packages import _tags as compatible
from apertus_nemo.image.python_packages import _tags_of as tags_of
from apertus_nemo.image.python_packages import normal, parse_requirements
from apertus_nemo.record.files import file_sha256

ROOT = Path(__file__).resolve().parents[3]


def both(family: str) -> tuple[Definition, ImageLock]:
    folder = containers_folder() / family
    return read_definition(folder / "image.toml"), read_lock(folder / "lock.json")


@pytest.mark.parametrize("family", family_names())
def test_locks_fit_their_definitions_and_are_as_they_were_written(family: str) -> None:
    definition, lock = both(family)
    assert stale(lock, definition, ROOT) == [], f"run: apertus-nemo image lock {family}"
    assert lock.to_bytes() == (containers_folder() / family / "lock.json").read_bytes()


@pytest.mark.parametrize("family", family_names())
def test_every_python_package_is_one_that_the_requirements_allow(family: str) -> None:
    definition, lock = both(family)
    for platform in lock.platforms:
        allowed = {}
        for file in (*definition.requirements[platform], definition.installer):
            allowed.update({one.name: one for one in parse_requirements((ROOT / file).read_text(), what=file)})
        locked = lock.python(platform)
        assert all(one.version == allowed[one.name].version for one in locked)
        assert all(one.sha256 in allowed[one.name].sha256 for one in locked)
        wanted = {
            one.name
            for file in definition.requirements[platform]
            for one in parse_requirements((ROOT / file).read_text(), what=file)
        }
        assert {one.name for one in locked} == wanted | {"pip", "setuptools"}  # the installers
        for one in locked:
            wheel = one.file.endswith(".whl")
            assert wheel is (one.name not in definition.source_only), one
            assert normal(one.file.split("-")[0] if wheel else one.file.rsplit("-", 1)[0]) == one.name


@pytest.mark.parametrize("family", family_names())
def test_every_wheel_is_one_that_its_platform_installs(family: str) -> None:
    """By the tags of its name (PEP 425): this processor, this Python, glibc 2.28."""
    definition, lock = both(family)
    for platform in lock.platforms:
        tags = compatible(platform, definition.python_version)
        wheels = [one.file for one in lock.python(platform) if one.file.endswith(".whl")]
        assert [file for file in wheels if not set(tags_of(file)) & tags.keys()] == []
        machine = "aarch64" if platform.endswith("arm64") else "x86_64"
        assert {tag.rpartition("_" + machine)[1] for file in wheels for tag in tags_of(file)} == {"", "_" + machine}
    assert "linux/arm64" in lock.platforms


def test_the_cpu_image_holds_the_tested_stack_for_both_processors() -> None:
    _, lock = both("cpu")
    assert lock.unresolved == []
    for platform, machine in (("linux/amd64", "x86_64"), ("linux/arm64", "aarch64")):
        python = {one.name: one for one in lock.python(platform)}
        assert python["nemo-toolkit"].version == "2.7.3"
        assert machine in python["torch"].file
        assert {one.architecture for one in lock.debian(platform)} == {platform[6:], "all"}
        assert {"libc6", "python3.11", "tzdata"} <= {one.name for one in lock.debian(platform)}


def test_what_is_not_known_of_the_gh200_base_is_said_with_its_reason() -> None:
    definition, lock = both("gh200")
    assert any(line.startswith("platforms.linux/arm64.base: nvcr.io could not be reached") for line in lock.unresolved)
    assert any(line.startswith("base.packages: the base's own list") for line in lock.unresolved)
    assert lock.tree["base"]["digest"] == definition.base.digest
    ours = {one.name for one in lock.python("linux/arm64")}
    assert ours.isdisjoint(dict(definition.base.provides))
    assert not any("cp311-cp311" in one.file for one in lock.python("linux/arm64"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout, as far as locks look at one: requirements, and a project that wants what the lock holds."""
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nrequires-python = "==3.11.*"\ndependencies = [\n    "numpy<2",\n    "rfc8785",\n]\n'
    )
    return tmp_path


def resolved_from(root: Path) -> tuple[Definition, ImageLock]:
    """The cpu image's, as if it had been resolved from `root` just now, whatever the committed one is of."""
    definition, committed = both("cpu")
    tree: dict[str, Any] = json.loads(committed.to_bytes())
    for platform, entry in tree["platforms"].items():
        files = (*definition.requirements[platform], definition.installer)
        entry["requirements"] = {file: file_sha256(root / file) for file in files}
    tree["definition_digest"] = f"sha256:{definition.digest}"
    return definition, parse_lock(json.dumps(tree).encode(), what="lock.json")


def test_another_requirement_definition_or_dependency_makes_a_lock_stale(root: Path) -> None:
    definition, lock = resolved_from(root)
    assert stale(lock, definition, root) == []
    text = (containers_folder() / "cpu" / "image.toml").read_text()
    (root / "image.toml").write_text(text.replace('"tzdata"', '"tzdata", "git"'))
    assert stale(lock, read_definition(root / "image.toml"), root) == ["the definition has changed since"]
    (root / "requirements/linux-x86_64.txt").write_text("# another\n")
    (root / "requirements/torch-linux-aarch64.txt").unlink()
    assert stale(lock, definition, root) == [
        "linux/amd64: requirements/linux-x86_64.txt has changed since",
        "linux/arm64: requirements/torch-linux-aarch64.txt is not there",
    ]


def test_a_dependency_that_the_lock_lacks_makes_it_stale(root: Path) -> None:
    definition, lock = resolved_from(root)
    project = (root / "pyproject.toml").read_text()
    (root / "pyproject.toml").write_text(project.replace('    "rfc8785",', '    "rfc8785>=9",\n    "lz4",', 1))
    held = next(one.version for one in lock.python("linux/amd64") if one.name == "rfc8785")
    assert stale(lock, definition, root) == [
        f"{platform}: apertus-nemo wants {text}"
        for platform in lock.platforms
        for text in ("lz4, which it does not hold", f"rfc8785 >=9, it holds {held}")
    ]


def test_differences_are_named_by_package() -> None:
    _, lock = both("cpu")
    tree: dict[str, Any] = json.loads(lock.to_bytes())
    entries = tree["platforms"]["linux/arm64"]["python"]
    numpy = next(entry for entry in entries if entry["name"] == "numpy")
    numpy["version"], numpy["sha256"] = "1.26.5", "0" * 64
    entries.remove(next(entry for entry in entries if entry["name"] == "peft"))
    assert differences(lock, lock) == []
    found = differences(lock, parse_lock(json.dumps(tree).encode(), what="lock.json"))
    assert found[0] == "platforms.linux/arm64.python.numpy: 1.26.4 -> 1.26.5"
    assert len(found) == 2
    assert found[1].startswith("platforms.linux/arm64.python.peft: ")
    assert found[1].endswith("-> nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.pop("conflicts"), "lock.json: missing field 'conflicts'"),
        (lambda tree: tree.update(extra=1), "lock.json: unknown field 'extra'"),
        (lambda tree: tree.update(schema_version=2), "lock.json: has schema version 2; this version reads 1"),
        (lambda tree: tree.update(platforms={}), "lock.json: platforms must be an object with at least one platform"),
        (
            lambda tree: tree["platforms"].update({"plan9/mips": {}}),
            "lock.json: platforms.plan9/mips: is not a platform",
        ),
        (lambda tree: _debian(tree).update(sha256="0"), "lock.json: platforms.linux/amd64.debian.0: sha256 '0' is not"),
        (lambda tree: _debian(tree).update(file="../../etc/passwd"), "lock.json: platforms.linux/amd64.debian.0: file"),
        (
            lambda tree: _debian(tree).update(size_bytes=-1),
            "lock.json: platforms.linux/amd64.debian.0: size_bytes must",
        ),
        (lambda tree: _debian(tree).update(name="a b"), "lock.json: platforms.linux/amd64.debian.0: name 'a b' is not"),
        (lambda tree: _debian(tree).update(name="apt-get"), None),
    ],
)
def test_a_malformed_lock_is_refused_in_one_line(change: Any, message: str | None) -> None:
    tree = json.loads(both("cpu")[1].to_bytes())
    change(tree)
    data = json.dumps(tree).encode()
    if message is None:
        parse_lock(data, what="lock.json")
        return
    with pytest.raises(InputError) as caught:
        parse_lock(data, what="lock.json")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def _debian(tree: Any) -> Any:
    return tree["platforms"]["linux/amd64"]["debian"][0]


def refusal(data: bytes) -> str | None:
    """Why a lock is refused; None where it is read."""
    try:
        parse_lock(data, what="lock.json")
    except InputError as error:
        return str(error)
    return None


def test_damaged_locks_are_refused_and_nothing_else_happens() -> None:
    random.seed(5)
    small = json.loads(both("gh200")[1].to_bytes())
    entry = small["platforms"]["linux/arm64"]
    entry["python"] = entry["python"][:3]
    data, refused = json.dumps(small, indent=1).encode(), 0
    for _ in range(2000):
        damaged = bytearray(data)
        for _ in range(random.choice([1, 2, 4])):
            at = random.randrange(len(damaged))
            if random.random() < 0.5:
                damaged[at] = random.randrange(256)
            else:
                piece = random.choice([b"", b"null", b"[]", b"{}", b'"', b",", b"1e999", b"-", b"\\u0000"])
                damaged[at : at + random.randrange(12)] = piece
        message = refusal(bytes(damaged))
        refused += message is not None
        assert message is None or (message.startswith("lock.json: ") and "\n" not in message)
    assert refused > 800

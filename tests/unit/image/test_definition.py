"""Definitions of images: what is read, and that every fault is one line that names its key."""

from __future__ import annotations

import random
import tomllib
from pathlib import Path

import pytest

from apertus_nemo.errors import InputError
from apertus_nemo.image.definition import parse_definition, read_definition
from apertus_nemo.image.families import containers_folder, family_names

CPU = (containers_folder() / "cpu" / "image.toml").read_text()
GH200 = (containers_folder() / "gh200" / "image.toml").read_text()


def faults(text: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        parse_definition(text.encode(), what="image.toml")
    return str(caught.value).splitlines()


@pytest.mark.parametrize("family", family_names())
def test_what_comes_with_the_package_is_read_as_it_is_written(family: str) -> None:
    path = containers_folder() / family / "image.toml"
    found, tree = read_definition(path), tomllib.loads(path.read_text())
    assert found.family == family == tree["family"]
    assert list(found.platforms) == tree["platforms"]
    assert {key: list(value) for key, value in found.requirements.items()} == tree["python"]["requirements"]
    assert found.environment == tree["environment"]
    assert found.date == tree["date"].isoformat()


def test_the_time_stamp_is_the_start_of_the_day() -> None:
    # `date -u -d 2026-11-25 +%s`
    assert parse_definition(CPU.encode(), what="").epoch == 1795564800


def test_the_digest_is_of_the_content_and_not_of_comments() -> None:
    first = parse_definition(CPU.encode(), what="").digest
    assert parse_definition(b"# another comment\n" + CPU.encode(), what="").digest == first
    changed = CPU.replace('"tzdata"', '"tzdata", "git"')
    assert parse_definition(changed.encode(), what="").digest != first


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('version = "1.0.0"', 'version = "25.11"', "version '25.11' is not like 1.0.0"),
        ("date = 2026-11-25", "date = 2026-11-25T00:00:00", "date must be a day such as 2026-11-25, not"),
        ('title = "Apertus on CPUs"', "", "title is missing: write Apertus on CPUs"),
        (
            'family = "cpu"',
            'family = "cpu"\nenvironement = 1',
            "environement is not a key of a definition; did you mean environment?",
        ),
        ('"linux/amd64", ', '"linux/riscv64", ', "platforms holds 'linux/riscv64', which is not like linux/arm64"),
        ('kind = "debian"', 'kind = "scratch"', "base.kind must be debian or image, not 'scratch'"),
        ('suites = [["debian", "bookworm"]', 'suites = [["debian"]', "base.suites must be a list of pairs"),
        ('"tzdata",', '"tzdata", "tzdata",', "debian.packages holds 'tzdata' twice"),
        (
            '"tzdata",',
            '"tzdata; rm -rf /",',
            "debian.packages holds 'tzdata; rm -rf /', which is not like ca-certificates",
        ),
        (
            'prefix = "/opt/apertus-nemo"',
            'prefix = "/opt/../etc"',
            "python.prefix '/opt/../etc' is not like /opt/apertus-nemo",
        ),
        ('LANG = "C.UTF-8"', "LANG = 1", "environment.LANG must be text, not 1"),
        ('LANG = "C.UTF-8"', 'LANG = "a\\nRUN b"', "environment.LANG must be text, not"),
        (
            '"linux/arm64" = [',
            '"linux/arm65" = [',
            "python.requirements.linux/arm65 is not a key of a definition; did you mean linux/arm64?",
        ),
        (
            '"org.opencontainers.image.licenses"',
            '"org.opencontainers.image.version"',
            "labels.org.opencontainers.image.version is written by the build",
        ),
        (
            'imports = ["torch"',
            'imports = ["torch; import os"',
            "selftest.imports holds 'torch; import os', which is not like megatron.core",
        ),
        ("schema_version = 1", "schema_version = 2", "schema_version is 2; this version reads 1"),
    ],
)
def test_a_fault_is_named_with_its_key(old: str, new: str, message: str) -> None:
    assert old in CPU
    assert any(line.startswith(f"image.toml: {message}") for line in faults(CPU.replace(old, new, 1))), faults(
        CPU.replace(old, new, 1)
    )


def test_faults_are_named_all_at_once() -> None:
    text = GH200.replace('digest = "sha256:4', 'digest = "sha256:x', 1).replace(
        "[base.provides]\n", "[base.provides]\nTorch = {}\n"
    )
    found = faults(text)
    assert len(found) == 2
    assert "base.digest" in found[0]
    assert "base.provides.Torch is not the normalised name of a Python package" in found[1]


def test_debian_packages_do_not_stand_on_an_image() -> None:
    assert faults(GH200 + '\n[debian]\npackages = ["git"]\n') == [
        "image.toml: debian.packages cannot stand on an image: what is installed there is not known to the lock"
    ]


def test_sources_are_pinned_by_commit_and_hash() -> None:
    source = f"""
[[sources]]
name = "nccl-tests"
url = "https://example.org/nccl-tests.git"
commit = "{"a" * 40}"
sha256 = "{"b" * 64}"
target = "/opt/src/nccl-tests"
"""
    (found,) = parse_definition((CPU + source).encode(), what="").sources
    assert (found.name, found.commit) == ("nccl-tests", "a" * 40)
    assert faults(CPU + source.replace("a" * 40, "main")) == [
        "image.toml: sources.0.commit 'main' is not like 40 hex digits"
    ]


def test_malformed_definitions_are_refused_and_nothing_else_happens() -> None:
    """Thousands of damaged definitions: each is read, or refused in lines that name the file."""
    random.seed(20261125)
    refused = 0
    for _ in range(1500):
        data = bytearray(random.choice([CPU, GH200]).encode())
        for _ in range(random.choice([1, 1, 2, 5])):
            at = random.randrange(len(data))
            kind = random.randrange(4)
            if kind == 0:
                data[at] = random.randrange(256)
            elif kind == 1:
                del data[at : at + random.randrange(1, 40)]
            elif kind == 2:
                data[at:at] = random.choice([b"[", b"]", b'"', b"\n", b"=", b"{}", b"[[", b"1e999", b"\0", b"9" * 30])
            else:
                other = random.randrange(len(data))
                data[at:at] = data[other : other + random.randrange(1, 80)]
            if not data:
                break
        try:
            parse_definition(bytes(data), what="image.toml")
        except InputError as error:
            refused += 1
            lines = str(error).splitlines()
            good = all(line.startswith("image.toml: ") and line.isprintable() for line in lines)
            assert good, lines
    assert refused > 500


@pytest.mark.parametrize("data", [b"", b"\xff", b"a = " + b"[" * 100_000, b"a" * 100])
def test_what_is_no_toml_is_refused(data: bytes) -> None:
    with pytest.raises(InputError, match=r"^image.toml: "):
        parse_definition(data, what="image.toml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"could not read .*image.toml: No such file"):
        read_definition(tmp_path / "image.toml")

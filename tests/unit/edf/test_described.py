"""Image files with the sidecar that `image pull` writes: name, size and processor are held against it."""

# ruff: noqa: E501, ISC004  (the texts stand as they are printed)

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from apertus_nemo.cli.main import main
from apertus_nemo.edf.check import View, check_file
from apertus_nemo.edf.dialects import CE
from apertus_nemo.edf.sites import SITES
from apertus_nemo.image.sqsh import CHUNK_BYTES, FORMAT, KIND, write_sidecar

DIGEST = "sha256:" + hashlib.sha256(b"manifest").hexdigest()
BYTES = b"hsqs" + b"\0" * 96


def image(
    folder: Path, *, platform: str = "linux/arm64", name: str = DIGEST[7:19], size_bytes: int = len(BYTES)
) -> Path:
    """A file with the magic of SquashFS, and a sidecar in the format of `image pull`."""
    path = folder / f"gh200-1.0.0-{name}.sqsh"
    path.write_bytes(BYTES)
    digest = hashlib.sha256(BYTES).hexdigest()
    tree = {
        "format": FORMAT,
        "image": {"config_digest": DIGEST, "manifest_digest": DIGEST, "platform": platform, "reference": "x"},
        "kind": KIND,
        "made": {},
        "squashfs": {"chunk_bytes": CHUNK_BYTES, "chunks": [digest], "sha256": digest, "size_bytes": size_bytes},
    }
    write_sidecar(path, tree)
    return path


def found(path: Path) -> list[str]:
    edf = path.parent / "x.toml"
    edf.write_text(f'image = "{path}"\nentrypoint = false\n')
    report = check_file(edf, View(CE, {}, SITES["clariden"]))
    return [f"{f.line} {f.severity}: {f.what} | {f.why} | {f.do}" for f in report.findings]


def test_a_file_that_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = image(tmp_path)
    assert found(path) == []
    assert main(["edf", "render", "gh200-1.0.0", "--site", "clariden", "--image", str(path)]) == 0
    text = capsys.readouterr().out
    assert f"# Manifest digest {DIGEST}.\n# SHA-256 of the file: {hashlib.sha256(BYTES).hexdigest()}.\n" in text
    assert f'image = "{path}"' in text


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (
            {"platform": "linux/amd64"},
            "the image is for linux/amd64 | clariden has linux/arm64 | take the image for linux/arm64",
        ),
        (
            {"name": "0123456789ab"},
            f"the name of the image says 0123456789ab | the sidecar beside it says manifest digest {DIGEST} | "
            "give the file the name that `apertus-nemo image pull` gave it, or pull it again",
        ),
        (
            {"size_bytes": 4096},
            "the image has 100 bytes | the sidecar beside it says 4,096: it is another file, or half of one | pull it again",
        ),
    ],
)
def test_a_file_that_does_not(
    wrong: dict[str, str | int], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = image(tmp_path, **wrong)  # type: ignore[arg-type]
    assert found(path) == [f"1 error: {expected}"]
    assert main(["edf", "render", "gh200-1.0.0", "--site", "clariden", "--image", str(path)]) == 2
    what, why, do = expected.split(" | ")
    assert capsys.readouterr().err == f"apertus-nemo: --image {path}: {what}; {why}: {do}\n"


def test_a_sidecar_that_is_none(tmp_path: Path) -> None:
    path = image(tmp_path)
    path.with_name(path.name + ".json").write_text("{}\n")
    (finding,) = found(path)
    assert finding.startswith("1 warning: the sidecar of the image cannot be read | ")
    assert "is not a sidecar of format 1" in finding

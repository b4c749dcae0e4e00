"""`apertus-nemo edf`: exit codes, output, JSON, and that it starts at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from apertus_nemo.cli.main import main
from apertus_nemo.edf.explain import ANNOTATIONS, KEYS, explain, names
from apertus_nemo.edf.rules import RULES
from apertus_nemo.edf.rules_hooks import NAMES
from apertus_nemo.edf.rules_keys import TYPES
from apertus_nemo.errors import InputError

DOCS = Path(__file__).resolve().parents[3] / "docs"
HASH = "0123456789abcdef" * 4


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("good.toml").write_text(f'image = "/images/x-{HASH}.sqsh"\nentrypoint = false\n')
    Path("tag.toml").write_text('image = "ubuntu:24.04"\nentrypoint = false\n')
    Path("bad.toml").write_text('image = "ubuntu:24.04"\nentrypoint = false\nmount = ["/a:/a"]\n')
    return tmp_path


def test_check(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["edf", "check", "good.toml"]) == 0
    assert capsys.readouterr().out == "good.toml: nothing to say\n"
    assert main(["edf", "check", "tag.toml"]) == 0
    assert main(["edf", "check", "tag.toml", "--strict"]) == 2
    capsys.readouterr()
    assert main(["edf", "check", "good.toml", "bad.toml"]) == 2
    assert capsys.readouterr().out.splitlines() == [
        "good.toml: nothing to say",
        "bad.toml:1: warning: image by tag only: ubuntu:24.04 [image-tag]",
        "    why: a tag can be moved, and a copy in the cache is not refreshed: two users can get two images",
        "    do:  pin the content: a .sqsh file named by its hash",
        "bad.toml:3: error: 'mount' is not a key of an EDF [unknown-key]",
        "    why: no engine reads it, and none says so",
        "    do:  write mounts",
        "bad.toml: 1 error, 1 warning",
    ]


def test_check_json(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["edf", "check", "--json", "--dialect", "sarus", "bad.toml", "none.toml"]) == 2
    tree = json.loads(capsys.readouterr().out)
    assert (tree["valid"], tree["dialect"], tree["site"]) == (False, "sarus", None)
    assert [(file["file"], file["errors"], file["warnings"]) for file in tree["files"]] == [
        ("bad.toml", 1, 1),
        ("none.toml", 1, 0),
    ]
    assert tree["files"][1]["findings"][0]["why"] == "No such file or directory"


def test_nothing_of_a_file_drives_the_terminal(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("evil.toml").write_text('"\\u001b[2J" = "\\u001b]0;x\\u0007"\n[env]\n"\\u202eA" = 1\nB = "\\u001b[31m"\n')
    for verb in ("check", "effective"):
        main(["edf", verb, "evil.toml"])
        output = capsys.readouterr()
        assert (output.out + output.err).replace("\n", "").isprintable()
        assert output.out


def test_effective(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.toml").write_text('base_environment = "good"\nworkdir = "${PLACE}/${NOWHERE}"\n')
    assert main(["edf", "effective", "mine.toml", "--edf-path", ".", "--set", "PLACE=/here", "--json"]) == 0
    entries = {entry["key"]: entry for entry in json.loads(capsys.readouterr().out)["entries"]}
    assert entries["workdir"]["value"] == "/here/${NOWHERE}"
    assert entries["workdir"]["undefined"] == ["NOWHERE"]
    assert entries["image"]["origin"] == {"file": "good.toml", "line": 1, "via": ["mine.toml"]}
    assert main(["edf", "effective", "mine.toml"]) == 2
    assert "apertus-nemo: mine.toml:1: base_environment 'good' was not found" in capsys.readouterr().err


def test_render(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["edf", "render", "gh200-1.0.0", "--site", "clariden"]) == 3
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("apertus-nemo: gh200-1.0.0 is unbuilt, so there is no digest to pin")
    assert len(output.err.splitlines()) == 1
    pin = f"ghcr.io/team/gh200@sha256:{HASH}"
    assert main(["edf", "render", "gh200-1.0.0", "--site", "clariden", "--image", pin, "-o", "."]) == 0
    assert capsys.readouterr().out == "gh200-1-0-0.toml\n"
    assert f'image = "{pin}"' in Path("gh200-1-0-0.toml").read_text()
    assert main(["edf", "check", "--site", "clariden", "gh200-1-0-0.toml"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "gh200-1-0-0.toml: 1 note"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "good.toml", "--dialect", "docker"], "'docker' is not a dialect; there are ce, sarus"),
        (
            ["check", "good.toml", "--site", "lumi"],
            "'lumi' is not a site; there are clariden, daint, bristen, pyxis, pyxis-sl",
        ),
        (["check", "good.toml", "--site", "pyxis"], "pyxis reads no EDFs; leave --site out, or name another"),
        (["check", "good.toml", "--set", "X"], "--set 'X' is not NAME=VALUE"),
        (["effective", "none.toml"], "none.toml: cannot be read: No such file or directory; give the path of an EDF"),
        (["render", "gh200", "--site", "bristen"], "gh200 cannot run at bristen"),
        (["render", "gh200", "--site", "daint", "-o", "none"], "-o none is not a folder; make it first"),
        (["explain", "NCCL_PROT"], "nothing is known of 'NCCL_PROT'; did you mean NCCL_PROTO?"),
        (["explain", "xyzzy"], "nothing is known of 'xyzzy'; `apertus-nemo edf explain` lists what there is"),
    ],
)
def test_wrong_input(arguments: list[str], message: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["edf", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"apertus-nemo: {message}")
    assert len(output.err.splitlines()) == 1


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["edf", "explain"]) == 0
    index = capsys.readouterr().out
    for kind, entries in names().items():
        assert kind in index
        for name in entries:
            assert name in index.split()
            assert "source" in explain(name) or kind == "families"
    assert "left unset on purpose" in explain("NCCL_NET_PLUGIN")
    assert "conflict" in explain("NCCL_CROSS_NIC")
    assert "clariden: 26.05.1; daint: 26.05.1" in explain("com.hooks.netstack")
    with pytest.raises(InputError):
        explain("")


def test_tables_agree() -> None:
    assert set(KEYS) == set(TYPES)
    assert set(NAMES) <= set(ANNOTATIONS)


def test_every_rule_is_used_and_every_used_rule_is_there() -> None:
    package = Path(__file__).resolve().parents[3] / "apertus_nemo" / "edf"
    source = "".join(path.read_text() for path in package.glob("*.py") if path.name != "rules.py")
    assert {rule for rule in RULES if f'"{rule}"' not in source} == set()


def test_it_starts_at_once_and_light(files: Path) -> None:
    script = (
        "import sys; from apertus_nemo.cli.main import main; code = main(['edf', 'check', 'good.toml'])"
        "; heavy = {'torch', 'nemo', 'megatron', 'hydra', 'numpy'}; sys.exit(code or len(heavy & {*sys.modules}))"
    )
    subprocess.run([sys.executable, "-c", script], cwd=files, check=True, capture_output=True, timeout=60)

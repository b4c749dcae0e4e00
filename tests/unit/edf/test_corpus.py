"""Files as people have them, each written anew after a pattern seen in public repositories: exactly what is found.

Exactly: a fault that is missed fails, and so does a finding that is not expected.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from apertus_nemo.edf.check import View, check_file
from apertus_nemo.edf.dialects import CE, SARUS
from apertus_nemo.edf.sites import SITES

CORPUS = Path(__file__).parent / "corpus"
HOST = {"USER": "ada", "HOME": "/users/ada", "SCRATCH": "/scratch/ada", "PWD": "/work", "PATH": "/usr/bin"}

# file -> findings as (line, severity, rule); a line of 0: the finding is on what is missing
CE_FINDINGS = {
    "a100": "1 warning image-tag, 4 note mount-short, 15 warning netstack-unpinned, 15 warning ll128, "
    "0 note entrypoint-implicit",
    "alpine": "1 warning image-tag",
    "evaluation": "",
    "extended_image": "2 warning image-tag, 2 note own-netstack, 4 note mount-short",
    "extended_image_wrong": "1 warning image-tag, 1 error own-netstack, 1 warning own-netstack, 1 note own-netstack, "
    "4 error own-netstack",
    "forgotten_com": "10 error annotation-unknown, 11 error annotation-unknown",
    "heredoc": "2 warning image-path, 2 error variable-unbraced, 3 error variable-unbraced, 5 error variable-form, "
    "0 note entrypoint-implicit",
    "hooks_only": "0 note no-image",
    "inheriting": "1 warning base-by-search, 8 note path-from-host",
    "nested_hooks": "",
    "nested_tables": "1 warning image-path",
    "old_manual": "3 error not-toml",
    "podman": "2 warning image-tag, 5 note hook-unsupported, 14 note hook-unsupported",
    "posttraining": "2 warning image-tag, 3 note mount-short, 3 warning mount-home, 4 warning variable-undefined, "
    "9 note variable-undefined, 10 note variable-undefined",
    "pretraining": "2 warning image-path, 4 note mount-short, 4 warning mount-home, 9 warning netstack-unpinned, "
    "9 warning ll128, 0 note entrypoint-implicit",
    "quoted_keys": "",
    "rocm_artifact": "",
    "serving": "1 warning image-path, 6 note mount-short, 8 warning mount-shadows, 26 warning netstack-unpinned, "
    "0 note entrypoint-implicit",
    "serving_template": "2 error placeholder, 3 note mount-short, 0 note entrypoint-implicit",
    "sharing_a_gpu": "1 warning image-latest",
    "squashed_data": "1 error base-not-found, 1 warning relative-to-caller, 5 warning variable-form",
    "team_base": "0 note no-image",
    "top_level_dotted": "1 warning image-tag",
    "tutorial": "2 warning image-path, 5 note mount-short, 12 warning netstack-unpinned, 12 warning ll128, "
    "0 note entrypoint-implicit",
}
SARUS_FINDINGS = {
    "evaluation": "2 error image-format, 19 error variable-form, 20 error variable-form",
    "nested_hooks": "2 error image-format, 7 note hook-unsupported, 8 note hook-unsupported, 15 note hook-unsupported, "
    "16 note hook-unsupported, 17 note hook-unsupported",
    "podman": "2 warning image-tag",
    "quoted_keys": "1 error image-format, 6 error plugin-without-cxi, 7 note hook-unsupported, 8 note hook-unsupported",
    "sharing_a_gpu": "1 warning image-latest",
    "team_base": "0 error no-image",
    "tutorial": "2 error variable-in-image, 2 error image-format, 5 error mount-short, 6 error mount-short, "
    "12 error plugin-without-cxi, 12 warning ll128, 13 note hook-unsupported, 0 warning entrypoint-implicit",
}


def found(name: str, view: View) -> list[str]:
    report = check_file(CORPUS / f"{name}.toml", view, f"{name}.toml")
    return sorted(f"{finding.line or 0} {finding.severity} {finding.rule}" for finding in report.findings)


def expected(text: str) -> list[str]:
    return sorted(filter(None, text.split(", ")))


def test_every_file_is_judged() -> None:
    assert {path.stem for path in CORPUS.glob("*.toml")} == set(CE_FINDINGS)


@pytest.mark.parametrize("name", CE_FINDINGS)
def test_container_engine(name: str) -> None:
    assert found(name, View(CE, HOST, None, [CORPUS])) == expected(CE_FINDINGS[name])


@pytest.mark.parametrize("name", SARUS_FINDINGS)
def test_sarus_suite(name: str) -> None:
    assert found(name, View(SARUS, HOST, None, [CORPUS])) == expected(SARUS_FINDINGS[name])


def test_at_a_site_its_network_stack_is_known() -> None:
    """On Clariden artifacts are the default, which ignore the variant; LL128 does not concern Bristen's A100."""
    clariden = found("tutorial", View(CE, HOST, SITES["clariden"], [CORPUS]))
    assert "13 note plugin-variant" in clariden
    bristen = found("a100", View(CE, HOST, SITES["bristen"], [CORPUS]))
    assert [finding for finding in bristen if finding.endswith("ll128")] == []


@pytest.mark.parametrize("name", CE_FINDINGS)
def test_every_finding_is_whole(name: str, tmp_path: Path) -> None:
    shutil.copytree(CORPUS, tmp_path / "corpus")
    for dialect in (CE, SARUS):
        for finding in check_file(tmp_path / "corpus" / f"{name}.toml", View(dialect, HOST, None, [CORPUS])).findings:
            assert "" not in (finding.what, finding.why, finding.do)
            assert finding.line is None or 0 < finding.line <= len((CORPUS / f"{name}.toml").read_text().splitlines())
            assert len(finding.text().splitlines()) == 3
            assert finding.text().replace("\n", "").isprintable()

"""What `edf render` writes: golden files, valid for the rules, and the same values for every engine."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from apertus_nemo.edf.check import View, check_document, check_file
from apertus_nemo.edf.dialects import CE, SARUS
from apertus_nemo.edf.document import parse_document
from apertus_nemo.edf.pins import pin_of
from apertus_nemo.edf.render import carried, hook_annotations, parse_image, render
from apertus_nemo.edf.settings import BY_NAME, SETTINGS, SOURCES, uses_ll128, variables
from apertus_nemo.edf.sites import FAMILIES, PLATFORMS, SITES, fit
from apertus_nemo.errors import InputError, UnfitEnvironment
from apertus_nemo.image.families import containers_folder, family_names
from apertus_nemo.launch.environment import FIXED
from apertus_nemo.record.canonical import dumps
from tests.unit.edf.update import FOLDER

HASH = "0123456789abcdef" * 4
SQSH = f"/capstor/store/cscs/team/images/gh200-1.0.0-{HASH}.sqsh"
REFERENCE = f"ghcr.io/team/apertus/gh200@sha256:{HASH}"
HOST = {"USER": "ada", "SCRATCH": "/scratch/ada", "HOME": "/users/ada"}
EDF_SITES = [site for site in SITES.values() if site.engine == "ce"]


def test_the_files_of_the_repository() -> None:
    """If this fails on purpose: `python -m tests.unit.edf.update`, then look at the difference."""
    assert {path.name: path.read_text() for path in FOLDER.iterdir()} == {file.name: file.text for file in carried()}


def test_no_committed_file_names_an_image() -> None:
    for path in FOLDER.iterdir():
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert not [line for line in lines if "image =" in line or "--container-image" in line or "sha256:" in line]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_files_of_the_repository_are_right(path: Path, tmp_path: Path) -> None:
    assert "." not in path.stem
    site = SITES[path.stem.partition("-")[2]]
    report = check_file(path, View(CE, HOST, site))
    assert [finding.rule for finding in report.findings] == ["no-image"]
    mine = tmp_path / "mine.toml"
    mine.write_text(f'base_environment = "{path}"\nimage = "/images/x-{HASH}.sqsh"\n')
    assert check_file(mine, View(CE, HOST, site)).findings == ()


def test_network_stack_is_explicit() -> None:
    for name in ("clariden", "daint"):
        tree = tomllib.loads(render("gh200", SITES[name]).text)
        netstack = tree["annotations"]["com"]["hooks"]["netstack"]
        assert netstack["source"] == "artifact"
        assert re.fullmatch(r"\d\d\.\d\d\.\d", netstack["version"])
        assert re.fullmatch(r"gpu:cuda13,cxi:[\d.]+,ofi:[\d.]+,aws:[\d.]+\+dl", netstack["name"])


@pytest.mark.parametrize(
    "site", [site for site in EDF_SITES if site.architecture == "aarch64"], ids=lambda site: site.name
)
def test_a_pinned_file_is_complete(site: object) -> None:
    rendered = render("gh200-1.0.0", site, pin=SQSH)  # type: ignore[arg-type]
    assert rendered.name == "gh200-1-0-0.toml"
    tree = tomllib.loads(rendered.text)
    assert tree["image"] == SQSH
    assert "base_environment" not in tree
    assert "srun --environment=/path/of/gh200-1-0-0.toml --network=disable_rdzv_get ..." in rendered.text
    assert tree["env"] == tomllib.loads(render("gh200", site).text)["env"]  # type: ignore[arg-type]


def test_sarus_suite() -> None:
    rendered = render("gh200-1.0.0", SITES["clariden"], pin=REFERENCE, dialect=SARUS)
    document = parse_document(rendered.text.encode(), rendered.name)
    assert check_document(document, View(SARUS, HOST)).findings == ()
    assert {name: a.value for name, a in document.annotations.items()} == {
        "com.hooks.cxi.enabled": "true",
        "com.hooks.aws_ofi_nccl.enabled": "true",
    }
    with pytest.raises(InputError, match="Sarus Suite starts no files; give REFERENCE@sha256"):
        render("gh200-1.0.0", SITES["clariden"], pin=SQSH, dialect=SARUS)
    assert "it cannot be pinned here." in rendered.text
    assert "ENROOT_SLURM_HOOK" not in render("cpu", SITES["clariden"], dialect=SARUS).text
    base = render("gh200", SITES["clariden"], dialect=SARUS)
    assert tomllib.loads(base.text)["image"] == ""


@pytest.mark.parametrize("name", ["pyxis", "pyxis-slingshot"])
@pytest.mark.parametrize("pin", [None, SQSH, REFERENCE])
def test_bash_reads_the_shell_file(name: str, pin: str | None, tmp_path: Path) -> None:
    """The file sourced by bash: the variables are those of the EDF, the options arrive as words."""
    rendered = render("gh200" if pin is None else "gh200-1.0.0", SITES[name], pin=pin)
    assert rendered.name == (f"gh200-{name}.sh" if pin is None else "gh200-1-0-0.sh")
    path = tmp_path / rendered.name
    path.write_text(rendered.text)
    script = 'set -eu; export NCCL_NET_PLUGIN=ofi; . "$1"; printf "%s\\0" "${apertus_pyxis[@]}"; echo; env -0'
    done = subprocess.run(
        ["bash", "-c", script, "bash", str(path)],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        check=True,
        timeout=20,
    )
    words, _, rest = done.stdout.partition(b"\n")
    options = words.decode().rstrip("\0").split("\0")
    got = dict(entry.decode().split("=", 1) for entry in rest.split(b"\0") if entry)
    layers = ("slingshot", "framework", "python") if name == "pyxis-slingshot" else ("framework", "python")
    expected = variables(layers)
    assert {key: got[key] for key in got if key in BY_NAME} == expected | (
        {} if name == "pyxis-slingshot" else {"NCCL_NET_PLUGIN": "ofi"}
    )
    assert ("--container-env=" + ",".join(expected)) in options
    assert ([f"--container-image={pin}"] if pin else []) == [o for o in options if o.startswith("--container-image")]
    assert ("--network=disable_rdzv_get" in options) == (name == "pyxis-slingshot")
    assert "--no-container-mount-home" in options


def test_pyxis_gets_the_values_of_the_edf() -> None:
    edf = tomllib.loads(render("gh200", SITES["clariden"]).text)["env"]
    shell = render("gh200", SITES["pyxis-slingshot"]).text
    assert edf == variables(("slingshot", "framework", "python"))
    for key in edf:
        assert f"export {key}=" in shell


@pytest.mark.parametrize(
    ("pin", "site", "message"),
    [
        (
            "ghcr.io/team/gh200:1.0.0",
            "clariden",
            "--image ghcr.io/team/gh200:1.0.0 does not pin an image: give REFERENCE@sha",
        ),
        (f"ghcr.io/team/gh200@sha256:{HASH[:-1]}", "clariden", "does not pin an image"),
        ("/images/gh200.sqsh", "clariden", "does not pin an image"),
        (f"images/{HASH}.sqsh", "clariden", "does not pin an image"),
        (f'/images/"\n{HASH}.sqsh', "daint", "does not pin an image"),
        (f"/images/../{HASH}.sqsh", "daint", "does not pin an image"),
        (f"https://user:secret@host/x@sha256:{HASH}", "daint", "does not pin an image"),
    ],
)
def test_what_pins_nothing_is_refused(pin: str, site: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        render("gh200-1.0.0", SITES[site], pin=pin)


def test_what_cannot_be_rendered() -> None:
    with pytest.raises(InputError, match="gh200 cannot run at bristen: gh200 is built for aarch64; bristen is x86_64"):
        render("gh200", SITES["bristen"])
    with pytest.raises(InputError, match="pyxis reads no EDFs, so there is none for Sarus Suite"):
        render("gh200", SITES["pyxis"], dialect=SARUS)
    for wrong in ("gh200-1.0", "gh200-1.0.0.toml", "", "../gh200", "gh200-1.0.0\n"):
        with pytest.raises(InputError, match="is not the name of an image: write a family and a version, as in gh200"):
            parse_image(wrong)
    with pytest.raises(InputError, match="there is no family of images 'h100'; there are cpu, gh200"):
        parse_image("h100-1.0.0")
    with pytest.raises(InputError, match="gh200 has no version 7"):
        parse_image("gh200-7.0.0")


def test_families_are_those_that_have_definitions() -> None:
    assert sorted(FAMILIES) == family_names()
    for name, family in FAMILIES.items():
        definition = tomllib.loads((containers_folder() / name / "image.toml").read_text())
        assert sorted(definition["platforms"]) == sorted(PLATFORMS[one] for one in family.architectures)


def test_an_unbuilt_image_has_no_digest() -> None:
    for site in ("clariden", "pyxis"):
        with pytest.raises(
            UnfitEnvironment, match=r"^gh200-1\.0\.0 is unbuilt, so there is no digest to pin: build and"
        ):
            pin_of("gh200-1.0.0", SITES[site])


def test_a_published_image_is_pinned_by_its_release(tmp_path: Path) -> None:
    """In a copy of `containers/` with a list of releases, since nothing is published yet."""
    for name, platforms in (("gh200", ["linux/arm64"]), ("cpu", ["linux/amd64", "linux/arm64"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "image.toml").write_bytes((containers_folder() / name / "image.toml").read_bytes())
        entries = {
            platform: {
                "config_digest": f"sha256:{'1' * 64}",
                "lock_digest": f"sha256:{'2' * 64}",
                "manifest_digest": f"sha256:{number}{HASH[1:]}",
                "reference": f"ghcr.io/team/{name}:1.0.0",
            }
            for number, platform in enumerate(platforms)
        }
        (tmp_path / name / "releases.json").write_bytes(dumps({"1.0.0": entries}))
    pin = pin_of("gh200-1.0.0", SITES["clariden"], tmp_path)
    assert pin == f"ghcr.io/team/gh200@sha256:0{HASH[1:]}"
    assert f'image = "{pin}"' in render("gh200-1.0.0", SITES["clariden"], pin=pin).text
    assert pin_of("cpu-1.0.0", SITES["bristen"], tmp_path).endswith(f"@sha256:0{HASH[1:]}")
    assert pin_of("cpu-1.0.0", SITES["daint"], tmp_path).endswith(f"@sha256:1{HASH[1:]}")
    with pytest.raises(
        InputError, match=r"cpu-1\.0\.0 is published for linux/amd64 and linux/arm64, and pyxis may be any"
    ):
        pin_of("cpu-1.0.0", SITES["pyxis"], tmp_path)
    with pytest.raises(UnfitEnvironment, match=r"gh200-1\.0\.0 was not published for linux/amd64, which bristen has"):
        pin_of("gh200-1.0.0", SITES["bristen"], tmp_path)


def test_settings_have_reason_and_source() -> None:
    assert len(BY_NAME) == len(SETTINGS)
    for setting in SETTINGS:
        assert setting.reason
        assert setting.sources
        assert set(setting.sources) <= set(SOURCES)
    assert {key for setting in SETTINGS for key in setting.sources} >= {
        "nccl#2001",
        "nccl#2053",
        "hpe#21",
        "hook",
        "aei",
    }


def test_both_mitigations_of_ll128() -> None:
    values = variables(("slingshot",))
    assert not uses_ll128(values["NCCL_PROTO"])
    assert (values["FI_CXI_RDZV_THRESHOLD"], values["FI_CXI_RDZV_GET_MIN"]) == ("0", "0")
    assert "NCCL_NET_PLUGIN" not in values


def test_settings_agree_with_what_a_rank_gets() -> None:
    """`launch` pins some of these for every rank."""
    for name, setting in BY_NAME.items():
        assert FIXED.get(name, setting.value) == setting.value


def test_hooks_follow_family_and_site() -> None:
    for family in FAMILIES.values():
        for site in EDF_SITES:
            if fit(family, site) is None:
                names = [name for name, _ in hook_annotations(family, site, CE)]
                assert ("com.hooks.netstack.source" in names) == family.gpu

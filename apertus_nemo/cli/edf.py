"""`apertus-nemo edf check`, `effective`, `render`, `explain`; see docs/edf.md."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from apertus_nemo.cli.arguments import explained

if TYPE_CHECKING:
    from apertus_nemo.edf.check import View
    from apertus_nemo.edf.described import Described
    from apertus_nemo.edf.sites import Site


def main(arguments: Sequence[str]) -> int:
    """0 done, 2 an EDF has errors. What cannot be done leaves as ApertusError, wrong usage as SystemExit(2)."""
    options = parser().parse_args(arguments)
    if options.verb == "check":
        return _check(options)
    if options.verb == "effective":
        return _effective(options)
    if options.verb == "render":
        return _render(options)
    from apertus_nemo.edf.explain import explain, index

    sys.stdout.write(explain(options.key) if options.key is not None else index())
    return 0


def _check(options: argparse.Namespace) -> int:
    from apertus_nemo.edf.check import check_file

    view = _view(options)
    reports = [check_file(Path(file), view) for file in options.file]
    failed = any(report.invalid or (options.strict and report.count("warning")) for report in reports)
    if options.json:
        tree = {
            "dialect": options.dialect,
            "files": [report.tree() for report in reports],
            "site": options.site,
            "valid": not failed,
        }
        print(json.dumps(tree, indent=2, sort_keys=True))
        return 2 if failed else 0
    for report in reports:
        for finding in report.findings:
            print(finding.text())
        print(report.summary())
    return 2 if failed else 0


def _effective(options: argparse.Namespace) -> int:
    from apertus_nemo.edf.document import read_document
    from apertus_nemo.edf.effective import effective

    result = effective(read_document(Path(options.file)), _view(options))
    if options.json:
        print(json.dumps(result.tree(), indent=2, sort_keys=True))
    else:
        sys.stdout.write(result.text())
    return 0


def _render(options: argparse.Namespace) -> int:
    from apertus_nemo.edf.dialects import dialect_named
    from apertus_nemo.edf.pins import pin_of
    from apertus_nemo.edf.render import parse_image, render
    from apertus_nemo.edf.sites import site_named

    site, dialect = site_named(options.site), dialect_named(options.dialect)
    family, version = parse_image(options.image)
    pin = options.pin
    if pin is None and version is not None:
        render(family.name, site, dialect=dialect)  # says first what is wrong with the rest
        pin = pin_of(options.image, site)
    facts = _facts(options.pin, site) if options.pin is not None else None
    rendered = render(options.image, site, pin=pin, dialect=dialect, facts=facts)
    if options.output is None:
        sys.stdout.write(rendered.text)
        return 0
    from apertus_nemo.errors import InputError
    from apertus_nemo.record.files import write_atomic

    if not options.output.is_dir():
        raise InputError(f"-o {options.output} is not a folder; make it first")
    write_atomic(options.output / rendered.name, rendered.text.encode())
    print(options.output / rendered.name)
    return 0


def _facts(pin: str, site: Site) -> Described | None:
    """What is known of a pinned file that lies on this machine. Raises InputError where it contradicts itself."""
    from apertus_nemo.edf.described import contradictions, described
    from apertus_nemo.errors import InputError

    path = Path(pin)
    if not pin.startswith("/") or "\0" in pin or not path.is_file():
        return None
    facts = described(path)
    for what, why, do in contradictions(path, facts, size_bytes=path.stat().st_size, site=site) if facts else ():
        raise InputError(f"--image {pin}: {what}; {why}: {do}")
    return facts


def _view(options: argparse.Namespace) -> View:
    from apertus_nemo.edf.check import View
    from apertus_nemo.edf.dialects import dialect_named
    from apertus_nemo.edf.sites import site_named
    from apertus_nemo.errors import InputError

    environment = dict(os.environ)
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(f"--set {text!r} is not NAME=VALUE")
        environment[name] = value
    site = None if options.site is None else site_named(options.site)
    if site is not None and site.engine != "ce":
        raise InputError(f"{site.name} reads no EDFs; leave --site out, or name another")
    return View(dialect_named(options.dialect), environment, site, options.edf_path)


def parser() -> argparse.ArgumentParser:
    """The options of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="apertus-nemo edf",
        **explained(
            "Check, show, write and explain Environment Definition Files, by which clusters start containers.",
            examples={
                "apertus-nemo edf check ~/.edf/*.toml": "",
                "apertus-nemo edf effective mine.toml": "",
                "apertus-nemo edf render gh200 --site clariden": "",
                "apertus-nemo edf explain NCCL_CROSS_NIC": "",
            },
            exit_codes={
                0: "done: no errors, warnings or not",
                2: "an EDF has errors, or the input is wrong",
                3: "render: an image that is unbuilt, or a folder that cannot be written",
            },
        ),
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{check,effective,render,explain}")
    check = verbs.add_parser(
        "check",
        help="find the faults of EDFs",
        **explained(
            "Find the faults of EDFs and of the files that they inherit from.",
            examples={
                "apertus-nemo edf check ~/.edf/*.toml": "",
                "apertus-nemo edf check mine.toml --site clariden --set SCRATCH=/scratch/ada": "as if there",
            },
            exit_codes={0: "no errors (--strict: no warnings either)", 2: "errors"},
        ),
    )
    check.add_argument("file", nargs="+", metavar="FILE", help="an EDF")
    check.add_argument("--strict", action="store_true", help="exit with 2 for warnings too")
    effective = verbs.add_parser(
        "effective",
        help="show what a container gets, and where it comes from",
        **explained(
            "Show what a container gets from an EDF, and where each value comes from. Secrets are masked.",
            examples={"apertus-nemo edf effective mine.toml --set SCRATCH=/scratch/ada": ""},
            exit_codes={0: "shown", 2: "no EDF, or a base of it is missing"},
        ),
    )
    effective.add_argument("file", metavar="FILE", help="an EDF")
    for verb in (check, effective):
        verb.add_argument(
            "--dialect", default="ce", metavar="D", help="ce: Container Engine (default); sarus: Sarus Suite"
        )
        verb.add_argument(
            "--site", metavar="SITE", help="clariden, daint or bristen: its defaults and processor count too"
        )
        verb.add_argument(
            "--edf-path", action="append", type=Path, metavar="DIR", help="look for bases here instead of in EDF_PATH"
        )
        verb.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a variable of the host")
        verb.add_argument("--json", action="store_true", help="print JSON")
    render = verbs.add_parser(
        "render",
        help="write the EDF that pins an image",
        **explained(
            "Write the EDF that pins an image at a site; for a family without a version, its settings alone.",
            examples={
                "apertus-nemo edf render gh200 --site clariden": "the settings",
                "apertus-nemo edf render gh200-1.0.0 --site clariden --image HOST/NAME@sha256:HEX -o ~/.edf": "",
            },
            exit_codes={
                0: "written",
                2: "no such image or site, or an image that pins nothing or is not what it says",
                3: "an image that is unbuilt, or a folder that cannot be written",
            },
        ),
    )
    render.add_argument("image", metavar="IMAGE", help="FAMILY-VERSION, as gh200-1.0.0, or FAMILY")
    render.add_argument(
        "--site", required=True, metavar="SITE", help="clariden, daint, bristen, pyxis or pyxis-slingshot"
    )
    render.add_argument(
        "--image",
        dest="pin",
        metavar="PIN",
        help="REFERENCE@sha256:... or a .sqsh named by its content, to pin instead",
    )
    render.add_argument("--dialect", default="ce", metavar="D", help="ce (default) or sarus")
    render.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="write the file into DIR instead of printing it"
    )
    explain = verbs.add_parser(
        "explain",
        help="say what a key, setting, annotation or rule is for",
        **explained(
            "Say what a key, a setting, an annotation or a rule is for, why, and who says so.",
            examples={"apertus-nemo edf explain": "all names", "apertus-nemo edf explain NCCL_CROSS_NIC": ""},
            exit_codes={0: "explained", 2: "there is no such name"},
        ),
    )
    explain.add_argument("key", nargs="?", metavar="NAME", help="without it: all names")
    return parser

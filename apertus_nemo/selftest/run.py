"""The self-test: every check in turn, each told as soon as it is done.

    result = selftest(lock=None, only=(), shell=os.environ, say=print)
    result.checks, result.exit_code

Nothing is written but below a temporary folder, which is removed.
"""

from __future__ import annotations

import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apertus_nemo.errors import UnfitEnvironment
from apertus_nemo.launch.environment import ALLOWED, FIXED
from apertus_nemo.record.software import import_path
from apertus_nemo.selftest.check import FAILED, NOT_CHECKED, OK, Check, exit_code, verdict
from apertus_nemo.selftest.expected import Expected, look

PARTS = ("packages", "imports", "step", "collectives")
_IMPORT_LIMIT_S = 1800.0  # emulated processors are slow
_COLLECTIVE_LIMIT_S = 900.0

Say = Callable[[Check], None]


@dataclass
class Result:
    """What was found."""

    expected: Expected
    checks: list[Check] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0, or 1 where a check failed."""
        return exit_code(self.checks)

    def tree(self) -> dict[str, Any]:
        """As plain data."""
        lock = self.expected.lock
        return {
            "checks": [check.tree() for check in self.checks],
            "compared_with": self.expected.what,
            "image": lock.name if lock is not None and self.expected.in_image else None,
            "lock_digest": None if lock is None else lock.digest,
            "verdict": FAILED if self.exit_code else OK,
        }


def selftest(
    *,
    lock: Path | None,
    only: Sequence[str],
    shell: Mapping[str, str],
    say: Say = lambda _: None,
    root: Path = Path("/"),
    path: Sequence[str] | None = None,
) -> Result:
    """`only`: some of PARTS, in place of all; `path`: where packages are looked for, in place of the ranks' own.

    Raises InputError for a lock that cannot be used, UnfitEnvironment where nothing can be written.
    """
    parts = set(only) or set(PARTS)
    result = Result(look(lock, root=root))

    def add(check: Check) -> None:
        result.checks.append(check)
        say(check)

    if "packages" in parts:
        _packages(result.expected, import_path() if path is None else path, root, add)
    if parts - {"packages"}:
        _working(result.expected, parts, shell, add)
    return result


def _packages(expected: Expected, path: Sequence[str], root: Path, add: Say) -> None:
    from apertus_nemo.selftest import packages

    definition = expected.definition
    if definition is None:
        add(Check("python", NOT_CHECKED, f"there is no definition that {expected.what} was resolved from"))
    else:
        here = ".".join(platform.python_version_tuple()[:2])
        wanted = definition.python_version
        faults = [f"Python is {here}, the definition says {wanted}"] if here != wanted else []
        add(verdict("python", faults, f"{platform.python_version()} in {sys.prefix}"))
    found = packages.installed(path)
    add(
        packages.python_versions(
            expected.python, found, strict=expected.strict, what=expected.what, optional=expected.optional
        )
    )
    names = [name for name in found if name in expected.python or expected.strict]
    add(packages.python_files(names, found))
    if expected.debian is None:
        add(Check("debian packages", NOT_CHECKED, expected.no_debian))
        return
    try:
        status = (root / packages.DPKG_STATUS).read_bytes()
    except OSError as error:
        add(Check("debian packages", FAILED, f"/{packages.DPKG_STATUS} cannot be read: {error.strerror}"))
        return
    add(packages.debian_versions(expected.debian, status, what=expected.what))


def _working(expected: Expected, parts: set[str], shell: Mapping[str, str], add: Say) -> None:
    from apertus_nemo.selftest.works import importing, training_step

    # As ranks get it, but for what hides GPUs; nothing of the shell's Python.
    environment = {name: shell[name] for name in ALLOWED if name in shell} | FIXED
    definition = expected.definition
    modules = definition.imports if definition is not None and "imports" in parts else ()
    check, gpus, why = importing(modules, environment, limit_s=_IMPORT_LIMIT_S)
    if check is not None:
        add(check)
    elif "imports" in parts:
        add(Check("imports", NOT_CHECKED, "there is no definition that names any"))
    if "step" in parts:
        try:
            with tempfile.TemporaryDirectory(prefix="apertus-nemo-selftest-") as folder:
                add(training_step(Path(folder), gpu=gpus > 0))
        except OSError as error:
            raise UnfitEnvironment(f"the self-test needs a folder for temporary files: {error}") from error
    if "collectives" in parts:
        _collectives(expected, gpus, why, environment, shell, add)


def _collectives(
    expected: Expected, gpus: int, why: str, environment: Mapping[str, str], shell: Mapping[str, str], add: Say
) -> None:
    from apertus_nemo.selftest import collectives

    gloo = {**environment, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    limit = _COLLECTIVE_LIMIT_S
    add(collectives.all_reduce("gloo", ranks=2, messages=collectives.CPU_MESSAGES, environment=gloo, limit_s=limit)[0])
    if gpus == 0:
        add(Check("all-reduce nccl", NOT_CHECKED, why))
        add(Check("network plugin", NOT_CHECKED, why))
        return
    # The site's own settings of NCCL and libfabric are what is tested here.
    site = {**{name: text for name, text in shell.items() if not name.startswith("PYTHON")}, **environment}
    log = ""
    for protocol in collectives.PROTOCOLS:
        check, said = collectives.all_reduce(
            "nccl",
            ranks=gpus,
            messages=collectives.GPU_MESSAGES if gpus > 1 else (),
            environment=site,
            limit_s=limit,
            protocol=protocol,
        )
        log += said
        if gpus == 1 and check.state == OK:
            check = Check(check.name, NOT_CHECKED, "one GPU: there is nobody to sum with")
        add(check)
    add(collectives.network_plugin(expected.definition.network_plugin if expected.definition else None, log))

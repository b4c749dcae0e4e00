"""Rules on `mounts` and `workdir`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from apertus_nemo.edf.finding import ERROR, NOTE, WARNING, Finding, short
from apertus_nemo.edf.inherit import Origin
from apertus_nemo.edf.rules import Case, at
from apertus_nemo.edf.rules_image import PLACEHOLDER

# Flags of mount(8) that make sense here, and Enroot's own (doc/configuration.md).
FLAGS = {
    *("ro", "rw", "private", "rprivate", "shared", "rshared", "slave", "rslave", "unbindable", "bind", "rbind"),
    *("nosuid", "suid", "nodev", "dev", "noexec", "exec", "noatime", "relatime", "nofail", "sqsh"),
    *("x-create=dir", "x-create=file", "x-create=auto", "x-move", "x-detach"),
}
_VARIABLE = re.compile(r"\$\{[^}]*\}|\$\$\{")
_LIBRARY = re.compile(r"(?:/usr|/usr/local)?/lib(?:64)?/.*\.so\b")
_OF_SLURM = re.compile("slurm|munge")  # must be the host's
_WHOLE = {
    "/",
    "/bin",
    "/sbin",
    "/etc",
    "/lib",
    "/lib64",
    "/opt",
    "/usr",
    "/usr/bin",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local",
    "/var",
}
_PACKAGES = re.compile(r"/(?:site|dist)-packages(?:/|\Z)")
_HOMES = re.compile(r"/(?:users|home)(?:/[^/]+)?|\$\{?HOME\}?|/root")


@dataclass(frozen=True)
class Mount:
    """One mount as written; `destination` is the source where it is short."""

    text: str
    source: str
    destination: str
    flags: str
    short: bool
    origin: Origin


def split(text: str) -> list[str]:
    """The fields between colons; colons inside ${VAR:-} do not count."""
    held: list[str] = []

    def hold(match: re.Match[str]) -> str:
        held.append(match[0])
        return f"\0{len(held) - 1}\0"

    fields = _VARIABLE.sub(hold, text.replace("\0", "")).split(":")
    return [re.sub("\0(\\d+)\0", lambda match: held[int(match[1])], part) for part in fields]


def mounts(case: Case) -> list[Mount]:
    """The mounts that have a form; the others are found by `check_mounts`."""
    found = []
    for value in case.merged.mounts:
        if isinstance(value.value, str):
            parts = split(value.value)
            if 1 <= len(parts) <= 3 and all(parts):
                destination = parts[1] if len(parts) > 1 else parts[0]
                flags = parts[2] if len(parts) > 2 else ""
                found.append(Mount(value.value, parts[0], destination, flags, len(parts) == 1, value.origin))
    return found


def check_mounts(case: Case) -> Iterator[Finding]:
    """All rules of this file."""
    yield from _forms(case)
    good = mounts(case)
    yield from _paths(case, good)
    yield from _flags(case, good)
    yield from _twice(case, good)
    yield from _shadows(good)
    yield from _home(case, good)
    yield from _workdir(case)


def _forms(case: Case) -> Iterator[Finding]:
    shorts = []
    for value in case.merged.mounts:
        text = value.value
        if not isinstance(text, str):
            continue
        if match := PLACEHOLDER.search(text):
            do = "write the real name; variables are written ${NAME}"
            yield at(
                value.origin,
                ERROR,
                "placeholder",
                f"{short(match[0])} in a mount was not replaced",
                "no engine replaces it",
                do,
            )
            continue
        parts = split(text)
        if len(parts) > 3 or not all(parts):
            why = "a mount is SOURCE:DESTINATION[:FLAGS]"
            yield at(
                value.origin,
                ERROR,
                "mount-format",
                f"mount {short(text)!r} has {len(parts)} fields, or an empty one",
                why,
                "correct it",
            )
        elif len(parts) == 1:
            shorts.append((value.origin, text))
    for origin, text in shorts if not case.dialect.short_mounts else shorts[:1]:
        others = f" and {len(shorts) - 1} more" if case.dialect.short_mounts and len(shorts) > 1 else ""
        what = f"mount {short(text)!r}{others} without a destination"
        do = f'write "{short(text)}:{short(text)}"'
        if case.dialect.short_mounts:
            why = "it works here, but stands in no reference, and Sarus Suite refuses it"
            yield at(origin, NOTE, "mount-short", what, why, do)
        else:
            yield at(origin, ERROR, "mount-short", what, "Sarus Suite refuses it", do)


def _paths(case: Case, good: list[Mount]) -> Iterator[Finding]:
    for mount in good:
        for part, path in (("source", mount.source), ("destination", mount.destination)):
            if path.startswith(("/", "${")) or (case.dialect.bash_variables and path.startswith("$")):
                continue
            if path.startswith("$"):
                continue  # said by the rules on variables
            what = f"the {part} {short(path)!r} of a mount is no absolute path"
            if path.startswith("~"):
                why, do = "no engine replaces ~", "write ${HOME}"
                yield at(mount.origin, ERROR, "mount-format", what, why, do)
            elif path.startswith(("./", "../")) or path in (".", ".."):
                why = "it starts in the folder in which srun is called, not at this file"
                yield at(mount.origin, WARNING, "relative-to-caller", what, why, "write the absolute path")
            else:
                why = "a relative path must start with ./, and is relative to where srun is called"
                yield at(mount.origin, ERROR, "mount-format", what, why, "write the absolute path")
            break


def _flags(case: Case, good: list[Mount]) -> Iterator[Finding]:
    right, wrong = (("+", ","), (",", "+"))[case.dialect.flag_separator == ","]
    for mount in good:
        if not mount.flags or "$" in mount.flags:
            continue
        what = f"flags {short(mount.flags)!r} of a mount"
        if wrong in mount.flags:
            if case.sarus:
                why = "Sarus Suite splits flags at commas, though the reference documents +"
            else:
                why = "the Container Engine splits flags at +, and takes these for one"
            do = f"write {short(mount.flags.replace(wrong, right))}"
            yield at(mount.origin, ERROR, "mount-flags", what, why, do)
            continue
        flags = mount.flags.split(right)
        unknown = [flag for flag in flags if flag not in FLAGS]
        if unknown:
            why = f"{short(unknown[0])!r} is no flag that mount(8) or Enroot names"
            yield at(
                mount.origin, WARNING, "mount-flags", what, why, "known: " + ", ".join(sorted(FLAGS)[:6]) + ", ..."
            )
        if "sqsh" in flags and len(flags) > 1:
            why = "sqsh must be the only flag; beside others the file is bind-mounted as it is"
            yield at(mount.origin, ERROR, "mount-flags", what, why, "write sqsh alone: it is read-only by itself")
        elif "sqsh" in flags and not case.dialect.sqsh_mounts:
            yield at(
                mount.origin,
                ERROR,
                "mount-flags",
                what,
                "Sarus Suite does not mount SquashFS files yet",
                "unpack it, or use the Container Engine",
            )


def _twice(case: Case, good: list[Mount]) -> Iterator[Finding]:
    seen: dict[str, Mount] = {}
    for mount in good:
        destination = case.expanded(mount.destination).text.rstrip("/") or "/"
        former = seen.get(destination)
        source = case.expanded(mount.source).text.rstrip("/")
        if former is not None and case.expanded(former.source).text.rstrip("/") != source:
            what = f"two mounts at {short(destination)}"
            why = f"the later one hides that of {former.origin.file}:{former.origin.line}"
            yield at(mount.origin, WARNING, "mount-twice", what, why, "keep one")
        seen[destination] = mount


def _shadows(good: list[Mount]) -> Iterator[Finding]:
    libraries = []
    for mount in good:
        destination = mount.destination.rstrip("/") or "/"
        if destination in _WHOLE or _PACKAGES.search(mount.destination):
            why = "it hides what the image has there: what runs is not what the image holds"
            yield at(
                mount.origin,
                WARNING,
                "mount-shadows",
                f"a mount at {short(destination)}",
                why,
                "choose another destination",
            )
        elif _LIBRARY.match(destination) and not _OF_SLURM.search(destination):
            libraries.append(mount)
    if libraries:
        first = libraries[0]
        number = f" and {len(libraries) - 1} more" if len(libraries) > 1 else ""
        why = "a library of the host in the image: it changes with the host, and the image's record does not hold it"
        do = "put it into the image, or leave it to the hooks"
        yield at(
            first.origin, WARNING, "mount-shadows", f"the host's {short(first.source)}{number} in the image", why, do
        )


def _home(case: Case, good: list[Mount]) -> Iterator[Finding]:
    for mount in good:
        destination = mount.destination.rstrip("/")
        if not _HOMES.fullmatch(destination):
            continue
        what = f"{short(destination)} is mounted"
        if case.merged.annotation("com.hooks.ssh.enabled") == "true":
            why = "the home's .ssh hides the key that the hook ssh authorizes; init scripts and caches come along"
            yield at(mount.origin, WARNING, "mount-home", what, why, "mount the folders that the job needs")
        elif case.merged.variable("PYTHONNOUSERSITE"):
            why = "packages of ~/.local are kept out by PYTHONNOUSERSITE; init scripts and caches come along"
            yield at(mount.origin, NOTE, "mount-home", what, why, "mount the folders that the job needs")
        else:
            why = "packages in ~/.local win over those of the image, and init scripts and caches come along"
            do = 'mount the folders that the job needs, or set PYTHONNOUSERSITE = "1" in [env]'
            yield at(mount.origin, WARNING, "mount-home", what, why, do)
        return


def _workdir(case: Case) -> Iterator[Finding]:
    value = case.merged.single.get("workdir")
    workdir = case.merged.text("workdir")
    if value is None or workdir is None:
        return
    if match := PLACEHOLDER.search(workdir):
        yield at(
            value.origin,
            ERROR,
            "placeholder",
            f"{short(match[0])} in workdir was not replaced",
            "no engine replaces it",
            "write the real name",
        )
    elif workdir.startswith("~"):
        yield at(
            value.origin, ERROR, "mount-format", f"workdir {short(workdir)!r}", "no engine replaces ~", "write ${HOME}"
        )
    elif workdir.startswith(("./", "../")) or workdir in (".", ".."):
        why = "it starts in the folder in which srun is called, not at this file"
        yield at(
            value.origin, WARNING, "relative-to-caller", "workdir is a relative path", why, "write the absolute path"
        )
    elif not workdir.startswith(("/", "$")):
        why = "a relative path must start with ./, and is relative to where srun is called"
        yield at(
            value.origin,
            ERROR,
            "mount-format",
            f"workdir {short(workdir)!r} is no absolute path",
            why,
            "write the absolute path",
        )

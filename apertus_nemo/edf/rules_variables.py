"""Rules on variables in values, and on secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator

from apertus_nemo.edf.finding import ERROR, NOTE, WARNING, Finding, short
from apertus_nemo.edf.inherit import Origin
from apertus_nemo.edf.rules import Case, at
from apertus_nemo.record.secrets import secret_in

# Set where jobs run, though not on every machine on which an EDF is checked.
SET_BY_SITES = {
    *("HOME", "USER", "LOGNAME", "SHELL", "PATH", "LD_LIBRARY_PATH", "PWD", "HOSTNAME", "LANG", "TMPDIR"),
    *("SCRATCH", "STORE", "PROJECT", "WORK", "CLUSTER_NAME", "XDG_RUNTIME_DIR", "PYTHONPATH"),
}
SEARCH_PATHS = {"PATH", "LD_LIBRARY_PATH", "LIBRARY_PATH", "PYTHONPATH", "CPATH", "MANPATH"}


MAX_SEARCHED = 2048  # characters of a value that are searched for a secret; the search is slow on long ones


def is_secret(name: str, value: str = "x") -> bool:
    """Whether a variable's name or value is that of a secret, for masking: rather one too many."""
    return secret_in(name, value[:MAX_SEARCHED]) is not None or name.upper().endswith(
        ("_KEY", "_PAT", "_TOKENS", "_CREDENTIAL")
    )


def check_variables(case: Case) -> Iterator[Finding]:
    """All rules of this file."""
    for key, text, origin in case.merged.texts():
        if "$" in text or "`" in text or (case.dialect.bash_variables and (";" in text or '"' in text)):
            yield from _expansion(case, key, text, origin)
    yield from _secrets(case)


def _expansion(case: Case, key: str, text: str, origin: Origin) -> Iterator[Finding]:
    if key == "image" and not case.dialect.expands_image:
        return
    done = case.expanded(text)
    where = f"{short(key, 80)} = {short(text, 80)!r}"
    path = key in ("image", "workdir", "mounts")
    if done.command:
        why = "no engine runs commands in an EDF" + (
            "; Sarus Suite refuses it" if case.sarus else ": it is taken as it stands"
        )
        yield at(
            origin,
            ERROR,
            "variable-form",
            f"a command in {where}",
            why,
            "set a variable in the shell and write ${NAME}",
        )
        return
    if done.refused is not None:
        why = f"Sarus Suite refuses values with {done.refused}"
        yield at(origin, ERROR, "variable-form", where, why, f"write \\{done.refused}, or do without")
        return
    if done.unbraced and not case.dialect.bash_variables:
        name = done.unbraced[0]
        why = "the Container Engine expands ${NAME} only, and takes this as it stands"
        severity = ERROR if path else WARNING
        yield at(origin, severity, "variable-unbraced", f"${short(name)} in {where}", why, f"write ${{{short(name)}}}")
    for form in dict.fromkeys(done.odd):
        if form == "$$":
            why, do = "in Sarus Suite bash makes a process number of $$", "write \\$"
            yield at(origin, ERROR, "variable-form", f"$$ in {where}", why, do)
        elif not form.endswith("}"):
            yield at(
                origin,
                ERROR,
                "variable-form",
                f"{short(form, 40)!r} in {where} has no }}",
                "it cannot be expanded",
                "close it",
            )
        elif not case.dialect.bash_variables:
            why = "the Container Engine documents ${NAME} and ${NAME:-} only"
            yield at(
                origin, WARNING, "variable-form", f"{short(form, 40)} in {where}", why, "set the variable before srun"
            )
    for name in dict.fromkeys(done.missing):
        if name in SET_BY_SITES or name.startswith("SLURM_"):
            continue
        if case.dialect.bash_variables:
            why = "it is not set here; where it is not, the whole value becomes empty, without a word"
        else:
            why = "it is not set here; where it is not, the container does not start"
        do = f"export it before srun, or write ${{{short(name)}:-}} if it may be empty"
        severity = WARNING
        if key == f"env.{name}" and text == f"${{{name}}}":
            severity, do = NOTE, "remove the line: the host's variables reach the container without it"
        yield at(origin, severity, "variable-undefined", f"${{{short(name)}}} in {where}", why, do)
    if key.startswith("env."):
        yield from _entries(case, key.removeprefix("env."), done.names, where, origin)


def _entries(case: Case, own: str, names: tuple[str, ...], where: str, origin: Origin) -> Iterator[Finding]:
    for name in dict.fromkeys(names):
        other = case.merged.env.get(name)
        if name != own and other is not None:
            why = f"entries of [env] do not see each other: this takes the host's {short(name)}"
            yield at(origin, WARNING, "env-self-reference", where, why, "write the value out")
        elif name == own and name in SEARCH_PATHS:
            why = f"the reference says both that the host's {short(name)} is meant and that the image's is"
            yield at(origin, NOTE, "path-from-host", where, why, "write all of it out if the job depends on it")


def _secrets(case: Case) -> Iterator[Finding]:
    for table, entries in (("env", case.merged.env), ("annotations", case.merged.annotations)):
        for name, value in entries.items():
            if not isinstance(value.value, str) or "ssh" in name:
                continue
            text = case.expanded(value.value)
            if text.names and not re.sub(r"\$\{[^}]*\}", "", value.value).strip():
                continue  # only a variable: nothing is in the file
            if text.command:
                continue
            found = secret_in(name, value.value[:MAX_SEARCHED])
            if found is not None:
                why = f"{found}; EDFs are shared, copied and recorded"
                do = f"remove it: the host's environment reaches the container, so export {short(name)} before srun"
                yield at(value.origin, WARNING, "secret", f"{short(name)} in [{table}] looks like a secret", why, do)

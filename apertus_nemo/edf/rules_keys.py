"""Rules on keys, tables and types: what stands in the wrong place, under the wrong name, as the wrong thing."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from apertus_nemo.edf.document import Document
from apertus_nemo.edf.finding import ERROR, NOTE, WARNING, Finding, short
from apertus_nemo.edf.inherit import is_path
from apertus_nemo.edf.rules import Case

# key -> (type, how it is called)
TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "base_environment": ((str, list), "a string or an array of strings"),
    "image": (str, "a string"),
    "workdir": (str, "a string"),
    "entrypoint": (bool, "true or false"),
    "writable": (bool, "true or false"),
    "mounts": (list, "an array of strings"),
    "devices": (list, "an array of strings"),
    "env": (dict, "a table"),
    "annotations": (dict, "a table"),
}
# What people write for these keys.
OTHER_NAMES = {
    "base": "base_environment",
    "bases": "base_environment",
    "base_env": "base_environment",
    "base_environments": "base_environment",
    "inherit": "base_environment",
    "container_image": "image",
    "sqsh": "image",
    "volumes": "mounts",
    "mount": "mounts",
    "bind": "mounts",
    "binds": "mounts",
    "working_dir": "workdir",
    "working_directory": "workdir",
    "cwd": "workdir",
    "environment": "env",
    "envs": "env",
    "environ": "env",
    "annotation": "annotations",
    "readonly": "writable",
    "read_only": "writable",
    "device": "devices",
}
_ALONE = {"image", "mounts", "workdir", "writable", "entrypoint", "base_environment", "devices"}


def check_keys(case: Case) -> Iterator[Finding]:
    """All rules of this file, on every file of the chain."""
    for document in case.documents():
        yield from _top_level(document, case)
        yield from _entries(document, case)
        yield from _annotations(document)
        yield from _apart(document)
        yield from _bases(document, case)
    yield from _image_or_base(case)


def _top_level(document: Document, case: Case) -> Iterator[Finding]:
    for key, value in document.tree.items():
        line = document.line(key)
        if key not in TYPES:
            yield _unknown(document, key, value, line)
            continue
        wanted, called = TYPES[key]
        if not isinstance(value, wanted):
            why = f"the reference wants {called}"
            yield Finding(
                ERROR, "wrong-type", document.name, line, f"{key} is {_kind(value)}", why, _as_type(key, value)
            )
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if not isinstance(item, str):
                    what = f"item {index + 1} of {key} is {_kind(item)}"
                    where = document.line(key, index)
                    yield Finding(
                        ERROR,
                        "wrong-type",
                        document.name,
                        where,
                        what,
                        f"the reference wants {called}",
                        "write strings in quotes",
                    )
    if "devices" in document.tree and not case.dialect.devices:
        what, why = "devices has no effect", "the Container Engine does not read it: Enroot mounts all devices"
        yield Finding(
            NOTE,
            "hook-unsupported",
            document.name,
            document.line("devices"),
            what,
            why,
            "keep it for Sarus Suite, or remove it",
        )


def _unknown(document: Document, key: str, value: Any, line: int) -> Finding:
    what = f"{short(key)!r} is not a key of an EDF"
    if key == "com" or key.startswith(("com.", "hooks")) or (key == "hooks"):
        why, do = (
            "no engine reads it here: hooks are controlled by annotations",
            "put it below [annotations], as com.hooks.NAME.KEY",
        )
        return Finding(ERROR, "unknown-key", document.name, line, what, why, do)
    right = OTHER_NAMES.get(key.lower()) or next(iter(get_close_matches(key.lower(), TYPES, n=1, cutoff=0.75)), None)
    if right is not None:
        return Finding(
            ERROR, "unknown-key", document.name, line, what, "no engine reads it, and none says so", f"write {right}"
        )
    if key.isupper() and not isinstance(value, (dict, list)):
        why, do = "no engine reads it here: it looks like an environment variable", "put it below [env]"
        return Finding(ERROR, "unknown-key", document.name, line, what, why, do)
    return Finding(
        WARNING, "unknown-key", document.name, line, what, "no engine reads it, and none says so", "remove it"
    )


def _entries(document: Document, case: Case) -> Iterator[Finding]:
    env = document.get("env")
    if not isinstance(env, dict):
        return
    for key, value in env.items():
        line = document.line("env", key)
        if key in _ALONE:
            what = f"{key} stands in [env]"
            why = "in TOML a key belongs to the table above it: the engine sees a variable of that name"
            yield Finding(ERROR, "unknown-key", document.name, line, what, why, f"move {key} above the first [table]")
        elif key == "com" or key.startswith("com."):
            why, do = "annotations in [env] are variables of the container, not hooks", "move them below [annotations]"
            yield Finding(ERROR, "unknown-key", document.name, line, f"{short(key)} stands in [env]", why, do)
        elif not isinstance(value, str):
            what = f"{short(key)} in [env] is {_kind(value)}"
            yield Finding(
                ERROR, "not-a-string", document.name, line, what, "values of [env] must be strings", _quoted(key, value)
            )


def _annotations(document: Document) -> Iterator[Finding]:
    first: dict[str, Any] = {}
    for annotation in document.all_annotations:
        name, line = annotation.name, annotation.line
        if annotation.path[0] in _ALONE or annotation.path[0] == "env":
            what = f"{short(name)} stands in [annotations]"
            why = "in TOML a key belongs to the table above it: the engine sees an annotation of that name"
            yield Finding(
                ERROR,
                "unknown-key",
                document.name,
                line,
                what,
                why,
                f"move {annotation.path[0]} above the first [table]",
            )
            continue
        if name in first and first[name].value != annotation.value:
            what = f"{short(name)} has two values (line {first[name].line} has another)"
            why = "dotted and quoted keys are one annotation; which of them wins is left to chance"
            yield Finding(ERROR, "annotation-twice", document.name, line, what, why, "keep one")
        first.setdefault(name, annotation)


def _apart(document: Document) -> Iterator[Finding]:
    """Dotted keys of [annotations] beside [annotations.com.hooks.x]: TOML, but parsers and the documentation differ."""
    headers = {path[1:]: line for path, line in document.positions.headers.items() if path[:1] == ("annotations",)}
    tables = {path: line for path, line in headers.items() if path}
    for annotation in document.all_annotations:
        if len(annotation.path) < 2 or any(annotation.path[: len(path)] == path for path in tables):
            continue
        for path, line in tables.items():
            if path[0] == annotation.path[0]:
                opened = short(".".join(map(str, path)))
                what = f"annotations stand in [annotations.{opened}] and as dotted keys (line {annotation.line})"
                why = "the documentation calls a table that is opened twice invalid, and parsers differ on this form"
                do = "write all annotations below one [annotations], as com.hooks.NAME.KEY = ..."
                yield Finding(NOTE, "annotations-apart", document.name, line, what, why, do)
                return


def check_annotation_types(case: Case) -> Iterator[Finding]:
    """Annotations that are no strings: refused by one engine, turned into text by the other."""
    for document in case.documents():
        for annotation in document.all_annotations:
            if isinstance(annotation.value, str) or annotation.path[0] in _ALONE:
                continue
            what = f"{short(annotation.name)} is {_kind(annotation.value)}"
            if case.dialect.quoted_strings_only:
                severity, why = ERROR, "the value of an annotation must be a string"
            else:
                severity, why = NOTE, "Sarus Suite turns it into text; the Container Engine wants a string"
            do = _quoted(annotation.name, annotation.value)
            yield Finding(severity, "not-a-string", document.name, annotation.line, what, why, do)


def _bases(document: Document, case: Case) -> Iterator[Finding]:
    written = document.get("base_environment")
    items = written if isinstance(written, list) else [written]
    for index, name in enumerate(items):
        if not isinstance(name, str) or not name:
            continue
        line = (
            document.line("base_environment", index) if isinstance(written, list) else document.line("base_environment")
        )
        path = is_path(name, case.dialect)
        if not path and "/" not in name and not name.endswith(".toml"):
            what = f"base_environment {short(name)!r} is searched for"
            why = "which file it is depends on EDF_PATH and the home of who starts the job"
            do = f"write its absolute path, ending in /{short(name)}.toml"
            yield Finding(WARNING, "base-by-search", document.name, line, what, why, do)
        elif not path and name.endswith(".toml") and "/" not in name:
            what = f"base_environment {short(name)!r} ends in .toml"
            why = "a name that is searched for stands without .toml; a path starts with / or ./"
            yield Finding(ERROR, "base-not-found", document.name, line, what, why, "write the absolute path")
        elif path and not name.startswith("/"):
            what = f"base_environment {short(name)!r} is a relative path"
            why = "it starts in the folder in which srun is called, not at this file"
            yield Finding(WARNING, "relative-to-caller", document.name, line, what, why, "write the absolute path")


def _image_or_base(case: Case) -> Iterator[Finding]:
    if case.dialect.image_or_base_needed:
        for document in case.documents():
            if "image" not in document.tree and "base_environment" not in document.tree:
                why = "Sarus Suite checks each file of a chain, and wants one of the two in it"
                do = (
                    "name the image"
                    if document is case.document
                    else 'write image = "" in a file that only serves as a base'
                )
                yield Finding(ERROR, "no-image", document.name, None, "neither image nor base_environment", why, do)
        if case.complete and case.merged.text("image") is None and "image" not in case.merged.single:
            if "base_environment" in case.document.tree:
                yield case.here(
                    ERROR,
                    "no-image",
                    "no file of the chain names an image",
                    "Sarus Suite starts nothing without",
                    "name the image",
                )
    elif case.complete and case.merged.text("image") is None:
        why = "by itself the Container Engine enters no container with it, and the job runs on the host"
        do = "fine for a base, or beside srun --container-image; else name the image"
        yield case.here(NOTE, "no-image", "no image", why, do)


def _kind(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array", dict: "a table"}
    return names.get(type(value), "a date or time")


def _quoted(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return f'write {short(key)} = "{str(value).lower()}"'
    if isinstance(value, (int, float)):
        return f'write {short(key)} = "{short(value, 40)}"'
    return f'write {short(key)} = "..."'


def _as_type(key: str, value: Any) -> str:
    if TYPES[key][0] is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return f"write {key} = {value.lower()}, without quotes"
    if TYPES[key][0] is list and isinstance(value, str):
        return f'write {key} = ["{short(value, 60)}"]'
    if key == "image" and isinstance(value, dict):
        return 'write image = "..."'
    return f"write {key} as {TYPES[key][1]}"

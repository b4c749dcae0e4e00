"""Credentials for registries, from the files that podman, docker and Enroot keep them in.

    found = Credentials(environment).find("nvcr.io", "nvidia/pytorch")
    found.source                # the file or helper, for a message; the secret is never printed

Looked for in this order (containers-auth.json(5)): $REGISTRY_AUTH_FILE, $XDG_RUNTIME_DIR/containers/auth.json,
~/.config/containers/auth.json, ~/.docker/config.json, and Enroot's ~/.config/enroot/.credentials (netrc). Helpers
(`docker-credential-NAME`) are run as they are named, without a shell.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apertus_nemo.errors import InputError, UnfitEnvironment
from apertus_nemo.record.canonical import loads
from apertus_nemo.record.files import read_bytes

_MAX_BYTES = 4 * 2**20
_HELPER = re.compile(r"[A-Za-z0-9_-]+\Z")
_HELPER_TIMEOUT_S = 60.0
_DOCKER_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))\Z")


@dataclass(frozen=True)
class Credential:
    """A user with a password, or a token that buys other tokens."""

    source: str
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)

    def basic(self) -> str:
        """The value of an Authorization header."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


class Credentials:
    """Those of one user, as the environment names the files."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def find(self, registry: str, repository: str) -> Credential | None:
        """The most specific credential of the first file that has one; None where there is none.

        Raises InputError for a file that cannot be read as what it is, UnfitEnvironment where a helper fails.
        """
        for path in self._files():
            found = self._in_file(path, registry, repository)
            if found is not None:
                return found
        return self._in_netrc(registry)

    def _files(self) -> Iterator[Path]:
        named = self._environment.get("REGISTRY_AUTH_FILE")
        if named:
            yield Path(named)
        home = self._environment.get("HOME")
        if runtime := self._environment.get("XDG_RUNTIME_DIR"):
            yield Path(runtime, "containers", "auth.json")
        if config := self._environment.get("XDG_CONFIG_HOME") or (home and f"{home}/.config"):
            yield Path(config, "containers", "auth.json")
        if docker := self._environment.get("DOCKER_CONFIG") or (home and f"{home}/.docker"):
            yield Path(docker, "config.json")

    def _in_file(self, path: Path, registry: str, repository: str) -> Credential | None:
        try:
            present = path.is_file()
        except OSError:  # a folder that may not be looked into
            return None
        if not present:
            return None
        data = read_bytes(path, max_bytes=_MAX_BYTES)
        tree = loads(data, what=str(path)) if data.strip() else {}
        auths = _table(tree, "auths", path)
        helpers = _table(tree, "credHelpers", path)
        keys = list(_keys(registry, repository))
        plain = {_plain(key): value for key, value in auths.items()}
        for key in keys:
            if key in helpers:
                return self._from_helper(helpers[key], key, path)
            entry = plain.get(key)
            if entry:
                found = _from_entry(entry, path, key)
                if found is not None:
                    return found
        store = tree.get("credsStore")
        if store:
            server = "https://index.docker.io/v1/" if registry in _DOCKER_HUB else registry
            return self._from_helper(store, server, path)
        return None

    def _from_helper(self, name: object, server: str, path: Path) -> Credential | None:
        if not isinstance(name, str) or not _HELPER.match(name):
            raise InputError(f"{path}: {name!r:.60} is not the name of a credential helper")
        command = f"docker-credential-{name}"
        try:
            done = subprocess.run(
                [command, "get"],
                input=server.encode(),
                env=dict(self._environment),
                capture_output=True,
                timeout=_HELPER_TIMEOUT_S,
            )
        except FileNotFoundError:
            raise UnfitEnvironment(f"{path} names the credential helper {command}, which is not installed") from None
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = "did not answer" if isinstance(error, subprocess.TimeoutExpired) else error.strerror
            raise UnfitEnvironment(f"the credential helper {command} {reason}") from None
        if done.returncode != 0:
            if b"credentials not found" in done.stdout or b"not found" in done.stderr:
                return None
            raise UnfitEnvironment(f"the credential helper {command} failed for {server} (exit code {done.returncode})")
        try:
            answer = json.loads(done.stdout)
            user, secret = answer["Username"], answer["Secret"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UnfitEnvironment(f"the credential helper {command} answered something else than JSON") from None
        if not isinstance(user, str) or not isinstance(secret, str) or not secret:
            return None
        if user == "<token>":
            return Credential(command, identity_token=secret)
        return Credential(command, user, secret)

    def _in_netrc(self, registry: str) -> Credential | None:
        home = self._environment.get("HOME")
        base = self._environment.get("XDG_CONFIG_HOME") or (home and f"{home}/.config")
        folder = self._environment.get("ENROOT_CONFIG_PATH") or (base and f"{base}/enroot")
        if not folder:
            return None
        path = Path(folder, ".credentials")
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        words = [word for line in text.splitlines() if not line.lstrip().startswith("#") for word in line.split()]
        host = "auth.docker.io" if registry in _DOCKER_HUB else registry
        machine, fields = None, dict[str, str]()
        for key, value in zip(words, [*words[1:], ""], strict=True):
            if key in ("machine", "default"):
                machine = value if key == "machine" else None
            elif machine in (host, host.rpartition(":")[0]) and key in ("login", "password"):
                fields.setdefault(key, value)
        if "password" not in fields:
            return None
        # Enroot expands variables in this file; commands in it are not run here.
        password = fields["password"]
        if variable := _VARIABLE.match(password):
            password = self._environment.get(variable[1] or variable[2], "")
        return Credential(str(path), fields.get("login", ""), password) if password else None


def _table(tree: object, key: str, path: Path) -> Mapping[str, Any]:
    table = (tree.get(key) or {}) if isinstance(tree, dict) else None
    if not isinstance(table, dict):
        raise InputError(f"{path}: it is not a file of credentials: {key} is not a table")
    return table


def _plain(key: str) -> str:
    """A key of `auths` as registry and path: docker writes some as URLs."""
    if "://" not in key:
        return key
    host, slash, rest = key.partition("://")[2].partition("/")
    return host if rest.strip("/") in ("", "v1", "v2") else f"{host}{slash}{rest.strip('/')}"


def _keys(registry: str, repository: str) -> Iterator[str]:
    """What to look for, the most specific first."""
    parts = repository.split("/")
    for host in _DOCKER_HUB if registry in _DOCKER_HUB else (registry,):
        yield from (f"{host}/{'/'.join(parts[:count])}" for count in range(len(parts), 0, -1))
        yield host


def _from_entry(entry: object, path: Path, key: str) -> Credential | None:
    if not isinstance(entry, dict):
        raise InputError(f"{path}: the entry of {key} is not a table")
    token = entry.get("identitytoken")
    if isinstance(token, str) and token:
        return Credential(str(path), identity_token=token)
    encoded = entry.get("auth")
    if not encoded:
        user, password = entry.get("username"), entry.get("password")
        if isinstance(user, str) and isinstance(password, str):
            return Credential(str(path), user, password)
        return None
    try:
        text = base64.b64decode(encoded, validate=True).decode()
    except (TypeError, ValueError, binascii.Error):
        text = ""
    user, colon, password = text.partition(":")
    if not colon:
        raise InputError(f"{path}: the entry of {key} is not user:password in base64; log in again")
    return Credential(str(path), user, password.rstrip("\0"))

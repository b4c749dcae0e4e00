"""Credentials: found where podman, docker and Enroot keep them, in their order, and never shown."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.errors import InputError, UnfitEnvironment
from apertus_nemo.image.credentials import Credential, Credentials

SECRET = "pass-w0rd:with-colon"


def auth(user: str = "user", password: str = SECRET) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def write(path: Path, tree: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return path


def find(environment: dict[str, str], registry: str = "reg.example", repository: str = "a/b") -> Credential | None:
    return Credentials(environment).find(registry, repository)


def test_the_order_of_files(tmp_path: Path) -> None:
    environment = {
        "REGISTRY_AUTH_FILE": str(tmp_path / "named.json"),
        "XDG_RUNTIME_DIR": str(tmp_path / "run"),
        "HOME": str(tmp_path),
    }
    assert find(environment) is None
    write(tmp_path / ".config/enroot/.credentials", "machine reg.example login user password $TOKEN\n")
    assert find(environment) is None
    write(tmp_path / ".docker/config.json", {"auths": {"https://reg.example/v1/": auth()}})
    for name in (".config/containers/auth.json", "run/containers/auth.json", "named.json"):
        write(tmp_path / name, {"auths": {"reg.example": auth()}})
    for name in ("named.json", "run/containers/auth.json", ".config/containers/auth.json", ".docker/config.json"):
        assert find(environment) == Credential(str(tmp_path / name), "user", SECRET)
        (tmp_path / name).unlink()
    enroot = find({**environment, "TOKEN": SECRET})
    assert enroot == Credential(str(tmp_path / ".config/enroot/.credentials"), "user", SECRET)


def test_the_most_specific_counts(tmp_path: Path) -> None:
    entries = {"reg.example": auth("host"), "reg.example/a": auth("group"), "reg.example/a/b": auth("name")}
    environment = {"REGISTRY_AUTH_FILE": str(write(tmp_path / "a.json", {"auths": entries}))}
    for repository, user in (("a/b", "name"), ("a/c", "group"), ("a/b/c", "name"), ("ab", "host")):
        found = find(environment, repository=repository)
        assert found is not None
        assert found.user == user
    assert find(environment, registry="other.example") is None
    hub = {"REGISTRY_AUTH_FILE": str(write(tmp_path / "b.json", {"auths": {"https://index.docker.io/v1/": auth()}}))}
    assert find(hub, registry="docker.io") is not None


def helper(folder: Path, script: str) -> dict[str, str]:
    path = folder / "docker-credential-test"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    file = write(folder / "config.json", {"credHelpers": {"reg.example": "test"}})
    return {"REGISTRY_AUTH_FILE": str(file), "PATH": f"{folder}:/usr/bin:/bin"}


def test_helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    answer = '{"Username":"%s","Secret":"s3cret"}'
    environment = helper(tmp_path, f"""[ "$1" = get ] && [ "$(cat)" = reg.example ] && echo '{answer % "user"}'""")
    assert find(environment) == Credential("docker-credential-test", "user", "s3cret")
    environment = helper(tmp_path, f"echo '{answer % '<token>'}'")
    assert find(environment) == Credential("docker-credential-test", identity_token="s3cret")
    assert find(helper(tmp_path, "echo credentials not found in native keychain; exit 1")) is None
    for script, message in (
        ("echo s3cret; exit 3", "the credential helper docker-credential-test failed for reg.example (exit code 3)"),
        ("echo s3cret", "the credential helper docker-credential-test answered something else than JSON"),
    ):
        with pytest.raises(UnfitEnvironment) as caught:
            find(helper(tmp_path, script))
        assert str(caught.value) == message
    (tmp_path / "docker-credential-test").unlink()
    with pytest.raises(UnfitEnvironment, match="names the credential helper docker-credential-test, which is not"):
        find(environment)
    write(tmp_path / "config.json", {"credHelpers": {"reg.example": "../../bin/sh -c id"}})
    with pytest.raises(InputError, match="is not the name of a credential helper"):
        find(environment)


@pytest.mark.parametrize(
    "tree",
    [
        f'{{"auths": {{"reg.example": {{"auth": "{SECRET}"',
        {"auths": {"reg.example": {"auth": SECRET}}},
        {"auths": {"reg.example": {"auth": base64.b64encode(b"pass-w0rd").decode()}}},
        {"auths": {"reg.example": SECRET}},
        {"auths": SECRET},
        [SECRET],
    ],
)
def test_broken_files_do_not_tell(tree: Any, tmp_path: Path) -> None:
    environment = {"REGISTRY_AUTH_FILE": str(write(tmp_path / "a.json", tree))}
    with pytest.raises(InputError) as caught:
        find(environment)
    assert str(caught.value).startswith(f"{tmp_path}/a.json: ")
    assert "pass-w0rd" not in str(caught.value)


def test_a_credential_is_never_shown() -> None:
    for credential in (Credential("f", "user", SECRET), Credential("f", identity_token=SECRET)):
        assert SECRET not in repr(credential)
        assert "user" not in repr(credential)

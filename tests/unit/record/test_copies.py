"""Copies are whole or absent, whoever stops them, and are read in place: a folder, memory://, and a real S3 server."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest

from apertus_nemo.audit.compare import compare
from apertus_nemo.audit.verification import Verification
from apertus_nemo.audit.verify import verify
from apertus_nemo.cli.main import main
from apertus_nemo.errors import Differs, InputError, UnfitEnvironment
from apertus_nemo.record import copies
from apertus_nemo.record.copies import pull, push
from tests.unit.audit.sealed import SEGMENT_LINES, make_sealed


@pytest.fixture(params=["folder", "file", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place of each kind."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        return f"s3://runs/{tmp_path.name}/a"
    if request.param == "memory":
        return f"memory://{tmp_path.name}/a"
    return f"{'file://' if request.param == 'file' else ''}{tmp_path}/far/away/a"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_sealed(tmp_path / "run")


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def remote(place: str) -> tuple[Any, str]:
    """A file system that remembers nothing of what was there before."""
    system, path = fsspec.core.url_to_fs(place)
    system.invalidate_cache()
    return system, path


def check(place: str | Path) -> Verification:
    return verify(place, segment_lines=SEGMENT_LINES)


def test_there_and_back(run: Path, place: str, tmp_path: Path) -> None:
    pushed = push(run, place)
    assert (pushed.files, pushed.size_bytes) == (len(content(run)), sum(map(len, content(run).values())))
    pulled = pull(place, tmp_path / "back")
    assert content(tmp_path / "back") == content(run)
    assert pulled.digest == pushed.digest
    system, path = remote(place)
    listed = json.loads(system.cat_file(f"{path}/copy.json"))["files"]
    assert set(listed) == set(content(run))


def test_a_copy_is_verified_and_compared_in_place(run: Path, place: str) -> None:
    push(run, place)
    found = check(place)
    assert (found.findings, found.finished, found.checkpoints) == ([], True, [10, 20])
    assert found.record_digest == check(run).record_digest


def test_a_copy_is_compared_in_place(tmp_path: Path, place: str) -> None:
    from tests.unit.record.example import make

    make(tmp_path / "a")
    push(tmp_path / "a", place)
    assert compare(place, tmp_path / "a").exit_code == 0


@pytest.mark.parametrize("name", ["states/step-000000010.json", "checkpoints/step-000000010/weights/__0_0.distcp"])
def test_a_copy_that_was_changed(run: Path, place: str, tmp_path: Path, name: str) -> None:
    push(run, place)
    system, path = remote(place)
    data = system.cat_file(f"{path}/{name}")
    system.pipe_file(f"{path}/{name}", data[:-2] + b"!" + data[-1:])
    assert check(place).findings[0].file == name
    with pytest.raises(Differs, match=f"^{name}: is not as it was pushed"):
        pull(place, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    system.rm_file(f"{path}/{name}")
    system.invalidate_cache()
    assert check(place).findings[0].file == name
    with pytest.raises((InputError, Differs)):
        pull(place, tmp_path / "back")
    assert sorted(os.listdir(tmp_path)) == (["far", "run"] if (tmp_path / "far").exists() else ["run"])


def test_what_lies_beside_a_copy_is_found(run: Path, place: str) -> None:
    push(run, place)
    system, path = remote(place)
    system.pipe_file(f"{path}/attempts/000/more.txt", b"more")
    system.invalidate_cache()
    assert [(f.file, f.what) for f in check(place).findings] == [
        ("attempts/000/more.txt", "is not in copy.json: it was added")
    ]


def test_an_existing_target_is_refused(run: Path, place: str, tmp_path: Path) -> None:
    push(run, place)
    before = remote(place)[0].find(remote(place)[1])
    with pytest.raises(InputError, match="choose another place"):
        push(run, place)
    assert remote(place)[0].find(remote(place)[1]) == before
    with pytest.raises(InputError, match="is there already"):
        pull(place, run)


def test_a_target_with_something_else_is_refused(run: Path, place: str) -> None:
    system, path = remote(place)
    system.makedirs(path, exist_ok=True)
    system.pipe_file(f"{path}/notes.txt", b"mine")
    with pytest.raises(InputError, match="choose another place"):
        push(run, place)
    assert system.cat_file(f"{path}/notes.txt") == b"mine"


class Stop(BaseException):
    """Stands for Ctrl-C in the middle."""


@pytest.mark.parametrize("after", [0, 1, 13, 25])
def test_an_interrupted_push_leaves_nothing_that_looks_whole(
    run: Path, place: str, tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    def progress(name: str, size_bytes: int) -> None:
        names.append(name)
        if len(names) > after:
            raise Stop

    with pytest.raises(Stop):
        push(run, place, progress=progress)
    with pytest.raises(InputError):
        check(place)
    with pytest.raises(InputError):
        pull(place, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    if "memory" in place or "s3" in place:
        assert remote(place)[0].find(remote(place)[1]) == []  # cleaned up
        monkeypatch.setattr(copies.contextlib, "suppress", _nothing_is_removed)  # as after kill -9
        names.clear()
        with pytest.raises((Stop, InputError)):
            push(run, place, progress=progress)
        monkeypatch.undo()
        with pytest.raises(InputError, match=r"holds no whole copy of a run: there is no copy\.json$"):
            check(place)
    push(run, place)  # goes over what is left
    assert check(place).findings == []


def _nothing_is_removed(*_: object) -> Any:
    raise InputError("killed")


@pytest.mark.parametrize("after", [0, 13, 25])
def test_an_interrupted_pull_leaves_nothing(run: Path, place: str, tmp_path: Path, after: int) -> None:
    push(run, place)
    names: list[str] = []

    def progress(name: str, size_bytes: int) -> None:
        names.append(name)
        if len(names) > after:
            raise Stop

    before = sorted(os.listdir(tmp_path))
    with pytest.raises(Stop):
        pull(place, tmp_path / "back", progress=progress)
    assert sorted(os.listdir(tmp_path)) == before


KILLED = """
import sys, time
from pathlib import Path
from apertus_nemo.record.copies import pull, push
def progress(name, size_bytes):
    if name.startswith("states/"):
        print("now", flush=True)
        time.sleep(60)
(push if sys.argv[1] == "push" else pull)(*((Path(sys.argv[2]), sys.argv[3]) if sys.argv[1] == "push"
    else (sys.argv[2], Path(sys.argv[3]))), progress=progress)
"""


@pytest.mark.parametrize("verb", ["push", "pull"])
def test_kill_9_in_the_middle(run: Path, tmp_path: Path, verb: str) -> None:
    push(run, str(tmp_path / "copy"))
    source, target = (run, tmp_path / "new") if verb == "push" else (tmp_path / "copy", tmp_path / "new")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, verb, str(source), str(target)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"now\n"
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    process.stdout.close()
    assert not target.exists()
    if verb == "push":
        push(run, str(target))
        assert check(target).findings == []
    else:
        pull(str(source), target)
        assert content(target) == content(run)


def test_a_run_that_is_being_written_is_refused(run: Path, tmp_path: Path) -> None:
    descriptor = os.open(run / "steps", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(UnfitEnvironment, match="is being written by a process"):
            push(run, str(tmp_path / "copy"))
    finally:
        os.close(descriptor)
    push(run, str(tmp_path / "copy"))


def test_a_file_that_changes_meanwhile_is_noticed(run: Path) -> None:
    def progress(name: str, size_bytes: int) -> None:
        if name == "recipe.yaml":
            (run / name).write_text("name: other_recipe\n")

    with pytest.raises(UnfitEnvironment, match=r"recipe\.yaml changed while it was copied"):
        push(run, "memory://changing/a", progress=progress)
    assert fsspec.filesystem("memory").find("/changing/a") == []


def test_without_checkpoints(run: Path, tmp_path: Path) -> None:
    (run / "attempts" / "000" / "checkpoint.partial").mkdir()
    (run / "attempts" / "000" / "checkpoint.partial" / "x").write_text("of a crash")
    push(run, str(tmp_path / "copy"), checkpoints=False)
    found = check(tmp_path / "copy")
    assert (found.findings, found.checkpoints, found.finished) == ([], [], True)
    assert (found.removed, found.not_checked[0]) == ([], "left out of the copy: checkpoints of steps 10, 20")
    assert not (tmp_path / "copy" / "attempts" / "000" / "checkpoint.partial").exists()


def test_a_copy_of_a_copy(run: Path, tmp_path: Path) -> None:
    first = push(run, str(tmp_path / "first"))
    assert push(tmp_path / "first", str(tmp_path / "second")).digest == first.digest


@pytest.mark.parametrize(
    "name", ["../evil", "/evil", "a/../../evil", "a//b", ".", "", "a/", "a\x00b", "a\\b", "lock.json/x"]
)
def test_a_manifest_that_leads_elsewhere_is_refused(run: Path, tmp_path: Path, name: str) -> None:
    push(run, str(tmp_path / "copy"))
    manifest = tmp_path / "copy" / "copy.json"
    tree = json.loads(manifest.read_bytes())
    tree["files"][name] = {"sha256": "0" * 64, "size_bytes": 0}
    manifest.write_bytes(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode())
    with pytest.raises(InputError, match=r"copy\.json: "):
        pull(str(tmp_path / "copy"), tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert not (tmp_path / "evil").exists()
    assert check(tmp_path / "copy").findings[0].file == "copy.json"


def test_links_are_refused(run: Path, tmp_path: Path) -> None:
    (run / "link").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="link is neither a file nor a folder: a copy cannot hold it"):
        push(run, str(tmp_path / "copy"))


def test_curves_stay_where_they_are(run: Path, tmp_path: Path) -> None:
    before = content(run)
    (run / "logs" / "wandb").mkdir(parents=True)
    (run / "logs" / "wandb" / "latest-run").symlink_to("elsewhere")
    (run / "logs" / "events").write_text("curves")
    push(run, str(tmp_path / "copy"))
    assert check(tmp_path / "copy").findings == []
    pull(str(tmp_path / "copy"), tmp_path / "back")
    assert content(tmp_path / "back") == before


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record", "push", str(run), "memory://command/a", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["place"] == "memory://command/a"
    assert main(["record", "pull", "memory://command/a", str(tmp_path / "back")]) == 0
    assert told["copy_digest"] in capsys.readouterr().out
    assert main(["record", "pull", "memory://command/none", str(tmp_path / "none")]) == 2
    line = "apertus-nemo: memory://command/none holds no whole copy of a run: there is no copy.json\n"
    assert capsys.readouterr() == ("", line)
    assert main(["record", "push", str(tmp_path / "absent"), "memory://command/b"]) == 2
    assert main(["record", "push", str(run), "xyz://a/b"]) == 2
    assert capsys.readouterr().err.endswith("apertus-nemo: xyz://a/b: xyz is no kind of URL that fsspec knows\n")
    assert main(["record"]) == 2


def test_credentials_are_neither_shown_nor_recorded(
    run: Path, s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "hunter2-a-secret"
    url = f"http://me:{secret}@{s3.removeprefix('http://')}/runs/absent?X-Amz-Signature={secret}"
    for arguments in (["verify", url], ["compare", url, url], ["record", "pull", url, str(tmp_path / "x")]):
        assert main(arguments) in (2, 3)
    assert main(["record", "push", str(run), url]) in (2, 3)
    assert main(["record", "push", str(run), f"s3://{secret}:{secret}@runs/a"]) in (2, 3)
    assert main(["record", "push", str(run), "s3://runs/credentials"]) == 0
    shown = capsys.readouterr()
    assert secret not in shown.out + shown.err
    assert "a-secret-key" not in shown.out + shown.err
    system = fsspec.filesystem("s3")
    for path in system.find("runs/credentials"):
        data = system.cat_file(path)
        assert secret.encode() not in data
        assert b"a-secret-key" not in data
        assert b"s3://" not in data


def test_a_server_that_is_gone(run: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    started = time.monotonic()
    with pytest.raises(UnfitEnvironment, match=r"^s3://runs/gone/copy\.json: cannot be reached: "):
        check("s3://runs/gone")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    assert time.monotonic() - started < 30


def test_a_local_path_imports_no_fsspec(run: Path) -> None:
    code = (
        "import sys; from apertus_nemo.cli.main import main; code = main(['verify', sys.argv[1]]);"
        "bad = {'fsspec', 'torch', 'numpy', 'nemo', 'megatron'} & set(sys.modules); print(bad); sys.exit(bool(bad))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout

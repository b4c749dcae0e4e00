"""Commands in an image that is not started: real namespaces, a real squashfs file, and a shell in it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from apertus_nemo.errors import InputError, UnfitEnvironment
from apertus_nemo.image.inside import Root, opened
from apertus_nemo.image.layout import Image, Layout
from apertus_nemo.image.squashfs import find_tool, make_squashfs
from tests.unit.image.images import PLATFORM, entry, layout_with, link, tar
from tests.unit.image.tools import needs

SHELL = "/bin/busybox"


def shell_layers() -> list[bytes]:
    """A root with a shell, the folders that every root has, and links that lead out of it."""
    needs("busybox", "mksquashfs")
    program = Path(shutil.which("busybox") or "").read_bytes()
    folders = [entry(name) for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "root")]
    files = [
        entry("bin/busybox", program, mode=0o755),
        entry("etc/motd", b"hello\n"),
        entry("root/secret", b"root's\n", mode=0o600),
        link("etc/passwd", "/../../etc/motd"),
        link("etc/outside", "../../../../etc/hostname"),
    ]
    return [tar([*folders, *files])]


def squashfs(folder: Path, *layers: bytes) -> Path:
    """The layers as a file."""
    layout = layout_with(folder / "layout", *layers)
    image: Image = Layout.open(folder / "layout").image(PLATFORM)
    make_squashfs(layout.blobs, image, folder / "image.sqsh", tool=find_tool(os.environ), contents="plain")
    return folder / "image.sqsh"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return squashfs(tmp_path_factory.mktemp("shell"), *shell_layers())


@pytest.fixture
def root(image: Path, tmp_path: Path) -> Iterator[Root]:
    (tmp_path / "work").mkdir()
    with opened(image, work=tmp_path / "work") as found:
        yield found


def script(root: Root, text: str, limit_s: float = 30.0) -> tuple[int, str, str]:
    """Exit code, output and errors of a shell script in the image."""
    done = root.run([SHELL, "sh", "-c", text], environment={"PATH": "/bin"}, limit_s=limit_s)
    return done.code, done.output.decode(), done.errors.decode()


def test_a_command_runs_and_its_exit_code_comes_back(root: Root) -> None:
    assert script(root, "cat /etc/motd; echo wrong >&2; exit 3") == (3, "hello\n", "wrong\n")
    assert script(root, "kill -9 $$")[0] == 137


def test_it_has_no_right_to_anything(root: Root) -> None:
    code, said, _ = script(root, "grep -E '^(Uid|CapPrm|CapEff|CapBnd|NoNewPrivs)' /proc/self/status")
    assert code == 0
    values = dict(line.split(":", 1) for line in said.splitlines())
    assert {name: text.split() for name, text in values.items() if name != "Uid"} == {
        "CapPrm": ["0" * 16],
        "CapEff": ["0" * 16],
        "CapBnd": ["0" * 16],
        "NoNewPrivs": ["1"],
    }
    if os.geteuid() == 0:
        assert values["Uid"].split() == ["65534"] * 4
        assert "Permission denied" in script(root, "cat /root/secret")[2]
        assert "Permission denied" in script(root, "echo x > /proc/sys/kernel/core_pattern")[2]


def test_nothing_but_memory_can_be_written(root: Root) -> None:
    assert "Read-only file system" in script(root, "echo x > /etc/motd")[2]
    assert script(root, "echo x > /tmp/x && echo y > /dev/shm/y && cat /tmp/x /dev/shm/y") == (0, "x\ny\n", "")
    assert script(root, "ls /tmp /dev/shm")[1] == "/dev/shm:\n\n/tmp:\n"  # of another command, nothing is left


def test_there_is_no_network_and_no_other_process(root: Root) -> None:
    code, said, _ = script(root, "busybox ip -o link | busybox wc -l; ls /proc | grep -c '^[0-9]'; hostname")
    assert code == 0
    assert said.split()[0] == "1"
    assert int(said.split()[1]) <= 5  # those of this command
    assert "lo: <LOOPBACK,UP" in script(root, "busybox ip -o link")[1]


def test_the_environment_is_the_one_that_is_given(root: Root) -> None:
    assert script(root, "env | grep -v -E '^(PWD|SHLVL|_)='")[1] == "PATH=/bin\n"


def test_files_are_read_inside_the_root(root: Root) -> None:
    assert root.read("etc/motd", "etc/passwd", "etc/outside", "etc", "none", "dev/zero") == {
        "etc/motd": b"hello\n",
        "etc/passwd": b"hello\n",
        "etc/outside": None,
        "etc": None,
        "none": None,
        "dev/zero": None,
    }


def test_a_program_that_is_not_there(root: Root) -> None:
    with pytest.raises(UnfitEnvironment, match=r"^/bin/nothing cannot be run in the image: No such file or directory$"):
        root.run(["/bin/nothing"], environment={}, limit_s=10)


def test_a_command_that_takes_too_long_is_ended(root: Root) -> None:
    began = time.monotonic()
    with pytest.raises(UnfitEnvironment, match=r"^/bin/busybox took more than 1 s and was stopped$"):
        script(root, "sleep 60 & sleep 60", limit_s=1)
    assert time.monotonic() - began < 20


def test_an_image_without_the_folders_that_a_root_has(tmp_path: Path) -> None:
    needs("mksquashfs")
    path = squashfs(tmp_path, tar([entry("etc"), entry("etc/motd", b"hello\n")]))
    (tmp_path / "work").mkdir()
    with pytest.raises(UnfitEnvironment, match=r"^the image has no folder /dev$"), opened(path, work=tmp_path / "work"):
        pass


def test_a_file_that_is_no_squashfs(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"hello")
    (tmp_path / "work").mkdir()
    with (
        pytest.raises(InputError, match=r"file is not a squashfs file$"),
        opened(tmp_path / "file", work=tmp_path / "work"),
    ):
        pass


def test_an_unpacked_root_is_as_good(image: Path, tmp_path: Path) -> None:
    needs("unsquashfs")
    folder = tmp_path / "root"
    subprocess.run(["unsquashfs", "-no-progress", "-quiet", "-d", folder, image], check=True, timeout=60)
    root = Root(folder, None)
    assert script(root, "cat /etc/motd")[:2] == (0, "hello\n")
    assert "Read-only file system" in script(root, "echo x > /etc/motd")[2]


def sleepers() -> list[int]:
    """Processes of the test below."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"86397" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


def test_a_kill_ends_all_of_it(image: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    code = (
        "import sys; from pathlib import Path; from apertus_nemo.image.inside import opened\n"
        "with opened(Path(sys.argv[1]), work=Path(sys.argv[2])) as root:\n"
        "    root.run(['/bin/busybox', 'sh', '-c', 'sleep 86397 & sleep 86397'], environment={}, limit_s=60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(image), str(tmp_path / "work")])
    deadline = time.monotonic() + 30
    try:
        while len(sleepers()) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(sleepers()) >= 3
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    while sleepers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sleepers() == []
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()

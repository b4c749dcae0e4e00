"""Our source against git, and the archive of it against tar."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from apertus_nemo.errors import InputError
from apertus_nemo.record import source as sources
from apertus_nemo.record.source import find_source, read_archive, source_of_archive, unpack


def git(root: Path, *arguments: str) -> str:
    names = ("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL")
    env = {"PATH": os.environ["PATH"], "HOME": str(root.parent), **dict.fromkeys(names, "a@b")}
    return subprocess.run(["git", *arguments], cwd=root, env=env, capture_output=True, check=True, text=True).stdout


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The package of a small source tree, in no checkout."""
    root = tmp_path / "root"
    for name, text in {
        "apertus_nemo/__init__.py": '__version__ = "0.1.0"\n',
        "apertus_nemo/record/a.py": "x = 1\n",
        "recipes/recipe/tiny.yaml": "name: tiny\n",
        "requirements/linux-x86_64.txt": "numpy==1\n",
        "README.md": "text\n",
        ".gitignore": "__pycache__/\nignored.py\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root / "apertus_nemo"


@pytest.fixture
def checkout(package: Path) -> Path:
    """The same, committed; its root."""
    git(package.parent, "init", "-q")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-q", "-m", "one")
    return package.parent


def test_without_a_checkout(package: Path) -> None:
    found = find_source(package)
    for name in ("commit", "dirty", "patch", "tree"):
        assert found.tree[name] == {"unknown": "not a git checkout"}
    assert found.tree["package_version"] == "0.1.0"
    assert found.patch is None


def test_a_wheel_that_carries_its_commit(package: Path, checkout: Path) -> None:
    """As `image build` makes it: the source, and its archive, are those of the checkout."""
    of_checkout = find_source(package)
    origin = read_archive(of_checkout.archive, what="archive")["source.json"]
    (checkout / ".git").rename(checkout.parent / "git")
    (package / "resources").mkdir()
    (package / "resources" / "source.json").write_bytes(origin)
    assert find_source(package, allow_dirty=False) == of_checkout


def test_a_clean_checkout(package: Path, checkout: Path) -> None:
    found = find_source(package, allow_dirty=False).tree
    assert found["commit"] == git(checkout, "rev-parse", "HEAD").strip()
    assert found["tree"] == git(checkout, "rev-parse", "HEAD^{tree}").strip()
    assert (found["dirty"], found["patch"]) == (False, None)
    (checkout / "apertus_nemo" / "__pycache__").mkdir()
    (checkout / "apertus_nemo" / "__pycache__" / "a.py").touch()
    (checkout / "apertus_nemo" / "ignored.log").touch()
    (checkout / "notes.txt").touch()  # new, and not of what a run reads
    subprocess.run(["touch", "-d", "2001-01-01", checkout / "README.md"], check=True)
    git(checkout, "status")
    os.chmod(checkout / "recipes" / "recipe" / "tiny.yaml", 0o600)
    (checkout / "apertus_nemo" / "ignored.log").unlink()
    assert find_source(package, allow_dirty=False).tree == found


@pytest.mark.parametrize("name", ["README.md", "apertus_nemo/record/a.py", "recipes/recipe/new.yaml"])
def test_a_changed_checkout_is_refused_in_one_line(package: Path, checkout: Path, name: str) -> None:
    (checkout / name).write_text("y = 2\n")
    with pytest.raises(InputError) as refusal:
        find_source(package, allow_dirty=False)
    assert str(refusal.value) == (
        f"the checkout has changes that are in no commit ({name}): commit them, "
        "or let the record keep them as a patch with --allow-dirty"
    )


def test_the_patch_of_a_changed_checkout_gives_it_back(package: Path, checkout: Path, tmp_path: Path) -> None:
    (checkout / "README.md").unlink()
    (package / "record" / "a.py").write_text("x = 2\n")
    (package / "record" / "b.bin").write_bytes(bytes(range(256)))
    (package / "record" / "ä b.py").write_text("y = 3")
    (package / "ignored.py").write_text("z = 3\n")
    git(checkout, "add", "apertus_nemo/record/a.py")  # staged or not is all one
    index = (checkout / ".git" / "index").read_bytes()
    objects = sorted(path.name for path in (checkout / ".git" / "objects").rglob("*"))
    found = find_source(package)
    assert found.patch is not None
    assert found.tree["dirty"] is True
    assert (checkout / ".git" / "index").read_bytes() == index
    assert sorted(path.name for path in (checkout / ".git" / "objects").rglob("*")) == objects
    again = tmp_path / "again"
    git(tmp_path, "clone", "-q", str(checkout), str(again))
    (tmp_path / "patch").write_bytes(found.patch)
    git(again, "apply", "--binary", str(tmp_path / "patch"))
    assert (again / "apertus_nemo/record/a.py").read_text() == "x = 2\n"
    assert (again / "apertus_nemo/record/b.bin").read_bytes() == bytes(range(256))
    assert (again / "apertus_nemo/record/ä b.py").read_text() == "y = 3"
    assert not (again / "README.md").exists()
    assert not (again / "apertus_nemo/ignored.py").exists()
    # the same changes, of another user, in another place: the same bytes
    git(again, "config", "diff.noprefix", "true")
    git(again, "config", "diff.algorithm", "patience")
    git(again, "config", "core.abbrev", "4")
    assert find_source(again / "apertus_nemo").patch == found.patch


def test_a_secret_in_a_patch_is_refused(package: Path, checkout: Path) -> None:
    (package / "record" / "a.py").write_text("x = 1\nkey = 'hf_" + "Ab1" * 10 + "'\n")
    with pytest.raises(
        InputError, match=r"^the change of apertus_nemo/record/a.py holds what looks like a secret"
    ) as no:
        find_source(package)
    assert "hf_" not in str(no.value)


def test_git_that_cannot_answer(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(package.parent, "init", "-q")  # without a commit
    reason = {"unknown": "git does not take it for a checkout of this user"}
    assert find_source(package, allow_dirty=False).tree["commit"] == reason
    monkeypatch.setenv("PATH", str(package))
    assert find_source(package).tree["commit"] == {"unknown": "git is not installed"}


def test_the_archive_is_what_tar_reads_and_the_same_from_everywhere(package: Path, tmp_path: Path) -> None:
    found = find_source(package)
    with tarfile.open(fileobj=io.BytesIO(found.archive)) as archive:
        assert archive.getnames() == [
            "apertus_nemo/__init__.py",
            "apertus_nemo/record/a.py",
            "recipes/recipe/tiny.yaml",
            "requirements/linux-x86_64.txt",
            "source.json",
        ]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in archive} == {(0, 0, 0, "", 0o644)}
    wheel = tmp_path / "site-packages" / "apertus_nemo"  # recipes are inside the package there
    (wheel / "resources").mkdir(parents=True)
    for name in ("recipes", "requirements"):
        (package.parent / name).rename(wheel / "resources" / name)
    time.sleep(0.01)
    for path in [*package.rglob("*.py")]:
        (wheel / path.relative_to(package)).parent.mkdir(exist_ok=True)
        (wheel / path.relative_to(package)).write_bytes(path.read_bytes())
    assert find_source(wheel).archive == found.archive


def test_an_unpacked_archive_is_the_source_that_it_was_made_from(package: Path, checkout: Path, tmp_path: Path) -> None:
    (package / "record" / "a.py").write_text("x = 2\n")
    found = find_source(package)
    unpack(found.archive, tmp_path / "there", what="it")
    again = find_source(tmp_path / "there" / "apertus_nemo", allow_dirty=False)
    assert (again.tree, again.archive) == (found.tree, found.archive)
    assert source_of_archive(found.archive, what="it") == found.tree
    (tmp_path / "there/apertus_nemo/record/__pycache__").mkdir()
    (tmp_path / "there/apertus_nemo/record/__pycache__/a.cpython-311.pyc").touch()
    unpack(found.archive, tmp_path / "there", what="it")
    assert not (tmp_path / "there/apertus_nemo/record/__pycache__").exists()
    for name in ("apertus_nemo/record/a.py", "apertus_nemo/extra.py"):
        (tmp_path / "there" / name).write_text("x = 3\n")
        with pytest.raises(InputError, match=f"{name} is not what it holds; remove .*there, then"):
            unpack(found.archive, tmp_path / "there", what="it")
        os.unlink(tmp_path / "there" / name)
        if name.endswith("a.py"):
            (tmp_path / "there" / name).write_text("x = 2\n")


def hostile(kind: bytes = tarfile.REGTYPE, name: str = "apertus_nemo/b.py", target: str = "") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for own in ("apertus_nemo/__init__.py", "source.json"):
            archive.addfile(tarfile.TarInfo(own))
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        archive.addfile(member)
    return stream.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no archive",
        hostile(name="../outside.py"),
        hostile(name="/etc/passwd"),
        hostile(name="apertus_nemo/../../x"),
        hostile(name="apertus_nemo/.hidden/x"),
        hostile(tarfile.SYMTYPE, target="/etc/passwd"),
        hostile(tarfile.LNKTYPE, target="source.json"),
        hostile(tarfile.FIFOTYPE),
        hostile(tarfile.DIRTYPE),
        hostile(name="source.json"),
        hostile(),  # members in another order and form than ours
    ],
)
def test_what_is_no_archive_of_ours_is_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^source\.tar"):
        unpack(data, tmp_path / "there", what="source.tar")
    assert not (tmp_path / "there").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_the_real_source() -> None:
    start = time.process_time()
    found = find_source()
    assert time.process_time() - start < 0.5
    assert len(found.archive) < 3 * 2**20
    files = read_archive(found.archive, what="it")
    assert {"apertus_nemo/py.typed", "recipes/recipe/tiny_pretrain.yaml"} <= set(files)
    assert sources.ORIGIN in files

"""Starts that meet in one folder: it is of one of them, and none removes it under another."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from apertus_nemo.errors import UnfitEnvironment
from apertus_nemo.launch.resume import claimed, give_up
from apertus_nemo.record.claim import is_claimed


def test_a_folder_is_given_up_where_it_is_empty_and_nobody_has_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with claimed(folder):
        give_up(folder)
        assert folder.is_dir()
    (folder / "lock.json").write_text("{}")
    give_up(folder)
    assert os.listdir(folder) == ["lock.json"]
    (folder / "lock.json").unlink()
    give_up(folder)
    assert not folder.exists()
    give_up(folder)  # nothing to give up


@pytest.mark.parametrize("kind", ["a file", "a link to nothing", "a pipe"])
def test_what_is_no_folder_is_refused(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "run"
    if kind == "a file":
        place.write_text("mine")
    elif kind == "a pipe":
        os.mkfifo(place)
    else:
        place.symlink_to("nowhere")
    with pytest.raises(UnfitEnvironment) as caught, claimed(place):
        pass
    assert str(caught.value) == f"could not write {place}: File exists"
    give_up(place)
    assert os.listdir(tmp_path) == ["run"]


def test_who_waited_for_a_folder_that_was_removed_has_a_new_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    first = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(first, fcntl.LOCK_EX)
    has, done = threading.Event(), threading.Event()

    def second() -> bool:
        with claimed(folder) as claim:
            has.set()
            done.wait(20)
            return os.path.samestat(os.fstat(claim), os.stat(folder))

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(second)
        time.sleep(0.2)
        assert not has.is_set()
        folder.rmdir()
        os.close(first)
        assert has.wait(20)
        assert is_claimed(folder) is True
        done.set()
        assert waiting.result(20)


def test_many_that_start_and_give_up_at_once(tmp_path: Path) -> None:
    """Whoever has the folder has it alone, and it is there as long as that lasts."""
    folder, inside = tmp_path / "run", threading.Lock()
    refusals: list[str] = []

    def start(_: int) -> int:
        try:
            with claimed(folder) as claim:
                assert inside.acquire(blocking=False)
                try:
                    time.sleep(0.0005)
                    assert os.path.samestat(os.fstat(claim), os.stat(folder))
                finally:
                    inside.release()
        except UnfitEnvironment as error:
            refusals.append(str(error))
            return 0
        finally:
            give_up(folder)
        return 1

    with ThreadPoolExecutor(8) as pool:
        had = sum(pool.map(start, range(400)))
    assert had + len(refusals) == 400
    assert had > 50
    busy = f"{folder}: another process is training in this run directory; wait for it, or end it"
    assert set(refusals) <= {busy}
    give_up(folder)
    assert not folder.exists()

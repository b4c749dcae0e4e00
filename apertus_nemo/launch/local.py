"""Starts the ranks of a run as processes on this machine, shows how they do, and leaves none behind.

    summary = train(resolved, Path("runs/tiny-1"), cache=Path("~/.cache/apertus-nemo").expanduser())

The ranks get an environment of their own, made here from an allow-list and the recipe: the shell's environment
is not a hidden input. They meet through a file; each writes its output to `attempts/<n>/rank-<r>.log`;
the first one reports through a pipe. When one dies, the others are killed at once, with everything
they started.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apertus_nemo
from apertus_nemo.data import manifest
from apertus_nemo.errors import ApertusError, Differs, InputError, UnfitEnvironment
from apertus_nemo.launch.environment import rank_environment, secrets
from apertus_nemo.launch.show import Display
from apertus_nemo.recipe.check import check
from apertus_nemo.recipe.compose import ResolvedRecipe
from apertus_nemo.recipe.schema import RunConfig, to_tree
from apertus_nemo.recipe.typed import from_tree
from apertus_nemo.record.lock import PinnedData, RunLock, build_lock, look
from apertus_nemo.record.run_dir import RunDirectory
from apertus_nemo.record.secrets import leaves, refuse_secrets
from apertus_nemo.record.source import find_source

_GRACE_S = 5.0


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    run_directory: str
    steps: int
    loss: float
    tokens: int
    seconds: float


def default_cache(environment: Mapping[str, str]) -> Path:
    """`apertus-nemo` below XDG_CACHE_HOME, or below ~/.cache."""
    base = environment.get("XDG_CACHE_HOME")
    home = Path(environment.get("HOME") or "~").expanduser()
    return (Path(base) if base else home / ".cache") / "apertus-nemo"


def train(
    resolved: ResolvedRecipe,
    run_directory: Path,
    *,
    cache: Path,
    display: Display | None = None,
    allow_dirty: bool = False,
) -> Summary:
    """Check the recipe, prepare its data, write the lock, and train in `run_directory`, which must not hold a run.

    `allow_dirty`: also from a checkout with changes, which the record then keeps.
    Raises InputError, Differs (data that are not what their manifest says) or UnfitEnvironment.
    """
    run, display = resolved.config, display or Display()
    check(run)
    refuse_secrets(leaves(resolved.tree), where="the recipe")
    source = find_source(allow_dirty=allow_dirty)
    corpus, data = prepare_data(run, cache, display)
    lock = build_lock(
        run,
        overrides=list(resolved.overrides),
        environment=rank_environment(run, os.environ),
        data=data,
        surroundings=look(source=source, cache=cache),
    )
    files = {"source.tar": source.archive}
    if source.patch is not None:
        files["source.patch"] = source.patch
    return launch(lock, run_directory, files=files, corpus=corpus, cache=cache, display=display)


def launch(
    lock: RunLock, run_directory: Path, *, files: Mapping[str, bytes], corpus: Path, cache: Path, display: Display
) -> Summary:
    """Start the run that a lock describes in `run_directory`, which must not hold one; `files` go beside the lock."""
    run = from_tree(lock.tree["config"])
    directory = RunDirectory.create(run_directory, lock=lock, recipe_yaml=readable_recipe(lock), files=files)
    display.phase("starting NeMo")
    return run_ranks(run, directory, attempt=directory.new_attempt(), corpus=corpus, cache=cache, display=display)


def readable_recipe(lock: RunLock) -> str:
    """`recipe.yaml`: the resolved recipe, and the overrides as a comment."""
    import yaml

    text: str = yaml.safe_dump(to_tree(from_tree(lock.tree["config"])), sort_keys=False)
    return f"# For reading; lock.json decides.\n# overrides: {json.dumps(list(lock.tree['overrides']))}\n{text}"


def prepare_data(
    run: RunConfig, cache: Path, display: Display, *, folder: Path | None = None
) -> tuple[Path, PinnedData]:
    """The folder of the run's data, or `folder` in its place, and what the lock pins of it."""
    corpus = _corpus(run, cache, display) if folder is None else folder
    found = manifest.load(corpus)
    manifest.check_against_model(found, run)
    files = {entry.path: entry.sha256 for entry in found.files}
    return corpus, PinnedData(manifest.digest(found), files, to_tree(found.tokenizer))


def _corpus(run: RunConfig, cache: Path, display: Display) -> Path:
    """The folder of the run's data; the embedded one is built the first time, and verified."""
    if run.data.source == "built":
        assert run.data.path is not None  # `check` has seen to it
        return Path(run.data.path).expanduser().resolve()
    from apertus_nemo.data.corpus import embedded

    def progress(what: str, size: int | None) -> None:
        display.phase(f"preparing the text that comes with Python: {what}")

    return embedded(cache / "corpus", run.data.tokenizer_vocab_size, progress=progress)


class _Ranks:
    """The processes of one attempt; killed with their process groups on the way out."""

    def __init__(self, run: RunConfig, directory: RunDirectory, attempt: int, corpus: Path, cache: Path) -> None:
        self._run, self._directory, self._attempt = run, directory, attempt
        self._corpus, self._cache = corpus, cache
        self.logs = [directory.attempt(attempt) / f"rank-{rank}.log" for rank in range(run.world_size)]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.reading = -1

    def __enter__(self) -> _Ranks:
        self.reading, writing = os.pipe()
        try:
            self._start(writing)
        except BaseException:
            self.__exit__()
            raise
        finally:
            os.close(writing)
        return self

    def _start(self, writing: int) -> None:
        folder = self._directory.attempt(self._attempt)
        rendezvous = folder / "rendezvous"
        rendezvous.unlink(missing_ok=True)
        base = rank_environment(self._run, os.environ)
        for rank, log in enumerate(self.logs):
            environment = {
                **base,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self._run.world_size),
                "APERTUS_CORPUS": str(self._corpus),
                "APERTUS_INDEX_CACHE": str(self._cache / "index"),
                "APERTUS_RENDEZVOUS": str(rendezvous),
                "APERTUS_PROGRESS_FD": str(writing),
                "PYTHONPATH": str(Path(apertus_nemo.__file__).resolve().parents[1]),
            }
            hidden = secrets(self._run, os.environ) if rank == 0 else {}
            if rank == 0:
                _write_environment(folder / "environment.json", {**environment, **dict.fromkeys(hidden, "(secret)")})
            worker = ["-m", "apertus_nemo.training.worker", str(self._directory.path.resolve()), str(self._attempt)]
            with log.open("wb") as output:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-P", *worker],  # -P: not the code that may lie in the current folder
                        env={**environment, **hidden},
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        pass_fds=(writing,),
                        start_new_session=True,
                    )
                )

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for process in self.processes:
            process.wait()
        os.close(self.reading)

    def failed(self) -> int | None:
        """The first rank that ended with an error, or None; one that was killed before those that missed it."""
        codes = [process.poll() for process in self.processes]
        killed = [rank for rank, code in enumerate(codes) if code is not None and code < 0]
        return next(iter(killed + [rank for rank, code in enumerate(codes) if code]), None)

    def killed(self, rank: int, *, beside_errors: bool) -> bool:
        """The rank was ended by a signal; by SIGABRT only where no rank has an error, since gloo aborts after one."""
        code = self.processes[rank].returncode
        return code is not None and code < 0 and not (beside_errors and code == -signal.SIGABRT)

    def done(self) -> bool:
        """All ranks ended well."""
        return all(process.poll() == 0 for process in self.processes)


def _write_environment(path: Path, environment: Mapping[str, str]) -> None:
    path.write_text(json.dumps(dict(environment), indent=1, sort_keys=True) + "\n")


def run_ranks(
    run: RunConfig, directory: RunDirectory, *, attempt: int, corpus: Path, cache: Path, display: Display
) -> Summary:
    """Start all ranks, follow them to the end, and raise what ended them otherwise.

    SIGTERM and SIGHUP end the ranks too, and leave as SystemExit.
    """
    started = time.monotonic()
    with _ended_by_signals(), contextlib.closing(display), _Ranks(run, directory, attempt, corpus, cache) as ranks:
        last = _follow(ranks, display)
    return Summary(
        run_directory=str(directory.path),
        steps=int(last.get("step", 0)),
        loss=float(last.get("loss", float("nan"))),
        tokens=int(last.get("tokens", 0)),
        seconds=time.monotonic() - started,
    )


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let signals that would end this process without a word raise SystemExit, so that the ranks are ended first."""

    def leave(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _follow(ranks: _Ranks, display: Display) -> dict[str, Any]:
    """Show what the ranks report until all are done; the last step's event."""
    last: dict[str, Any] = {}
    errors: list[dict[str, Any]] = []
    pending, open_pipe, deadline = b"", True, None
    with selectors.DefaultSelector() as selector:
        selector.register(ranks.reading, selectors.EVENT_READ)
        while True:
            if open_pipe and selector.select(timeout=0.1):
                chunk = os.read(ranks.reading, 65536)
                open_pipe = bool(chunk)
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    event = json.loads(line)
                    if event["event"] == "step":
                        last = event
                    if event["event"] == "error":
                        errors.append(event)
                    display.event(event)
                continue
            if not open_pipe:
                time.sleep(0.02)
            display.tick()
            if ranks.done():
                return last
            failed = ranks.failed()
            if failed is not None:
                deadline = deadline or time.monotonic() + (0.5 if errors else _GRACE_S)
                if errors or ranks.killed(failed, beside_errors=bool(errors)) or time.monotonic() > deadline:
                    raise _failure(ranks, failed, errors)


def _failure(ranks: _Ranks, failed: int, errors: list[dict[str, Any]]) -> ApertusError:
    """What ended the run: a killed rank before the errors of those that lost it, else the first error."""
    code = ranks.processes[failed].returncode
    if ranks.killed(failed, beside_errors=bool(errors)) or not errors:
        how = f"was killed by signal {-code} ({_signal_name(-code)})" if code < 0 else f"ended with exit code {code}"
        return UnfitEnvironment(f"rank {failed} {how}; the other ranks were stopped; see {ranks.logs[failed]}")
    first = errors[0]
    kind = {1: Differs, 2: InputError, 3: UnfitEnvironment}.get(first["exit_code"])
    if kind is not None:
        return kind(first["message"])
    return ApertusError(f"{first['message']} (rank {first['rank']}; see {ranks.logs[first['rank']]})")


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return "unknown"
    return f"{name}, perhaps for lack of memory" if number == signal.SIGKILL else name

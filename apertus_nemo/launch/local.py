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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apertus_nemo
from apertus_nemo.data import manifest, mixture
from apertus_nemo.errors import ApertusError, Differs, InputError, UnfitEnvironment
from apertus_nemo.launch.account import Account, Ending, signals_held
from apertus_nemo.launch.environment import rank_environment, secrets
from apertus_nemo.launch.heartbeat import Board, Watch, examine
from apertus_nemo.launch.resume import claimed, last_line, look_at, planned_steps, read_lock, refuse_other_run
from apertus_nemo.launch.show import Display
from apertus_nemo.launch.time_limit import NO_LIMIT, TimeLimit, last_time_limit, time_limit_of, write_start
from apertus_nemo.recipe.check import check
from apertus_nemo.recipe.compose import ResolvedRecipe
from apertus_nemo.recipe.schema import RunConfig, to_tree
from apertus_nemo.recipe.typed import from_tree
from apertus_nemo.record.attempts import FAILED, HUNG, KILLED
from apertus_nemo.record.files import write_atomic
from apertus_nemo.record.files import writing as writing_to
from apertus_nemo.record.initial import Initial, find_initial
from apertus_nemo.record.lock import RELAUNCH, PinnedData, PinnedSource, RunLock, build_lock, look
from apertus_nemo.record.run_dir import RunDirectory
from apertus_nemo.record.secrets import leaves, refuse_secrets
from apertus_nemo.record.source import find_source
from apertus_nemo.training.progress import FIRST_STEP

_GRACE_S = 5.0


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    run_directory: str
    steps: int
    loss: float
    tokens: int
    seconds: float
    outcome: str = "done"  # "done", "stopped" (as asked, with a checkpoint) or "already finished"
    planned_steps: int = 0


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
    """Check the recipe, prepare its data, write the lock, and train in `run_directory`; a run there goes on.

    The time that `trainer.max_time` gives begins now.

    `allow_dirty`: also from a checkout with changes, which the record then keeps.
    Raises InputError (also for another run in `run_directory`), Differs (data that are not what their manifest says,
    a step that is not what was logged) or UnfitEnvironment.
    """
    began = time.monotonic()
    run, display = resolved.config, display or Display()
    check(run)
    if run.cluster.kind != "local":
        raise InputError(
            f"cluster.kind={run.cluster.kind}: ranks are started on this machine only so far; "
            "set cluster.kind=local, or look at the run with `apertus-nemo plan`"
        )
    refuse_secrets(leaves(resolved.tree), where="the recipe")
    source = find_source(allow_dirty=allow_dirty)
    corpus, data = prepare_data(run, cache, display)
    initial = look_at_initial(run, display)
    lock = build_lock(
        run,
        overrides=list(resolved.overrides),
        environment=rank_environment(run, os.environ),
        data=data,
        surroundings=look(source=source, cache=cache),
        initial=None if initial is None else initial.tree,
    )
    files = {"source.tar": source.archive}
    if source.patch is not None:
        files["source.patch"] = source.patch
    limit = TimeLimit(run.trainer.max_time, began)
    places = Places(corpus, cache, None if initial is None else initial.folder)
    return launch(lock, run_directory, files=files, places=places, display=display, go_on=True, limit=limit)


def go_on(
    run_directory: Path, *, cache: Path, display: Display | None = None, overrides: Sequence[str] = ()
) -> Summary:
    """Go on with the run in `run_directory`; everything is taken from its lock, which must hold here and now.

    Only the time limit is of the start: that of `overrides`, else the one that the start before had.

    Raises what `train` does; InputError, with the field, where something pinned is not as in the lock.
    """
    began = time.monotonic()
    display = display or Display()
    directory = RunDirectory.open(run_directory)
    text = time_limit_of(overrides) if overrides else last_time_limit(directory)
    held = read_lock(directory)
    run = from_tree(held.tree["config"])
    source = find_source(allow_dirty=True)  # changes are in the lock, or refused as a difference
    corpus, data = prepare_data(run, cache, display)
    initial = look_at_initial(run, display)
    lock = build_lock(
        run,
        overrides=list(held.tree["overrides"]),
        environment=rank_environment(run, os.environ),
        data=data,
        surroundings=look(source=source, cache=cache),
        initial=None if initial is None else initial.tree,
    )
    if RELAUNCH in held.tree:
        lock = RunLock({**lock.tree, RELAUNCH: held.tree[RELAUNCH]})
    limit = TimeLimit(text, began)
    places = Places(corpus, cache, None if initial is None else initial.folder)
    return launch(lock, run_directory, files={}, places=places, display=display, go_on=True, limit=limit)


def launch(
    lock: RunLock,
    run_directory: Path,
    *,
    files: Mapping[str, bytes],
    places: Places,
    display: Display,
    go_on: bool = False,
    limit: TimeLimit = NO_LIMIT,
) -> Summary:
    """Start the run that a lock describes in `run_directory`; `files` go beside the lock.

    A run that is there is refused, or goes on where `go_on` says so and its lock is the same.
    """
    run = from_tree(lock.tree["config"])
    steps = planned_steps(run)
    with claimed(run_directory) as claim:
        step = None
        if go_on and RunDirectory(run_directory).lock.exists():
            directory = RunDirectory.open(run_directory)
            refuse_other_run(directory, lock)
            state = look_at(directory, lock, run, warn=display.warning)
            if state.finished:
                return _logged_summary(directory, "already finished", steps, 0.0)
            step = state.step
            display.phase("going on from the start" if step is None else f"going on after step {step} of {steps}")
        else:
            directory = RunDirectory.create(run_directory, lock=lock, recipe_yaml=readable_recipe(lock), files=files)
        display.phase("starting NeMo")
        attempt = directory.new_attempt()
        write_start(directory, attempt=attempt, checkpoint_step=step, max_time=limit.text)
        start = Start(directory, attempt, step, places, claim, limit)
        return run_ranks(run, start, display=display)


def _logged_summary(directory: RunDirectory, outcome: str, planned: int, seconds: float) -> Summary:
    """Of a run whose ranks have nothing to report: by the last line of its log."""
    last = last_line(directory.steps) or {}
    loss = float.fromhex(last["loss"]) if isinstance(last.get("loss"), str) else float("nan")
    return Summary(str(directory.path), int(last.get("step", 0)), loss, 0, seconds, outcome, planned)


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
    found = mixture.sources(run, corpus)
    manifests = {source.corpus: source.manifest for source in found.values()}
    digests = {path: manifest.digest(each) for path, each in manifests.items()}
    sources = {
        name: PinnedSource(
            manifest_digest=digests[source.corpus],
            documents=None if source.whole else (source.first, source.end),
            tokens=source.tokens,
        )
        for name, source in sorted(found.items())
    }
    files = {
        (Path(name) / entry.path).as_posix(): entry.sha256
        for name, path in mixture.corpora(run, corpus).items()
        for entry in manifests[path].files
    }
    tokenizer = to_tree(next(iter(manifests.values())).tokenizer)
    return corpus, PinnedData(digests.get(corpus), files, tokenizer, sources)


def _corpus(run: RunConfig, cache: Path, display: Display) -> Path:
    """The folder of the run's data, or of its corpora; the embedded one is built the first time, and verified."""
    if run.data.source == "built":
        assert run.data.path is not None  # `check` has seen to it
        return Path(run.data.path).expanduser().resolve()
    from apertus_nemo.data.corpus import embedded, embedded_chat

    def progress(what: str, size: int | None) -> None:
        display.phase(f"preparing the text that comes with Python: {what}")

    prepare = embedded_chat if run.data.kind == "chat" else embedded
    return prepare(cache / "corpus", run.data.tokenizer_vocab_size, progress=progress)


def look_at_initial(run: RunConfig, display: Display, *, folder: Path | None = None) -> Initial | None:
    """What the run starts from, hashed; None where its weights are drawn."""
    if run.initial.kind != "none":
        display.phase("hashing the weights to start from")
    from apertus_nemo.convert.headers import refuse_other_tensors
    from apertus_nemo.model.layout import published_shapes

    def inspect(found: Path, names: list[str]) -> None:
        refuse_other_tensors(found, names, published_shapes(run.model))

    return find_initial(run, folder=folder, inspect=inspect)


@dataclass(frozen=True)
class Places:
    """Where a run's ranks find what they read; no part of what the run is."""

    corpus: Path
    cache: Path
    initial: Path | None = None  # weights to start from


@dataclass(frozen=True)
class Start:
    """One attempt: where, from what, and with what data."""

    directory: RunDirectory
    attempt: int
    step: int | None  # of the checkpoint to go on from, which was checked; None: from the start
    places: Places
    claim: int  # descriptor that holds the run directory; the ranks inherit it
    limit: TimeLimit = NO_LIMIT


class _Ranks:
    """The processes of one attempt; killed with their process groups on the way out."""

    def __init__(self, run: RunConfig, start: Start) -> None:
        self.run, self._begin = run, start
        folder = start.directory.attempt(start.attempt)
        self.logs = [folder / f"rank-{rank}.log" for rank in range(run.world_size)]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.reading = -1
        self.board = Board(run.world_size)

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
        begin = self._begin
        folder = begin.directory.attempt(begin.attempt)
        rendezvous = folder / "rendezvous"
        with writing_to(rendezvous):
            rendezvous.unlink(missing_ok=True)
        base = rank_environment(self.run, os.environ)
        for rank, log in enumerate(self.logs):
            environment = {
                **base,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.run.world_size),
                "APERTUS_CORPUS": str(begin.places.corpus),
                "APERTUS_INDEX_CACHE": str(begin.places.cache / "index"),
                "APERTUS_RENDEZVOUS": str(rendezvous),
                "APERTUS_PROGRESS_FD": str(writing),
                "APERTUS_HEARTBEAT_FD": str(self.board.descriptor),
                "PYTHONPATH": str(Path(apertus_nemo.__file__).resolve().parents[1]),
            }
            if begin.places.initial is not None:
                environment["APERTUS_INITIAL"] = str(begin.places.initial)
            hidden = secrets(self.run, os.environ) if rank == 0 else {}
            if rank == 0:
                _write_environment(folder / "environment.json", {**environment, **dict.fromkeys(hidden, "(secret)")})
            step = "-" if begin.step is None else str(begin.step)
            attempt = [str(begin.directory.path.resolve()), str(begin.attempt), step, str(os.getpid())]
            left_s = begin.limit.left_s(time.monotonic())
            attempt.append("-" if left_s is None else f"{left_s:.3f}")
            worker = ["-m", "apertus_nemo.training.worker", *attempt]
            with writing_to(log):
                opened = log.open("wb")
            with opened as output, signals_held():
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-P", *worker],  # -P: not the code that may lie in the current folder
                        env={**environment, **hidden},
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        pass_fds=(writing, begin.claim, self.board.descriptor),
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
        self.board.close()

    def alive(self) -> list[int]:
        """Ranks that have not ended."""
        return [rank for rank, process in enumerate(self.processes) if process.poll() is None]

    def hang(self, silence: float, why: str = "") -> tuple[ApertusError, Ending]:
        """The error of a run whose ranks are silent; their stacks are in their logs then."""
        pids = [process.pid for process in self.processes]
        hang = examine(self.board, pids, self.logs, alive=self.alive())
        error = UnfitEnvironment(
            f"rank {hang.rank} hangs {hang.place}: no rank went on for {silence:.0f} s{why}; {hang.where}; the stacks "
            f"of all ranks are in {self.logs[hang.rank].parent}/rank-*.log; the run was ended and can be resumed"
        )
        return error, Ending(HUNG, hang.rank)

    def failed(self) -> int | None:
        """The first rank that ended with an error, or None; one that was killed before those that missed it."""
        codes = [process.poll() for process in self.processes]
        killed = [rank for rank, code in enumerate(codes) if code is not None and code < 0]
        return next(iter(killed + [rank for rank, code in enumerate(codes) if code]), None)

    def killed(self, rank: int, *, beside_errors: bool) -> bool:
        """The rank was ended by a signal; by SIGABRT only where no rank has an error, since gloo aborts after one."""
        code = self.processes[rank].returncode
        return code is not None and code < 0 and not (beside_errors and code == -signal.SIGABRT)

    def ask_to_stop(self) -> None:
        """Have every rank save after the step that it is at, and end."""
        for process in self.processes:
            process.send_signal(signal.SIGUSR2)

    def done(self) -> bool:
        """All ranks ended well."""
        return all(process.poll() == 0 for process in self.processes)


def _write_environment(path: Path, environment: Mapping[str, str]) -> None:
    write_atomic(path, (json.dumps(dict(environment), indent=1, sort_keys=True) + "\n").encode())


def run_ranks(run: RunConfig, start: Start, *, display: Display) -> Summary:
    """Start all ranks, follow them to the end, and raise what ended them otherwise.

    Once there is a step to save, SIGTERM and SIGUSR2 stop the run after it. Before, and the second time, SIGTERM ends
    the ranks at once and leaves as SystemExit; so does SIGHUP always.
    """
    began = time.monotonic()
    wish = _Wish()
    hidden = secrets(run, os.environ).values()
    account = Account(start.directory, start.attempt, secrets=hidden, warn=display.warning)
    with wish.heard(), contextlib.closing(display), account.kept():
        with _Ranks(run, start) as ranks:
            last = _follow(ranks, display, wish, account)
        account.stopped = wish.stopped
    seconds, planned = time.monotonic() - began, planned_steps(run)
    outcome = "stopped" if wish.stopped else "done"
    if not last:  # all steps were done, but the end was not written yet
        return _logged_summary(start.directory, outcome, planned, seconds)
    return Summary(
        run_directory=str(start.directory.path),
        steps=int(last["step"]),
        loss=float(last["loss"]),
        tokens=int(last["tokens"]),
        seconds=seconds,
        outcome=outcome,
        planned_steps=planned,
    )


class _Wish:
    """What signals have asked of the launcher."""

    def __init__(self) -> None:
        self.training = False  # there is a step to save
        self.stop = False  # to be passed on to the ranks
        self.stopped = False  # the ranks have done so

    def _on_signal(self, number: int, _: Any) -> None:
        if number == signal.SIGHUP or not self.training or (self.stop and number == signal.SIGTERM):
            raise SystemExit(128 + number)  # the ranks are ended on the way out
        self.stop = True

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Handle signals that would end this process without a word."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _follow(ranks: _Ranks, display: Display, wish: _Wish, account: Account) -> dict[str, Any]:
    """Show what the ranks report until all are done; the last step's event."""
    last: dict[str, Any] = {}
    errors: list[dict[str, Any]] = []
    pending, open_pipe, deadline, asked = b"", True, None, False
    settings = ranks.run.trainer
    watch = Watch(ranks.board, timeout_s=settings.heartbeat_timeout_s, now=time.monotonic())
    with selectors.DefaultSelector() as selector:
        selector.register(ranks.reading, selectors.EVENT_READ)
        while True:
            if wish.stop and not asked:
                asked = True
                ranks.ask_to_stop()
                display.phase("stopping after this step")
            silence = watch.quiet(time.monotonic(), ranks.alive())
            if silence is not None:
                error, account.ending = ranks.hang(silence)
                raise error
            if open_pipe and selector.select(timeout=0.1):
                chunk = os.read(ranks.reading, 65536)
                open_pipe = bool(chunk)
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    event = json.loads(line)
                    if event["event"] == "step":
                        last = event
                    wish.training = wish.training or event.get("text") == FIRST_STEP or event["event"] == "step"
                    wish.stopped = wish.stopped or event["event"] == "stopped"
                    if event["event"] == "error":
                        errors.append(event)
                    account.event(event)
                    if event["event"] != "stopped":  # the command says so at the end
                        display.event(event)
                continue
            if not open_pipe:
                time.sleep(0.02)
            display.tick()
            account.tick()
            if ranks.done():
                return last
            failed = ranks.failed()
            if failed is not None:
                deadline = deadline or time.monotonic() + (0.5 if errors else _GRACE_S)
                if errors or ranks.killed(failed, beside_errors=bool(errors)) or time.monotonic() > deadline:
                    silence, others = watch.silence(time.monotonic(), ranks.alive()), ranks.alive()
                    if others and silence >= 0.9 * settings.collective_timeout_s:
                        # The rank that ended had waited in vain for another one.
                        why = f", and rank {failed} gave up waiting"
                        error, account.ending = ranks.hang(silence, why)
                        raise error
                    error, account.ending = _failure(ranks, failed, errors)
                    raise error


def _failure(ranks: _Ranks, failed: int, errors: list[dict[str, Any]]) -> tuple[ApertusError, Ending]:
    """What ended the run: a killed rank before the errors of those that lost it, else the first error."""
    code = ranks.processes[failed].returncode
    if ranks.killed(failed, beside_errors=bool(errors)) or not errors:
        how = f"was killed by signal {-code} ({_signal_name(-code)})" if code < 0 else f"ended with exit code {code}"
        error = UnfitEnvironment(f"rank {failed} {how}; the other ranks were stopped; see {ranks.logs[failed]}")
        return error, Ending(KILLED, failed, -code) if code < 0 else Ending(FAILED, failed)
    first = errors[0]
    ending = Ending(FAILED, first["rank"])
    kind = {1: Differs, 2: InputError, 3: UnfitEnvironment}.get(first["exit_code"])
    if kind is not None:
        return kind(first["message"]), ending
    return ApertusError(f"{first['message']} (rank {first['rank']}; see {ranks.logs[first['rank']]})"), ending


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return "unknown"
    return f"{name}, perhaps for lack of memory" if number == signal.SIGKILL else name

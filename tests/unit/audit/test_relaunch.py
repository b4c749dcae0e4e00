"""Before a relaunch: every field of a lock, changed alone, is named with both values; what is allowed stays known."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.audit import relaunch
from apertus_nemo.audit.relaunch import ABSENT, NOT_ALLOWED, Record, Refused, Relaunch, differences, find_data, here
from apertus_nemo.cli.main import main
from apertus_nemo.data import sources
from apertus_nemo.data.build import build
from apertus_nemo.data.manifest import load
from apertus_nemo.errors import InputError
from apertus_nemo.launch.environment import rank_environment
from apertus_nemo.launch.local import Places, readable_recipe
from apertus_nemo.launch.show import Display
from apertus_nemo.recipe.schema import DataStage, MixturePart
from apertus_nemo.record.canonical import dumps, is_unknown, sha256_hex
from apertus_nemo.record.lock import FIELDS, RunLock, Surroundings, build_lock
from apertus_nemo.record.run_dir import RunDirectory
from apertus_nemo.record.source import Source, find_source
from apertus_nemo.record.step_log import StepLogHeader, StepLogWriter
from tests.unit.record import example

SHELL = {"PATH": "/bin", "HOME": "/home/ada"}
QUIET = Display(quiet=True)


def write(folder: Path, lock: RunLock, *, under: RunLock | None = None, recipe: RunLock | None = None) -> Path:
    """A run directory with a lock, and a log that was written under it (or under another one)."""
    run = RunDirectory.create(folder, lock=lock, recipe_yaml=readable_recipe(recipe or lock))
    StepLogWriter.open(run.steps, StepLogHeader((under or lock).digest, "1" * 32, "e" * 64)).close()
    return run.path


def make_lock(instruction_set: str = "native", surroundings: Surroundings = example.SURROUNDINGS) -> RunLock:
    config = example.config()
    config = dataclasses.replace(
        config, reproducibility=dataclasses.replace(config.reproducibility, instruction_set=instruction_set)
    )
    lock = build_lock(
        config,
        overrides=["trainer.devices=4"],
        environment=rank_environment(config, SHELL),
        data=example.DATA,
        surroundings=surroundings,
    )
    return RunLock.from_bytes(lock.to_bytes(), what="it")


def look(path: Path, surroundings: Surroundings = example.SURROUNDINGS, data: Any = example.DATA) -> Relaunch:
    """As `prepare`, in surroundings that a test makes."""
    record = Record.read(path)
    found = here(record, surroundings=surroundings, data=data, shell={**SHELL, "HOME": "/home/grace"})
    source = Source(surroundings.source, b"", None)
    return Relaunch(record, found, Places(Path("corpus"), Path("cache")), source, differences(record.lock, found))


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values, unknown ones and empty collections included."""
    pairs: Any = []
    if isinstance(tree, dict) and not is_unknown(tree):
        pairs = tree.items()
    elif isinstance(tree, list):
        pairs = enumerate(tree)
    if not pairs:
        yield path
    for key, value in pairs:
        yield from leaves(value, (*path, key))


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def changed(lock: RunLock, path: tuple[Any, ...], value: Any) -> RunLock:
    """The lock with another value at `path`; `...` takes it out."""
    tree = json.loads(lock.to_bytes())
    holder = at(tree, path[:-1])
    if value is ...:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return RunLock(tree)


def another(value: Any) -> Any:
    """A value of the same kind that is not the same."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, list):
        return [*value, "x"]
    return {"unknown": "another reason"} if is_unknown(value) else "x"


def name_of(path: tuple[Any, ...]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


LOCK = make_lock()
PATHS = list(leaves(json.loads(LOCK.to_bytes())))
OF_THE_MACHINE = [path for path in PATHS if path[0] not in NOT_ALLOWED]


def test_the_lock_of_the_same_surroundings_is_the_same_to_the_byte(tmp_path: Path) -> None:
    again = look(write(tmp_path / "a", LOCK))
    assert again.differences == []
    assert again.check([]).to_bytes() == again.found.to_bytes() == LOCK.to_bytes()
    assert {path[0] for path in PATHS} == FIELDS
    assert len(PATHS) > 100


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_a_field_that_was_changed_in_the_lock_is_named_with_both_values(path: tuple[Any, ...], tmp_path: Path) -> None:
    """Whatever stands in a lock, found by walking through one: a field that is added later is tested too."""
    before = at(LOCK.tree, path)
    after = another(before)
    folder = write(tmp_path / "a", changed(LOCK, path, after), under=LOCK, recipe=LOCK)
    if path == ("schema_version",):
        with pytest.raises(InputError, match="has schema version 2; this version reads 1"):
            look(folder)
        return
    again = look(folder)
    assert [(item.field, item.locked, item.found) for item in again.differences] == [(name_of(path), after, before)]
    with pytest.raises(InputError) as refusal:
        again.check([name_of(path)])  # and no --allow helps a record that was changed
    first, second = str(refusal.value).splitlines()
    assert first.endswith("the lock was changed or exchanged")
    assert LOCK.digest in first
    assert second == f"  {name_of(path)}: locked {dumps(after).decode()}, found {dumps(before).decode()}"


@pytest.mark.parametrize("path", OF_THE_MACHINE, ids=name_of)
def test_a_field_that_is_not_as_it_was_is_refused_unless_allowed(path: tuple[Any, ...], tmp_path: Path) -> None:
    """The record is whole; it was made where this one thing was another."""
    then = changed(LOCK, path, another(at(LOCK.tree, path)))
    if path[0] == "data":  # each stage names its data again
        for index in range(len(then.tree["stages"])):
            stage = ("stages", index, *path)
            if len(path) == 2 and path[1] in then.tree["stages"][index]["data"]:
                then = changed(then, stage, at(then.tree, path))
    name = name_of(path)
    again = look(write(tmp_path / "a", then))
    with pytest.raises(Refused) as refusal:
        again.check([])
    assert refusal.value.exit_code == 3
    assert [item.field for item in refusal.value.differences] == [name]
    line = f"  {name}: locked {dumps(at(then.tree, path)).decode()}, found {dumps(at(LOCK.tree, path)).decode()}"
    assert str(refusal.value).splitlines()[1] == line
    lock = again.check([name])
    assert lock.tree["relaunch_of"] == {
        "allowed": [{"field": name, "found": at(LOCK.tree, path), "locked": at(then.tree, path)}],
        "lock_digest": then.digest,
    }
    assert at(lock.tree, path) == at(LOCK.tree, path)  # what it pins is what it uses
    assert RunLock.from_bytes(lock.to_bytes(), what="it").digest == lock.digest != then.digest
    # a section allows what stands below it; another relaunch of the same has the same lock
    assert look(write(tmp_path / "b", then)).check([path[0]]).digest == lock.digest


@pytest.mark.parametrize("path", [path for path in OF_THE_MACHINE if len(path) > 1], ids=name_of)
def test_a_field_that_is_new_or_gone_is_refused(path: tuple[Any, ...], tmp_path: Path) -> None:
    old = changed(LOCK, path, ...)
    if isinstance(path[-1], int):
        return  # an item fewer: the list as a whole differs, tested above
    field = look(write(tmp_path / "a", old)).differences
    assert (name_of(path), ABSENT) in [(item.field, item.locked) for item in field]
    new = changed(LOCK, (*path[:-1], "of_tomorrow"), "x")
    assert name_of((*path[:-1], "of_tomorrow")) in [item.field for item in look(write(tmp_path / "b", new)).differences]


def test_a_pinned_instruction_set_runs_on_any_model_that_has_it(tmp_path: Path) -> None:
    other = dataclasses.replace(
        example.SURROUNDINGS, machine={**example.SURROUNDINGS.machine, "cpu_model": "Another", "cpu_features": ["avx2"]}
    )
    pinned, native = write(tmp_path / "a", make_lock("avx2")), write(tmp_path / "b", make_lock())
    assert look(pinned, other).differences == []
    assert [item.field for item in look(native, other).differences] == ["hardware.cpu_features", "hardware.cpu_model"]
    arm = dataclasses.replace(other, machine={**other.machine, "architecture": "aarch64"})
    assert [item.field for item in look(pinned, arm).differences] == ["hardware.architecture"]


def test_other_packages_are_named_one_by_one(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", LOCK)
    other = {"torch": {"sha256": "4" * 64, "version": "2.13.0+cpu"}, "apex": {"sha256": "5" * 64, "version": "1.0"}}
    with pytest.raises(Refused) as refusal:
        look(folder, dataclasses.replace(example.SURROUNDINGS, packages=other)).check([])
    assert str(refusal.value).splitlines() == [
        f"{folder} cannot be relaunched here: 2 pinned things are not as in its lock",
        f'  packages.apex: locked absent, found {{"sha256":"{"5" * 64}","version":"1.0"}}',
        f'  packages.torch.sha256: locked "{"2" * 64}", found "{"4" * 64}"',
        "to let them differ, for ever on record: --allow packages.apex --allow packages.torch",
    ]
    lock = look(folder, dataclasses.replace(example.SURROUNDINGS, packages=other)).check(
        ["packages.apex", "packages.torch"]
    )
    assert [item["field"] for item in lock.tree["relaunch_of"]["allowed"]] == ["packages.apex", "packages.torch.sha256"]


def test_what_was_allowed_is_never_forgotten(tmp_path: Path) -> None:
    other = dataclasses.replace(example.SURROUNDINGS, python={**example.SURROUNDINGS.python, "libc": "glibc 2.40"})
    once = look(write(tmp_path / "a", LOCK), other).check(["python.libc"])
    assert look(write(tmp_path / "b", once), other).check([]).to_bytes() == once.to_bytes()  # again, where it ran
    twice = look(write(tmp_path / "c", once)).check(["python"])  # and back
    assert twice.tree["relaunch_of"]["lock_digest"] == once.digest
    assert twice.tree["relaunch_of"]["earlier"] == once.tree["relaunch_of"]


def test_an_observation_that_may_differ_is_in_the_lock(tmp_path: Path) -> None:
    lock = look(write(tmp_path / "a", LOCK)).check(["observed.torch"])
    (entry,) = lock.tree["relaunch_of"]["allowed"]
    assert entry["field"] == "observed.torch"
    assert entry["found"] == {"unknown": "the ranks find it: observed.json"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hardware.cpu_modle", "the lock has no such field; did you mean hardware.cpu_model?"),
        ("", "the lock has no such field"),
        ("config.optim.lr", "that would be another run, not this one again; `train` makes one"),
        ("stages", "that would be another run, not this one again; `train` makes one"),
    ],
)
def test_names_that_cannot_be_allowed(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(InputError, match=f"^--allow {name}: {re.escape(words)}"):
        look(write(tmp_path / "a", LOCK)).check([name])


class TestSource:
    """Which source is run again."""

    @pytest.fixture
    def package(self, tmp_path: Path) -> Path:
        package = tmp_path / "root" / "apertus_nemo"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text('__version__ = "0.1.0"\n')
        return package

    def record(self, folder: Path, source: Source) -> Record:
        path = write(folder, make_lock(surroundings=dataclasses.replace(example.SURROUNDINGS, source=source.tree)))
        (path / "source.tar").write_bytes(source.archive)
        return Record.read(path)

    def run_with(self, monkeypatch: pytest.MonkeyPatch, source: Source) -> None:
        monkeypatch.setattr(relaunch, "find_source", lambda: source)

    def test_the_one_that_runs_where_it_is_the_recorded_one(
        self, tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = find_source(package)
        self.run_with(monkeypatch, source)
        record = self.record(tmp_path / "a", source)
        record.directory.source.unlink()
        assert relaunch.needs_recorded_source(record, allow=[], trust=False) is None

    def test_the_recorded_one_without_asking_where_only_recipes_differ(
        self, tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = find_source(package)
        record = self.record(tmp_path / "a", source)
        (package.parent / "recipes").mkdir()
        (package.parent / "recipes" / "new.yaml").touch()
        self.run_with(monkeypatch, find_source(package))
        assert relaunch.needs_recorded_source(record, allow=[], trust=False) == source.archive

    def test_other_code_only_with_trust(self, tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = find_source(package)
        record = self.record(tmp_path / "a", source)
        (package / "more.py").touch()
        self.run_with(monkeypatch, find_source(package))
        with pytest.raises(
            InputError, match=r"running it again means running the code in .*source\.tar; add --trust if"
        ):
            relaunch.needs_recorded_source(record, allow=[], trust=False)
        assert relaunch.needs_recorded_source(record, allow=[], trust=True) == source.archive
        assert relaunch.needs_recorded_source(record, allow=["source"], trust=False) is None

    def test_an_archive_that_was_exchanged_never_runs(
        self, tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        record = self.record(tmp_path / "a", find_source(package))
        (package / "more.py").touch()
        other = find_source(package)
        record.directory.source.write_bytes(other.archive)
        self.run_with(monkeypatch, other)
        assert relaunch.needs_recorded_source(record, allow=[], trust=True) is None
        with pytest.raises(Refused) as refusal:
            look(record.directory.path, dataclasses.replace(example.SURROUNDINGS, source=other.tree)).check([])
        assert "source.archive_sha256" in {item.field for item in refusal.value.differences}
        record.directory.source.unlink()
        assert relaunch.needs_recorded_source(record, allow=[], trust=True) is None

    def test_the_patch_goes_along_and_must_be_the_one_of_the_lock(self, tmp_path: Path, package: Path) -> None:
        found = find_source(package)
        tree = {**found.tree, "patch": {"sha256": sha256_hex(b"a patch")}}
        record = self.record(tmp_path / "a", dataclasses.replace(found, tree=tree))
        unpacked = dataclasses.replace(found, tree=tree)
        assert relaunch.with_recorded_patch(record, unpacked).tree["patch"] == {"sha256": "absent"}
        record.directory.patch.write_bytes(b"a patch")
        assert relaunch.with_recorded_patch(record, unpacked).patch == b"a patch"
        record.directory.patch.write_bytes(b"another")
        assert relaunch.with_recorded_patch(record, unpacked).tree["patch"] == {"sha256": sha256_hex(b"another")}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.txt").write_text("some text, and some more of it, in a file. " * 40)
    found = sources.find([str(folder / "a.txt")])
    build(found, folder / "corpus", tokenizer=None, train_bpe=280, text_key="text", special_tokens="text")
    return folder / "corpus"


class TestData:
    """Data are found wherever they are now, and known by their bytes."""

    @pytest.fixture
    def corpus(self, built: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(built, tmp_path / "corpus"))

    def record(self, folder: Path, corpus: Path, written: str) -> tuple[Record, Any]:
        config = example.config()
        config = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, source="built", path=written),
            model=dataclasses.replace(config.model, vocab_size=512),
        )
        _, data = relaunch.prepare_data(config, folder, QUIET, folder=corpus)
        lock = build_lock(config, overrides=[], environment={}, data=data, surroundings=example.SURROUNDINGS)
        record = Record.read(write(folder, lock))
        record.directory.attempt(0).mkdir()
        note = json.dumps({"APERTUS_CORPUS": str(corpus)})
        (record.directory.attempt(0) / "environment.json").write_text(note)
        return record, config

    def find(self, record: Record, config: Any, folder: Path | None = None) -> tuple[Path, Any]:
        return find_data(record, config, cache=Path("unused"), display=QUIET, folder=folder)

    def test_a_path_that_means_another_place_now(
        self, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        record, config = self.record(tmp_path / "a", corpus, "corpus")
        (tmp_path / "there").mkdir()
        monkeypatch.chdir(tmp_path / "there")
        found, pinned = self.find(record, config)
        assert found == corpus
        assert pinned.manifest_digest == record.lock.tree["data"]["manifest_digest"]

    def test_moved_data_are_named_by_the_caller(self, corpus: Path, tmp_path: Path) -> None:
        record, config = self.record(tmp_path / "a", corpus, str(corpus))
        moved = corpus.rename(tmp_path / "moved")
        with pytest.raises(InputError, match=r"is not a built corpus.*; --data DIR says where the data are now$"):
            self.find(record, config)
        assert self.find(record, config, moved)[0] == moved

    def test_a_file_with_other_bytes_is_a_difference(self, corpus: Path, tmp_path: Path) -> None:
        record, config = self.record(tmp_path / "a", corpus, str(corpus))
        data = bytearray((corpus / "corpus.bin").read_bytes())
        data[7] ^= 1
        (corpus / "corpus.bin").write_bytes(data)
        (corpus / "tokenizer" / "tokenizer.json").unlink()
        _, pinned = self.find(record, config)
        found = here(record, surroundings=example.SURROUNDINGS, data=pinned, shell=SHELL)
        stated = {entry.path: entry.sha256 for entry in load(corpus).files}
        assert [
            (item.field, item.locked, item.found)
            for item in differences(record.lock, found)
            if item.field.startswith("data.")
        ] == [
            ("data.files.corpus.bin", stated["corpus.bin"], sha256_hex(bytes(data))),
            ("data.files.tokenizer/tokenizer.json", stated["tokenizer/tokenizer.json"], ABSENT),
        ]


class TestMixtures(TestData):
    """The same with a corpus for each source: the path is that of their folder."""

    @pytest.fixture
    def corpus(self, built: Path, tmp_path: Path) -> Path:
        shutil.copytree(built, tmp_path / "corpora" / "one")
        self.build(tmp_path / "corpora", "more of it, in a file. " * 40)
        return tmp_path / "corpora"

    def build(self, folder: Path, text: str) -> None:
        (folder / "b.txt").write_text(text)
        found = sources.find([str(folder / "b.txt")])
        build(found, folder / "two", tokenizer=folder / "one" / "tokenizer", force=True)

    def record(self, folder: Path, corpus: Path, written: str) -> tuple[Record, Any]:
        both = (MixturePart("one", 1.0), MixturePart("two", 3.0))
        stages = (DataStage("a", 0, mixture=both), DataStage("b", 80, seed=5, mixture=both[:1]))
        config = example.config()
        config = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, source="built", path=written, stages=stages),
            model=dataclasses.replace(config.model, vocab_size=512),
        )
        _, data = relaunch.prepare_data(config, folder, QUIET, folder=corpus)
        lock = build_lock(config, overrides=[], environment={}, data=data, surroundings=example.SURROUNDINGS)
        record = Record.read(write(folder, lock))
        record.directory.attempt(0).mkdir()
        note = json.dumps({"APERTUS_CORPUS": str(corpus)})
        (record.directory.attempt(0) / "environment.json").write_text(note)
        return record, config

    def test_a_path_that_means_another_place_now(
        self, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        record, config = self.record(tmp_path / "a", corpus, "corpora")
        (tmp_path / "there").mkdir()
        monkeypatch.chdir(tmp_path / "there")
        found, pinned = self.find(record, config)
        assert found == corpus
        assert pinned.manifest_digest is None
        assert list(record.lock.tree["data"]["manifest_digest"]) == ["unknown"]
        expected = {f"{name}/{e.path}": e.sha256 for name in ("one", "two") for e in load(corpus / name).files}
        assert pinned.files == record.lock.tree["data"]["files"] == expected

    def test_moved_data_are_named_by_the_caller(self, corpus: Path, tmp_path: Path) -> None:
        record, config = self.record(tmp_path / "a", corpus, str(corpus))
        moved = corpus.rename(tmp_path / "moved")
        with pytest.raises(InputError, match=r"^the source one of the mixture: .*; --data DIR says where the data are"):
            self.find(record, config)
        assert self.find(record, config, moved)[0] == moved

    def test_a_file_with_other_bytes_is_a_difference(self, corpus: Path, tmp_path: Path) -> None:
        """Another corpus in the place of one: named once, not in each stage again, and allowed with the data."""
        record, config = self.record(tmp_path / "a", corpus, str(corpus))
        self.build(corpus, "other text, and some more of it. " * 50)
        _, pinned = self.find(record, config)
        found = here(record, surroundings=example.SURROUNDINGS, data=pinned, shell=SHELL)
        fields = [item.field for item in differences(record.lock, found)]
        assert [field for field in fields if field.startswith(("data.", "stages"))] == [
            "data.files.two/corpus.bin",
            "data.files.two/corpus.idx",
            "data.sources.two.manifest_digest",
            "data.sources.two.tokens",
        ]


def test_the_command_line_refuses_what_is_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["relaunch", str(tmp_path)]) == 2
    assert main(["relaunch"]) == 2
    assert main(["relaunch", "--help"]) == 0
    lines = capsys.readouterr()
    assert "is not a run directory: it holds no lock.json" in lines.err
    assert "--recorded-source" not in lines.out


def test_the_command_line_names_what_differs_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    other = dataclasses.replace(
        example.SURROUNDINGS, source=find_source().tree, python={**example.SURROUNDINGS.python, "version": "3.11.99"}
    )
    path = write(tmp_path / "a", make_lock(surroundings=other))
    now = dataclasses.replace(example.SURROUNDINGS, source=find_source().tree)
    monkeypatch.setattr(relaunch, "find_data", lambda *_, **__: (tmp_path, example.DATA))
    monkeypatch.setattr(relaunch, "look", lambda **_: now)
    assert main(["relaunch", str(path), "--json"]) == 3
    out, err = capsys.readouterr()
    assert '  python.version: locked "3.11.99", found "3.11.2"' in err
    assert "\napertus-nemo: to let them differ, for ever on record: --allow python.version\n" in err
    assert json.loads(out) == {
        "differences": [{"field": "python.version", "found": "3.11.2", "locked": "3.11.99"}],
        "event": "refused",
    }
    assert list((tmp_path / "runs").iterdir()) == []

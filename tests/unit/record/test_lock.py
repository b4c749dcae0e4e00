"""The lock: every field present, canonical, no secret, no place; its file's hash is its digest."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.audit.compare import planned_steps
from apertus_nemo.errors import InputError
from apertus_nemo.launch.environment import rank_environment
from apertus_nemo.recipe.batches import BatchPlan
from apertus_nemo.recipe.compose import compose
from apertus_nemo.recipe.schema import DataStage, MixturePart, RunConfig
from apertus_nemo.recipe.typed import from_tree
from apertus_nemo.record.canonical import dumps
from apertus_nemo.record.lock import ENVIRONMENT, FIELDS, PinnedSource, RunLock, build_lock, lock_digest, recorded
from tests.unit.recipe.given import GIVEN
from tests.unit.record import example


def test_the_lock_digest_is_the_hash_of_the_file(tmp_path: Path) -> None:
    lock = example.lock()
    (tmp_path / "lock.json").write_bytes(lock.to_bytes())
    printed = subprocess.run(["sha256sum", tmp_path / "lock.json"], capture_output=True, check=True).stdout.decode()
    assert printed.split()[0] == lock_digest(lock) == lock.digest
    assert RunLock.from_bytes(lock.to_bytes(), what="it").digest == lock.digest


def test_every_field_of_the_contract_is_there() -> None:
    tree = json.loads(example.lock().to_bytes())
    assert set(tree) == FIELDS
    assert tree["schema_version"] == 1
    assert tree["config"] == json.loads(json.dumps(recorded(example.config())))
    assert tree["overrides"] == ["trainer.devices=4"]
    assert tree["packages"] == {"torch": {"sha256": "2" * 64, "version": "2.13.0+cpu"}}
    assert tree["python"]["version"] == "3.11.2"
    assert tree["data"] == {
        "files": dict(example.DATA.files),
        "manifest_digest": "d" * 64,
        "seed": 28,
        "source": "embedded",
        "tokenizer": dict(example.DATA.tokenizer),
    }
    assert tree["stages"][0]["data"] == {"manifest_digest": "d" * 64, "seed": 28, "source": "embedded"}
    assert tree["initial_state"] == {"kind": "none"}
    assert tree["level"] == "bitwise"
    assert list(tree["image"]) == ["unknown"]
    of_gpus = {"unknown": "a property of GPUs; the run asks for CPUs"}
    assert tree["hardware"] == {
        "accelerator": "cpu",
        "architecture": "x86_64",
        "cpu_features": ["avx", "avx2", "fma"],
        "cpu_model": "An Example",
        "driver": of_gpus,
        "gpu": of_gpus,
        "instruction_set": "native",
        "mkl_mode": "AVX2",
        "threads_per_rank": 1,
    }
    assert "relaunch_of" not in tree


def test_stages_follow_the_batch_plan() -> None:
    first, second = json.loads(example.lock().to_bytes())["stages"]
    assert (first["from_sample"], first["to_sample"], first["global_batch_size"]) == (0, 160, 8)
    assert (second["from_sample"], second["to_sample"], second["global_batch_size"]) == (160, 240, 16)
    assert (
        first["topology"]
        == second["topology"]
        == {
            "context_parallel_size": 1,
            "data_parallel_size": 2,
            "order": "tp-cp-ep-dp-pp",
            "pipeline_model_parallel_size": 1,
            "sequence_parallel": False,
            "tensor_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": None,
            "world_size": 4,
        }
    )


def staged_config() -> RunConfig:
    """A mixture, then all of one source from sample 80, then all of the data from 208; the batch doubles at 160."""
    config = example.config()
    stages = (
        DataStage("mixed", 0, mixture=(MixturePart("library", 0.9), MixturePart("documentation", 0.1))),
        DataStage("code", 80, seed=5, seq_length=64, mixture=(MixturePart("library"),)),
        DataStage("all", 208, seed=6),
    )
    return replace(config, data=replace(config.data, stages=stages))


def test_stages_of_data_and_of_the_batch_are_cut_wherever_one_changes() -> None:
    sources = {
        "": PinnedSource("d" * 64, None, 900),
        "documentation": PinnedSource("d" * 64, (7, 9), 200),
        "library": PinnedSource("d" * 64, (0, 7), 700),
    }
    data = replace(example.DATA, sources=sources)
    lock = build_lock(staged_config(), overrides=[], environment={}, data=data, surroundings=example.SURROUNDINGS)
    tree = json.loads(lock.to_bytes())
    assert RunLock.from_bytes(lock.to_bytes(), what="it").digest == lock.digest
    assert from_tree(tree["config"]) == staged_config()
    assert tree["data"]["sources"] == {
        "all": {"documents": None, "manifest_digest": "d" * 64, "tokens": 900},
        "documentation": {"documents": [7, 9], "manifest_digest": "d" * 64, "tokens": 200},
        "library": {"documents": [0, 7], "manifest_digest": "d" * 64, "tokens": 700},
    }
    assert [(s["from_sample"], s["to_sample"], s["global_batch_size"], s["data"]["stage"]) for s in tree["stages"]] == [
        (0, 80, 8, "mixed"),
        (80, 160, 8, "code"),
        (160, 208, 16, "code"),
        (208, 240, 16, "all"),
    ]
    assert planned_steps(lock) == BatchPlan.from_config(staged_config()).num_steps == 25
    assert tree["stages"][0]["data"] == {
        "mixture": [
            {"data": tree["data"]["sources"]["library"], "source": "library", "weight": 0.9},
            {"data": tree["data"]["sources"]["documentation"], "source": "documentation", "weight": 0.1},
        ],
        "position": "restart",
        "seed": 28,
        "seq_length": 32,
        "source": "embedded",
        "stage": "mixed",
    }
    last = tree["stages"][3]["data"]
    assert (last["seed"], last["seq_length"]) == (6, 32)
    assert last["mixture"] == [{"data": tree["data"]["sources"]["all"], "source": "all", "weight": "by samples"}]
    assert tree["stages"][1]["topology"] == tree["stages"][0]["topology"]


def test_sources_that_are_not_built_yet_are_unknown() -> None:
    lock = build_lock(staged_config(), overrides=[], environment={}, data=None, surroundings=example.SURROUNDINGS)
    reason = {"unknown": "the data were not built when the lock was written"}
    tree = json.loads(lock.to_bytes())
    assert tree["data"]["sources"] == dict.fromkeys(("all", "documentation", "library"), reason)
    assert tree["stages"][1]["data"]["mixture"][0]["data"] == reason


@pytest.mark.parametrize("recipe", ["apertus_8b_pretrain", "apertus_70b_pretrain"])
def test_published_runs_have_a_lock(recipe: str) -> None:
    """Its stages tile the samples, with the steps of the batch plan; 15T tokens of 4,096 a sample."""
    config = compose(recipe, GIVEN[recipe]).config
    lock = build_lock(config, overrides=[], environment={}, data=None, surroundings=example.SURROUNDINGS)
    stages = json.loads(lock.to_bytes())["stages"]
    assert [s["from_sample"] for s in stages] == [0, *(s["to_sample"] for s in stages[:-1])]
    assert stages[-1]["to_sample"] == 3_662_109_375
    assert planned_steps(lock) == BatchPlan.from_config(config).num_steps
    names = [s["data"]["stage"] for s in stages]
    assert sorted(set(names)) == sorted(stage.name for stage in config.data.stages)
    assert [s["topology"]["world_size"] for s in stages] == [config.world_size] * len(stages)


def test_only_listed_variables_enter_and_no_secret() -> None:
    lock = example.lock()
    assert json.loads(lock.to_bytes())["environment"] == {"MKL_CBWR": "AVX2", "OMP_NUM_THREADS": "1"}
    assert b"SECRET" not in lock.to_bytes()
    assert list(ENVIRONMENT) == sorted(ENVIRONMENT)


def test_whatever_the_launcher_pins_is_in_the_lock() -> None:
    """But for what cannot change a result: where to talk, what to print."""
    harmless = {"CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NEMO_LOG_MEMORY_USAGE", "PYTHONUNBUFFERED"}
    config = example.config()
    for level in ("native", "avx2"):
        run = replace(config, reproducibility=replace(config.reproducibility, instruction_set=level))
        assert set(rank_environment(run, {})) - harmless <= set(ENVIRONMENT)


def test_what_is_not_known_says_why() -> None:
    config = example.config(accelerator="gpu")
    lock = build_lock(config, overrides=[], environment={}, data=None, surroundings=example.SURROUNDINGS)
    tree = json.loads(lock.to_bytes())
    assert tree["data"]["manifest_digest"] == {"unknown": "the data were not built when the lock was written"}
    assert tree["hardware"]["mkl_mode"] == {"unknown": "a property of CPUs; the run asks for GPUs"}
    lock = build_lock(example.config(), overrides=[], environment={}, data=None, surroundings=example.SURROUNDINGS)
    assert "MKL_CBWR is not set" in json.loads(lock.to_bytes())["hardware"]["mkl_mode"]["unknown"]


def test_anything_pinned_changes_the_digest() -> None:
    digests = {example.lock().digest, example.lock(seed=29).digest, example.lock(micro_batch_size=4).digest}
    assert len(digests) == 3
    assert example.lock().digest == example.lock().digest


def test_the_same_from_another_folder_user_and_hash_seed(tmp_path: Path) -> None:
    """With the real packages (their hashes from the cache, after the first), source and machine, in fresh processes."""
    script = (
        "import pathlib\nfrom tests.unit.record.example import config\n"
        "from apertus_nemo.record.lock import build_lock, look\n"
        f"here = look(cache=pathlib.Path({str(tmp_path)!r}))\n"
        "print(build_lock(config(), overrides=[], environment={}, data=None, surroundings=here).digest)"
    )
    root = Path(__file__).resolve().parents[3]
    printed = [
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=cwd,
            env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "PYTHONHASHSEED": seed, "USER": user},
            capture_output=True,
            check=True,
            timeout=240,  # on a busy machine; the packages are hashed anew
        ).stdout
        for cwd, seed, user in ((root, "0", "ada"), (tmp_path, "77", "grace"))
    ]
    assert printed[0] == printed[1]
    assert len(printed[0]) == 65


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 2}, "has schema version 2; this version reads 1"),
        ({"more": 1}, "unknown field 'more'"),
        ({"level": ...}, "missing field 'level'"),
    ],
)
def test_other_locks_are_refused(change: dict[str, Any], words: str) -> None:
    tree = json.loads(example.lock().to_bytes()) | change
    tree = {key: value for key, value in tree.items() if value is not ...}
    with pytest.raises(InputError, match=f"^lock.json: {words}"):
        RunLock.from_bytes(dumps(tree), what="lock.json")


def test_an_edited_lock_is_refused() -> None:
    data = example.lock().to_bytes()
    with pytest.raises(InputError, match="is not canonical JSON"):
        RunLock.from_bytes(data + b"\n", what="it")
    with pytest.raises(InputError, match="is not a lock"):
        RunLock.from_bytes(b"[]", what="it")
    assert (
        RunLock.from_bytes(data.replace(b'"seed":28', b'"seed":29'), what="it").digest
        != hashlib.sha256(data).hexdigest()
    )


def test_a_large_float_in_a_recipe_survives() -> None:
    config = replace(example.config(), optim=replace(example.config().optim, eps=1e20))
    lock = build_lock(config, overrides=[], environment={}, data=None, surroundings=example.SURROUNDINGS)
    assert RunLock.from_bytes(lock.to_bytes(), what="it").tree["config"]["optim"]["eps"] == 1e20

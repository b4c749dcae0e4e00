"""Folders that a run cannot start from are refused before anything heavy, by name and word for word."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from apertus_nemo.audit.relaunch import Record, find_weights
from apertus_nemo.convert.importing import import_folder
from apertus_nemo.errors import InputError
from apertus_nemo.launch.local import look_at_initial, readable_recipe
from apertus_nemo.launch.show import Display
from apertus_nemo.model.layout import published_shapes
from apertus_nemo.recipe.compose import compose
from apertus_nemo.recipe.hf_config import to_hf
from apertus_nemo.recipe.schema import InitialConfig, RunConfig
from apertus_nemo.record.canonical import is_unknown
from apertus_nemo.record.files import file_sha256, tree_manifest, write_atomic
from apertus_nemo.record.lock import RunLock, build_lock
from apertus_nemo.record.run_dir import RunDirectory
from apertus_nemo.record.step_log import StepLogHeader, StepLogWriter
from tests.unit.convert.published import make_published
from tests.unit.record import example

QUIET = Display(quiet=True)
Q = "model.layers.0.self_attn.q_norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole folder of zeros, with xIELU's constants beside the weights."""
    run = compose().config
    tensors = {name: np.zeros(shape, np.float32) for name, shape in published_shapes(run.model).items()}
    tensors |= {f"model.layers.0.mlp.act_fn.{name}": np.zeros(1, np.float32) for name in ("beta", "eps")}
    path = tmp_path / "hf"
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    tokens: dict[str, int | None] = {}
    config = to_hf(run.model, dtype="torch.float32", tokens=tokens)
    (path / "config.json").write_text(json.dumps(config))
    return path


def starting(path: Path, **model: Any) -> RunConfig:
    run = compose().config
    return dataclasses.replace(
        run,
        initial=InitialConfig(kind="hugging_face", path=str(path)),
        model=dataclasses.replace(run.model, **model),
    )


def said(path: Path, **model: Any) -> str:
    with pytest.raises(InputError) as error:
        look_at_initial(starting(path, **model), QUIET)
    return str(error.value)


def test_a_whole_folder(folder: Path) -> None:
    found = look_at_initial(starting(folder), QUIET)
    assert found is not None
    assert found.folder == folder
    assert found.tree["files"] == {name: file_sha256(folder / name) for name in ("config.json", "model.safetensors")}
    assert is_unknown(found.tree["parent"])
    assert is_unknown(found.tree["weights_digest"])
    longer = look_at_initial(starting(folder, max_position_embeddings=512, rotary_base=2e6), QUIET)
    assert longer is not None
    assert longer.tree == found.tree, "a child may announce more positions"


def _replaced(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def _config(**values: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tree = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(tree))

    return apply


def _cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])


def _no_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _config(model_type="llama"),
            "{folder}/config.json: model_type is 'llama', and only 'apertus' is converted",
        ),
        (
            _config(num_hidden_layers=5),
            "model.num_layers=4: the weights in {folder} are of a model with 5",
        ),
        (
            _config(torch_dtype="float16"),
            "the weights in {folder} are of the type float16; fp32 and bf16 can be read",
        ),
        (_replaced(lambda t: t.pop(Q)), "{folder}: " + Q + " is missing"),
        (
            _replaced(lambda t: t.update({"model.bias": np.zeros(2, np.float32)})),
            "{folder}: model.bias is no tensor of this model",
        ),
        (
            _replaced(lambda t: t.update({Q: np.zeros((2, 3), np.float32)})),
            "{folder}: " + Q + " has the shape 2x3, and the model's is 16",
        ),
        (
            _replaced(lambda t: t.update({Q: np.zeros(16, np.float16)})),
            "{folder}: " + Q + " is of the type F16; F32 and BF16 can be read",
        ),
        (_no_header, "{folder}/model.safetensors is no safetensors file, or is truncated in its header"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "initial.path={folder}: the folder holds neither model.safetensors nor model.safetensors.index.json",
        ),
    ],
)
def test_refused(folder: Path, change: Callable[[Path], None], message: str) -> None:
    change(folder)
    assert said(folder) == message.format(folder=folder)


def test_a_truncated_file(folder: Path) -> None:
    size = (folder / "model.safetensors").stat().st_size
    _cut(folder)
    path = folder / "model.safetensors"
    assert said(folder) == f"{path} is not whole: it has {size - 1} bytes, and its header says {size}"


def test_not_there(tmp_path: Path) -> None:
    assert said(tmp_path / "x") == f"initial.path={tmp_path / 'x'}: there is no such folder"


def test_fp32_is_not_rounded(folder: Path) -> None:
    run = starting(folder)
    run = dataclasses.replace(run, trainer=dataclasses.replace(run.trainer, precision="bf16"))
    with pytest.raises(InputError) as error:
        look_at_initial(run, QUIET)
    assert str(error.value) == (
        f"trainer.precision=bf16: the weights in {folder} are fp32, and would be rounded; set trainer.precision=fp32"
    )


def _record(path: Path, run: RunConfig, initial: dict[str, Any]) -> Record:
    lock = build_lock(
        run, overrides=[], environment={}, data=example.DATA, surroundings=example.SURROUNDINGS, initial=initial
    )
    lock = RunLock.from_bytes(lock.to_bytes(), what="it")
    directory = RunDirectory.create(path, lock=lock, recipe_yaml=readable_recipe(lock))
    StepLogWriter.open(directory.steps, StepLogHeader(lock.digest, "1" * 32, "e" * 64)).close()
    return Record.read(path)


def test_a_relaunch_finds_them_by_their_bytes(folder: Path, tmp_path: Path) -> None:
    """Where the recipe says, then where the ranks read them, or in the folder that is given."""
    run = starting(folder)
    found = look_at_initial(run, QUIET)
    assert found is not None
    record = _record(tmp_path / "run", run, found.tree)

    def look(given: Path | None = None) -> Path:
        again = find_weights(record, run, display=QUIET, folder=given)
        assert again is not None
        assert again.tree == record.lock.tree["initial_state"]
        return again.folder

    assert look() == folder
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(InputError) as error:
        look()
    assert str(error.value) == (
        f"initial.path={folder}: there is no such folder; --initial DIR says where the weights are now"
    )
    assert look(moved) == moved
    note = record.directory.attempt(0) / "environment.json"
    note.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(note, json.dumps({"APERTUS_INITIAL": str(moved)}).encode())
    assert look() == moved
    data = bytearray((moved / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (moved / "model.safetensors").write_bytes(data)
    other = find_weights(record, run, display=QUIET, folder=None)
    assert other is not None
    changed = other.tree["files"]
    assert {name for name in changed if changed[name] != found.tree["files"][name]} == {"model.safetensors"}


def test_no_folder_for_weights_that_are_drawn(tmp_path: Path) -> None:
    run = compose().config
    record = _record(tmp_path / "run", run, {})
    with pytest.raises(InputError, match=r"--initial x: .* does not start from weights that are read"):
        find_weights(record, run, display=QUIET, folder=Path("x"))


def test_what_was_imported(tmp_path: Path) -> None:
    """Every file is hashed, the digest is known, and what is no such folder is refused."""
    run, hf, path = compose().config, tmp_path / "hf", tmp_path / "megatron"
    make_published(hf, torch.float32, model=run.model)
    done = import_folder(hf, path, run.model)

    def initial(folder: Path, **model: Any) -> RunConfig:
        changed = dataclasses.replace(run.model, **model)
        return dataclasses.replace(run, initial=InitialConfig(kind="megatron", path=str(folder)), model=changed)

    def refused(folder: Path, **model: Any) -> str:
        with pytest.raises(InputError) as error:
            look_at_initial(initial(folder, **model), QUIET)
        return str(error.value)

    found = look_at_initial(initial(path), QUIET)
    assert found is not None
    assert found.folder == path
    names = [name for name in tree_manifest(path) if name != "manifest.json"]
    assert found.tree == {
        "carries": ["weights"],
        "files": {name: file_sha256(path / name) for name in names},
        "kind": "megatron",
        "parent": {"unknown": "apertus-nemo.json in the folder names no run of ours"},
        "precision": "fp32",
        "weights_digest": done.weights_digest,
    }
    assert refused(path, num_layers=8) == f"model.num_layers=8: the weights in {path} are of a model with 4"
    assert refused(hf) == (
        f"initial.path={hf}: the folder holds no apertus-nemo.json of `apertus-nemo convert import`; "
        "initial.kind=run reads a run, initial.kind=hugging_face a folder with safetensors"
    )
    file = path / "weights" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert refused(path) == f"{file} does not have the SHA-256 of the manifest"
    file.unlink()
    assert refused(path) == f"{path}: weights/__0_0.distcp is missing"
    (path / "manifest.json").unlink()
    assert refused(path) == (f"{path} is not a checkpoint: it holds no manifest.json; give a folder of checkpoints/")

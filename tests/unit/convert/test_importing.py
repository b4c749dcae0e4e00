"""From the published form to Megatron's and back: to the bit, whole or absent, and every refusal word for word."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from apertus_nemo.cli.main import main
from apertus_nemo.convert.digest import checkpoint_digests, folder_digests
from apertus_nemo.convert.export import export
from apertus_nemo.convert.importing import Imported, import_folder
from apertus_nemo.errors import InputError, UnfitEnvironment
from apertus_nemo.record.checkpoints import check_checkpoint
from apertus_nemo.record.files import file_sha256, tree_manifest
from apertus_nemo.record.state import digest_of
from tests.crash.small_disk import small_disk
from tests.unit.convert.published import bytes_of, make_published, small_model

FULL = "the disk is full; free some space, then run the command again"
READ_ONLY = "the file system is read-only; choose another folder or its permissions"
Q = "model.layers.0.self_attn.q_norm.weight"
BETA = "model.layers.1.mlp.act_fn.beta"
SMALL_FILES = {"chunk_bytes": 20_000, "file_bytes": 100_000}  # every matrix in several chunks, and many files


def imported(source: Path, folder: Path, **options: Any) -> Imported:
    return import_folder(source, folder, small_model(), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, SMALL_FILES], ids=["large chunks", "small chunks"])
def test_there_and_back(tmp_path: Path, dtype: torch.dtype, options: dict[str, int]) -> None:
    hf, model = make_published(tmp_path / "hf", dtype), small_model()
    done = imported(hf, tmp_path / "out", **options)
    assert (done.files > 5) == bool(options)
    assert done.weights_digest == digest_of(folder_digests(hf, model))
    assert done.weights_digest == digest_of(checkpoint_digests(tmp_path / "out", model))
    assert check_checkpoint(tmp_path / "out", lock_digest="") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
    export(tmp_path / "out" / "weights", model, tmp_path / "again", tokenizer=None, source={}, shard_bytes=300_000)
    assert bytes_of(tmp_path / "again") == bytes_of(hf)
    note = json.loads((tmp_path / "out" / "apertus-nemo.json").read_bytes())
    names = ["config.json", "model.safetensors.index.json", *(f"model-0000{n}-of-00002.safetensors" for n in (1, 2))]
    assert note == {
        "files": {name: file_sha256(hf / name) for name in names},
        "format": 1,
        "kind": "apertus-nemo import",
        "nonfinite": [],
        "source": None,
        "weights_digest": done.weights_digest,
    }


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another folder has the same bytes; what export and digest say of an imported one."""
    monkeypatch.chdir(tmp_path)
    make_published(Path("hf"))
    for name in ("one", "two"):
        assert main(["convert", "import", "hf", name]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        line, digest = out.splitlines()
        assert line == f"imported hf into {name}: 27 tensors, 1,049,992 bytes"
    assert tree_manifest(Path("one")) == tree_manifest(Path("two"))
    for folder in ("one", "hf"):
        assert main(["convert", "digest", folder]) == 0
        assert capsys.readouterr() == (f"{digest.strip()}\n", "")
    assert main(["convert", "export", "one", "back"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[0].startswith("exported one into back: 31 tensors, ")
    assert out.splitlines()[1] == digest
    assert bytes_of(Path("back")) == bytes_of(Path("hf"))
    config = json.loads(Path("back/config.json").read_bytes())
    assert config == json.loads(Path("hf/config.json").read_bytes())
    assert main(["convert", "import", "back", "three", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights_digest"] == digest.split()[-1]
    assert main(["convert", "export", "one", "more", "--step", "3"]) == 2
    assert capsys.readouterr().err == "apertus-nemo: --step 3: one was imported, and holds the weights of no step\n"


def test_constants_may_be_left_out_of_all_layers(tmp_path: Path) -> None:
    """As a library may that keeps constants in its code; export writes them."""
    hf, model = make_published(tmp_path / "hf", constants=False), small_model()
    imported(hf, tmp_path / "out")
    export(tmp_path / "out" / "weights", model, tmp_path / "again", tokenizer=None, source={})
    back = bytes_of(tmp_path / "again")
    assert {name for name in back if not name.endswith(("beta", "eps"))} == set(bytes_of(hf))


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Change all tensors, and write them in one file."""

    def apply(folder: Path) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(file)
            file.unlink()
        (folder / "model.safetensors.index.json").unlink()
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def _config(**values: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tree = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(tree))

    return apply


def _cut(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q][3] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _config(model_type="llama"),
            "{hf}/config.json: model_type is 'llama', and only 'apertus' is converted",
        ),
        (
            _config(torch_dtype="float32"),
            "{hf}: config.json says that the weights are fp32, and they are BF16",
        ),
        (
            _tensors(lambda t: (t.pop(Q), t.update({"model.bias": torch.zeros(2)}))),
            "{hf}: model.bias is no tensor of this model\n{hf}: " + Q + " is missing",
        ),
        (
            _tensors(lambda t: t.update({Q: torch.zeros(7, dtype=torch.bfloat16)})),
            "{hf}: " + Q + " has the shape 7, and the model's is 16",
        ),
        (
            _tensors(lambda t: t.update({Q: torch.zeros(16, dtype=torch.float16)})),
            "{hf}: " + Q + " is of the type F16; F32 and BF16 can be read",
        ),
        (
            _tensors(lambda t: t.update({Q: torch.zeros(16)})),
            "{hf}: the weights are of several types: BF16, F32",
        ),
        (
            _tensors(lambda t: t.update({BETA: torch.tensor(0.25, dtype=torch.bfloat16)})),
            "{hf}: " + BETA + " is 0.25, and the model's is 0.5",
        ),
        (
            _tensors(lambda t: t.update({BETA: torch.zeros(2, dtype=torch.bfloat16)})),
            "{hf}: " + BETA + " is no number of the types F32 and BF16",
        ),
        (_tensors(lambda t: t.pop(BETA)), "{hf}: " + BETA + " is missing"),
        (
            _tensors(lambda t: t.update({"mine.act_fn.beta": torch.tensor(0.5)})),
            "{hf}: mine.act_fn.beta is no tensor of this model",
        ),
        (
            _tensors(_nan),
            Q + " holds a value that is not finite; --allow-nonfinite converts it all the same",
        ),
        (_cut, "{hf}/model-00002-of-00002.safetensors is not whole: it has {size} bytes, and its header says {more}"),
        (
            lambda folder: (folder / "model-00001-of-00002.safetensors").unlink(),
            "{hf}: model-00001-of-00002.safetensors is missing, and model.safetensors.index.json names it",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").unlink(),
            "{hf}: the folder holds neither model.safetensors nor model.safetensors.index.json",
        ),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            "{hf}/config.json is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
        (
            lambda folder: (folder / "config.json").unlink(),
            "could not read {hf}/config.json: No such file or directory",
        ),
    ],
)
def test_refused(tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
    hf = make_published(tmp_path / "hf")
    change(hf)
    cut = hf / "model-00002-of-00002.safetensors"
    size = cut.stat().st_size if cut.exists() else 0
    with pytest.raises(InputError) as caught:
        imported(hf, tmp_path / "out")
    assert str(caught.value) == message.format(hf=hf, size=size, more=size + 1)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"], "nothing is left"


def test_nan_where_it_is_wanted(tmp_path: Path) -> None:
    """It is converted to the bit, and named; export asks the same question."""
    hf, model = make_published(tmp_path / "hf"), small_model()
    _tensors(_nan)(hf)
    done = imported(hf, tmp_path / "out", allow_nonfinite=True)
    assert done.weights_digest == digest_of(folder_digests(hf, model))
    assert json.loads((tmp_path / "out" / "apertus-nemo.json").read_bytes())["nonfinite"] == [Q]
    with pytest.raises(InputError) as caught:
        export(tmp_path / "out" / "weights", model, tmp_path / "again", tokenizer=None, source={})
    assert str(caught.value) == f"{Q} holds a value that is not finite; --allow-nonfinite converts it all the same"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
    again = tmp_path / "again"
    export(tmp_path / "out" / "weights", model, again, tokenizer=None, source={}, allow_nonfinite=True)
    assert bytes_of(again) == bytes_of(hf)


def test_a_folder_that_is_there(tmp_path: Path) -> None:
    hf = make_published(tmp_path / "hf")
    with pytest.raises(InputError) as caught:
        imported(hf, hf)
    assert str(caught.value) == f"{hf} is there already: name a folder that is not"


def test_other_weights_than_the_run_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = make_published(tmp_path / "hf")
    note = {"source": {"lock_digest": "1" * 64, "step": 3, "weights_digest": "2" * 64}}
    (hf / "apertus-nemo.json").write_text(json.dumps(note))
    assert main(["convert", "import", str(hf), str(tmp_path / "out")]) == 1
    found = digest_of(folder_digests(hf, small_model()))
    said = f"the weights in {hf} have the digest {found}, and apertus-nemo.json says {'2' * 64}"
    assert capsys.readouterr() == ("", f"apertus-nemo: {said}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    note["source"]["weights_digest"] = found
    (hf / "apertus-nemo.json").write_text(json.dumps(note))
    imported(hf, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "apertus-nemo.json").read_bytes())["source"] == note["source"]


def test_interrupted(tmp_path: Path) -> None:
    """Killed half-way, it goes on with the files that are whole, and ends with the same bytes."""
    hf, out = make_published(tmp_path / "hf"), tmp_path / "out"
    imported(hf, tmp_path / "whole", **SMALL_FILES)
    partial = tmp_path / ".out.partial"
    child = os.fork()
    if child == 0:

        def die(done: int, total: int) -> None:
            if done > total * 3 // 4:
                os.kill(os.getpid(), 9)

        try:
            imported(hf, out, progress=die, **SMALL_FILES)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    assert not out.exists()
    before = json.loads((partial / ".done.json").read_bytes())
    assert before
    stamps = {name: (partial / "weights" / name).stat().st_mtime_ns for name in before}
    torn = sorted(before)[0]
    with (partial / "weights" / torn).open("r+b") as stream:
        stream.write(b"x")  # one that was whole, and is no more
    imported(hf, out, **SMALL_FILES)
    kept = {name for name, stamp in stamps.items() if (out / "weights" / name).stat().st_mtime_ns == stamp}
    assert kept == set(before) - {torn}
    assert tree_manifest(out) == tree_manifest(tmp_path / "whole")
    assert not partial.exists()


def test_what_is_left_of_another_source_is_not_taken(tmp_path: Path) -> None:
    first, second = make_published(tmp_path / "a"), make_published(tmp_path / "b", torch.float32)
    with pytest.raises(ZeroDivisionError):
        imported(first, tmp_path / "out", progress=lambda done, total: 1 // (done < total), **SMALL_FILES)
    assert (tmp_path / ".out.partial" / "weights").is_dir()
    done = imported(second, tmp_path / "out", **SMALL_FILES)
    assert done.weights_digest == digest_of(folder_digests(second, small_model()))
    shutil.rmtree(tmp_path / "out")


def test_a_byte_that_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Export hashes what it reads; without that, torch's own reader is the last who may notice."""
    hf, out = make_published(tmp_path / "hf"), tmp_path / "out"
    imported(hf, out)
    file = out / "weights" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert main(["convert", "export", str(out), str(tmp_path / "again")]) == 2
    said = f"{file} does not have the SHA-256 of the manifest"
    assert capsys.readouterr() == ("", f"apertus-nemo: {said}\n")
    assert not (tmp_path / "again").exists()


def test_a_full_and_a_read_only_disk(tmp_path: Path) -> None:
    """What is whole stays beside for the next call; nothing has the folder's name before it is whole."""
    hf = make_published(tmp_path / "hf")
    whole = imported(hf, tmp_path / "whole", **SMALL_FILES)
    with small_disk(tmp_path / "disk", size_bytes=2**22) as disk:
        out = disk.folder / "out"

        def said() -> str:
            with pytest.raises(UnfitEnvironment) as caught:
                imported(hf, out, **SMALL_FILES)
            assert not out.exists()
            begin = f"could not write {disk.folder}/.out.partial"
            assert str(caught.value).startswith(begin)
            return str(caught.value).removeprefix(begin)

        disk.fill()
        assert said() == f"/.from.json: {FULL}"
        disk.free()
        disk.fill(pages=100)
        assert re.fullmatch(rf"/(weights/\.__0_\d+\.distcp\.partial|\.done\.json): {FULL}", said())
        disk.free()
        with disk.read_only():
            assert said().endswith(READ_ONLY)
        assert imported(hf, out, **SMALL_FILES).weights_digest == whole.weights_digest
        assert [path.name for path in disk.folder.iterdir()] == ["out"]
        assert tree_manifest(out) == tree_manifest(tmp_path / "whole")


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file stands where the folder should be made."""
    hf = make_published(tmp_path / "hf")
    (tmp_path / "file").write_text("")
    assert main(["convert", "import", str(hf), str(tmp_path / "file" / "out")]) == 3
    where = tmp_path / "file" / ".out.partial"
    assert capsys.readouterr() == ("", f"apertus-nemo: could not write {where}: Not a directory\n")

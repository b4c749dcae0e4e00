"""Exports in forked processes that have imported Megatron."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

from apertus_nemo.recipe.schema import ModelConfig, RunConfig
from tests.integration.runs import SQUEEZED


def _run(*overrides: str) -> RunConfig:
    from apertus_nemo.recipe.compose import compose

    return compose(overrides=[*SQUEEZED, *overrides]).config


def _model(*overrides: str) -> ModelConfig:
    return _run(*overrides).model


def exported(
    rank: int,
    world_size: int,
    *,
    checkpoint: str,
    folder: str,
    overrides: list[str],
    precision: str = "fp32",
    shard_bytes: int = 10**9,
) -> dict[str, Any]:
    """Export; the digest of what lies in the folder then."""
    from apertus_nemo.convert.digest import folder_digests
    from apertus_nemo.convert.export import export
    from apertus_nemo.record.state import digest_of

    model = _model(*overrides)
    done = export(Path(checkpoint) / "weights", model, Path(folder), tokenizer=None, source={}, shard_bytes=shard_bytes)
    digest = digest_of(folder_digests(Path(folder), model))
    return {"digest": digest, "shards": done.shards, "tensors": done.tensors, "size_bytes": done.size_bytes}


def imported(rank: int, world_size: int, *, source: str, folder: str, **options: Any) -> dict[str, Any]:
    """Import; the digest that is recorded, and the one of what lies in the folder then."""
    from apertus_nemo.convert.digest import checkpoint_digests
    from apertus_nemo.convert.importing import import_folder
    from apertus_nemo.record.state import digest_of

    done = import_folder(Path(source), Path(folder), _model(), **options)
    found = digest_of(checkpoint_digests(Path(folder), _model()))
    return {"recorded": done.weights_digest, "found": found, "files": done.files}


def refused_by_the_disk(rank: int, world_size: int, **arguments: Any) -> dict[str, Any]:
    """`exported`; {"error", "exit_code"} where it ends with an error of ours."""
    from apertus_nemo.errors import ApertusError

    try:
        return exported(rank, world_size, **arguments)
    except ApertusError as error:
        return {"error": str(error), "exit_code": error.exit_code}


def logits(
    rank: int, world_size: int, *, checkpoint: str, folder: str, tokenizer: str, precision: str = "fp32"
) -> dict[str, Any]:
    """transformers' model of the exported folder, beside Megatron's own of the same checkpoint."""
    import logging

    import torch
    from megatron.core import dist_checkpointing
    from safetensors import safe_open
    from transformers import ApertusForCausalLM, AutoTokenizer

    from apertus_nemo.convert.export import export
    from apertus_nemo.convert.unpickle import forced
    from apertus_nemo.model.config import build_model
    from tests.cases.model import start

    run, dtype = _run(f"trainer.precision={precision}"), {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    start(rank, world_size, run)
    export(Path(checkpoint) / "weights", run.model, Path(folder), tokenizer=Path(tokenizer), source={})
    warnings: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    logging.getLogger("transformers").addHandler(Keep())
    theirs, info = ApertusForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=dtype)
    theirs.eval()
    scalars = sorted({str(v.dtype) for n, v in theirs.named_parameters() if "act_fn" in n})
    theirs.to(
        dtype
    )  # transformers 4.57 makes xIELU's scalars in bf16 whatever it loads: take them from the folder again
    with torch.no_grad(), safe_open(Path(folder) / "model.safetensors", framework="pt") as file:
        for name, parameter in theirs.named_parameters():
            if "act_fn" in name:
                parameter.copy_(file.get_tensor(name))
    ours = build_model(run).to(dtype)  # as NeMo's wrapper does
    state = ours.sharded_state_dict(prefix="module.")
    with forced():
        loaded = dist_checkpointing.load(state, str(Path(checkpoint) / "weights"))
    ours.load_state_dict(
        {k.removeprefix("module."): v for k, v in loaded.items() if "_extra_state" not in k}, strict=False
    )
    ours.eval()
    tokens = torch.randint(4, run.model.vocab_size, (2, 64), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        mine = ours(tokens, None, None).float()
        other = theirs(input_ids=tokens).logits.float()
    mine = mine.transpose(0, 1) if mine.shape[0] != 2 else mine
    tokens_ids = AutoTokenizer.from_pretrained(folder)
    config = theirs.config
    expected = ("original_max_position_embeddings", "xIELU")  # 256 positions; the CUDA kernel, which nobody has here
    return {
        "keys": {kind: sorted(info[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")},
        "scalars": scalars,
        "deviation": float((mine - other).abs().max()),
        "close": float(torch.isclose(mine, other, atol=1e-5, rtol=0.016).float().mean()),
        "same_argmax": float((mine.argmax(-1) == other.argmax(-1)).float().mean()),
        "warnings": [text for text in warnings if not any(word in text for word in expected)],
        "tokens": {"bos": config.bos_token_id, "eos": config.eos_token_id, "pad": config.pad_token_id},
        "inputs": sorted(tokens_ids("Hi")),
        "round_trip": tokens_ids.decode(tokens_ids("Reproducible, or not?").input_ids, skip_special_tokens=True)
        == "Reproducible, or not?",
    }


def refused(rank: int, world_size: int, *, checkpoint: str, folder: str) -> dict[str, Any]:
    """What is said of checkpoints that are not of this model, or torn."""
    import dataclasses

    from apertus_nemo.convert.export import export
    from apertus_nemo.errors import ApertusError

    weights, out, model = Path(checkpoint) / "weights", Path(folder) / "out", _model()
    scratch = Path(folder) / "scratch"

    def said(weights: Path, model: ModelConfig, out: Path = out) -> str:
        try:
            export(weights, model, out, tokenizer=None, source={})
        except ApertusError as error:
            return str(error) if error.exit_code == 2 else f"exit code {error.exit_code}"
        return "taken"

    def renamed(old: str, new: str) -> Path:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(weights, scratch)
        index = pickle.loads((scratch / ".metadata").read_bytes())
        index.state_dict_metadata[new] = index.state_dict_metadata.pop(old)
        (scratch / ".metadata").write_bytes(pickle.dumps(index))
        return scratch

    answers: dict[str, Any] = {
        "deeper": said(weights, dataclasses.replace(model, num_layers=5)),
        "wider": said(weights, dataclasses.replace(model, vocab_size=8192)),
        "missing": said(renamed("module.decoder.layers.self_attention.q_layernorm.weight", "optimizer.q"), model),
        "foreign": said(renamed("module.output_layer.weight", "module.output_layer.bias"), model),
    }
    shutil.rmtree(scratch)
    shutil.copytree(weights, scratch)
    for file in scratch.glob("*.distcp"):
        os.truncate(file, file.stat().st_size // 2)
    answers["torn"] = said(scratch, model)
    shutil.rmtree(scratch)
    (Path(folder) / "there").mkdir()
    answers["there"] = said(weights, model, Path(folder) / "there")
    (Path(folder) / "there").rmdir()
    shutil.rmtree(Path(folder) / ".out.partial", ignore_errors=True)  # of the torn one: what an interruption leaves
    answers["left"] = sorted(path.name for path in Path(folder).iterdir())
    return answers


def interrupted(rank: int, world_size: int, *, checkpoint: str, folder: str) -> dict[str, Any]:
    """An export that is killed half-way, in a process of its own, and called again."""
    from apertus_nemo.convert.export import export

    weights, out, model = Path(checkpoint) / "weights", Path(folder), _model()
    partial = out.with_name(f".{out.name}.partial")
    child = os.fork()
    if child == 0:

        def die(done: int, total: int) -> None:
            if done > total // 2:
                os.kill(os.getpid(), 9)

        export(weights, model, out, tokenizer=None, source={}, shard_bytes=500_000, progress=die)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    assert not out.exists()
    before = json.loads((partial / ".done.json").read_text())
    stamps = {name: (partial / name).stat().st_mtime_ns for name in before}
    export(weights, model, out, tokenizer=None, source={}, shard_bytes=500_000)
    kept = [name for name, stamp in stamps.items() if (out / name).stat().st_mtime_ns == stamp]
    return {"before": len(before), "kept": len(kept)}

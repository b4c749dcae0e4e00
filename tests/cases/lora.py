"""Adapters in forked processes: exported, loaded by peft, merged, beside our own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def converted(
    rank: int, world_size: int, *, checkpoint: str, base: str, folder: str, overrides: list[str], note: dict[str, Any]
) -> dict[str, Any]:
    """Export and merge; logits of peft's model, of the merged one and of ours, all of the same tokens."""
    import torch
    from megatron.core import dist_checkpointing
    from peft import PeftModel
    from safetensors import safe_open
    from transformers import ApertusForCausalLM

    from apertus_nemo.convert.initial import fill, weights_in
    from apertus_nemo.convert.merge import merge
    from apertus_nemo.convert.peft_form import export_adapters
    from apertus_nemo.convert.unpickle import forced
    from apertus_nemo.model.adapter import attach
    from apertus_nemo.model.config import build_model
    from apertus_nemo.recipe.compose import compose
    from apertus_nemo.training.strategy import _adapters
    from tests.cases.model import start

    run = compose("tiny_pretrain", overrides).config
    start(rank, world_size, run)
    places = {name: Path(folder) / name for name in ("adapter", "merged", "again")}
    count = export_adapters(Path(checkpoint) / "weights", run, places["adapter"], note=note)
    done = [merge(Path(base), places["adapter"], places[name], like=run.model) for name in ("merged", "again")]
    same = all((places["again"] / file.name).read_bytes() == file.read_bytes() for file in places["merged"].iterdir())

    def theirs(path: Path) -> Any:
        model = ApertusForCausalLM.from_pretrained(path, dtype=torch.float32).eval().float()
        file = next(path.glob("model*.safetensors"))
        with torch.no_grad(), safe_open(file, framework="pt") as tensors:
            for name, parameter in model.named_parameters():
                if "act_fn" in name:  # transformers 4.57 makes them in bf16 whatever it loads
                    parameter.copy_(tensors.get_tensor(name))
        return model

    def weights(chunk: Any, config: Any, **at: Any) -> None:
        fill(chunk, config, weights_in(Path(base), run), **at)

    ours = build_model(run, fill=weights)
    attach(ours, run)
    state = _adapters(ours.sharded_state_dict(prefix="module."))
    with forced():
        loaded = dist_checkpointing.load({"state_dict": state}, str(Path(checkpoint) / "weights"))["state_dict"]
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(loaded[f"module.{name}"])
    tokens = torch.randint(0, run.model.vocab_size, (2, 64), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(64).expand(2, -1)
    with torch.no_grad():
        mine = ours(input_ids=tokens, position_ids=positions, attention_mask=None)
        frozen = theirs(Path(base))(tokens).logits
        tuned = PeftModel.from_pretrained(theirs(Path(base)), places["adapter"]).eval()
        adapted = tuned(tokens).logits
        merged = theirs(places["merged"])(tokens).logits
    mine = mine if mine.shape == adapted.shape else mine.transpose(0, 1)
    return {
        "matrices": count,
        "in_peft": sum("lora_" in name for name, _ in tuned.named_parameters()),
        "digests": [each.weights_digest for each in done],
        "base": done[0].base,
        "same": same,
        "adapted": float((mine - adapted).abs().max()),
        "merged": float((merged - adapted).abs().max()),
        "moved": float((adapted - frozen).abs().max()),
    }

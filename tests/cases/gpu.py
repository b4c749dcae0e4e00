"""What a rank on a GPU computes, beside transformers' model there; run by tests marked `gpu`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def logits(rank: int, world_size: int, *, checkpoint: str, folder: str, overrides: list[str]) -> dict[str, Any]:
    """In bf16: transformers' model of the exported folder, which is made, beside Megatron's of the same checkpoint.

    "same_argmax": share of positions; "close": share of logits within atol 1e-5 / rtol 0.016.
    """
    import torch
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from transformers import ApertusForCausalLM

    from apertus_nemo.convert.export import export
    from apertus_nemo.convert.unpickle import forced
    from apertus_nemo.model.config import build_model
    from apertus_nemo.recipe.compose import compose

    run = compose(overrides=overrides).config
    torch.cuda.set_device(0)
    torch.distributed.init_process_group(
        "nccl", rank=rank, world_size=world_size, init_method=f"file://{os.environ['RENDEZVOUS_FILE']}"
    )
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    weights = Path(checkpoint) / "weights"
    export(weights, run.model, Path(folder), tokenizer=None, source={})
    theirs = ApertusForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
    ours = build_model(run).cuda().eval()
    with forced():
        loaded = dist_checkpointing.load(ours.sharded_state_dict(prefix="module."), str(weights))
    ours.load_state_dict(
        {k.removeprefix("module."): v for k, v in loaded.items() if "_extra_state" not in k}, strict=False
    )
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(4, run.model.vocab_size, (4, run.data.seq_length), generator=generator).cuda()
    with torch.no_grad():
        mine, other = ours(tokens, None, None).float(), theirs(input_ids=tokens).logits.float()
    mine = mine if mine.shape[0] == len(tokens) else mine.transpose(0, 1)
    return {
        "same_argmax": float((mine.argmax(-1) == other.argmax(-1)).float().mean()),
        "close": float(torch.isclose(mine, other, atol=1e-5, rtol=0.016).float().mean()),
    }

"""What device aliasing costs in a step of the tiny model, against the same step without it; pairs in one process.

A step is forward, backward, reduction of gradients and AdEMAMix of `tiny_pretrain`, on Megatron-core. With aliasing,
torch's functions are the replacements of `apertus_nemo.training.device`. Without, they are torch's own, and only
`torch.cuda.current_device` answers "cpu", which the step cannot do without; gradients are not clipped on
either side, since upstream's clipping names the device "cuda" in a string.

    python benchmarks/aliasing.py [--pairs 60]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from figures import Figure, finish

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def build(folder: Path) -> Callable[[], None]:
    """The tiny model and its optimizer on one rank; returns the function that does one step."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.transformer.transformer_config import TransformerConfig

    from apertus_nemo.model.config import build_model, transformer_config_kwargs
    from apertus_nemo.optim.module import build_optimizer
    from apertus_nemo.recipe.compose import compose
    from apertus_nemo.training.assemble import prepare_process

    run = compose("tiny_pretrain", ["optim.clip_grad=0"]).config
    prepare_process(run)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    config = TransformerConfig(**transformer_config_kwargs(run))
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config, ddp, build_model(run, config=config))
    optimizer = build_optimizer([model], run)
    tokens = torch.randint(0, run.model.vocab_size, (2, run.trainer.micro_batch_size, run.data.seq_length + 1))
    positions = torch.arange(run.data.seq_length).expand(run.trainer.micro_batch_size, -1)

    def step() -> None:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        for batch in tokens:
            losses = model(input_ids=batch[:, :-1], position_ids=positions, attention_mask=None, labels=batch[:, 1:])
            (losses.mean() / len(tokens)).backward()
        finalize_model_grads([model])
        optimizer.step()

    return step


def main() -> int:
    """Run and print; 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()

    from apertus_nemo.training import imports

    imports.install()
    import torch

    from apertus_nemo.training.device import alias_cuda, restore

    def timed(step: Callable[[], None]) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        step = build(Path(folder))
        for _ in range(5):
            step()
        pairs = []
        for number in range(options.pairs):
            first = number % 2 == 0  # each side goes first in every other pair
            times = {}
            for aliased in (first, not first):
                if aliased:
                    alias_cuda()
                    times[True] = timed(step)
                else:
                    restore()
                    own, torch.cuda.current_device = torch.cuda.current_device, lambda: torch.device("cpu")
                    times[False] = timed(step)
                    torch.cuda.current_device = own
                    alias_cuda()
            pairs.append((times[True], times[False]))
    ratios = [with_alias / without for with_alias, without in pairs]
    figures = [
        Figure.of("a step with device aliasing", [1e3 * aliased for aliased, _ in pairs], unit="ms"),
        Figure.of("a step with device aliasing over one without", ratios, unit="x", at_most=1.03),
    ]
    return finish(figures, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())

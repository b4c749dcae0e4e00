"""Tokens per second: a training step of ours against one of `transformers`' ApertusForCausalLM.

Same sizes, same precision (float32), same threads, same batches, in one process: after each step of ours, the
peer does a step on the tokens that ours has just read (forward, backward, clipping, AdamW of torch). Ours is the whole
step of a run, through NeMo: data, Megatron, AdEMAMix, step log. Prints the ratio of the times, pair by pair.

    python benchmarks/throughput.py [--steps 40] [--threads 1]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from figures import Figure, finish

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def peer_model(run: Any) -> Any:
    """ApertusForCausalLM of the recipe's sizes, in float32."""
    from transformers import ApertusConfig, ApertusForCausalLM

    model = run.model
    config = ApertusConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        max_position_embeddings=model.max_position_embeddings,
        tie_word_embeddings=False,
    )
    return ApertusForCausalLM(config).float().train()


def main() -> int:
    """Run and print; 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    from apertus_nemo.training import imports

    imports.install()
    import lightning.pytorch as pl
    import torch

    from apertus_nemo.data.corpus import embedded
    from apertus_nemo.launch.local import default_cache
    from apertus_nemo.recipe.compose import compose
    from apertus_nemo.record.run_dir import RunDirectory
    from apertus_nemo.training.assemble import prepare_process
    from apertus_nemo.training.progress import Progress
    from apertus_nemo.training.recorder import Recorder
    from apertus_nemo.training.run import Place, train

    overrides = [
        f"trainer.max_steps={options.steps}",
        "schedule.batch_ramp=[]",
        f"schedule.train_samples={8 * options.steps}",
        "schedule.warmup_samples=8",
        "schedule.decay_samples=8",
        f"reproducibility.threads_per_rank={options.threads}",
    ]
    run = compose("tiny_pretrain", overrides).config
    prepare_process(run)
    torch.use_deterministic_algorithms(False)
    peer = peer_model(run)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-3)
    torch.use_deterministic_algorithms(True)
    ours: list[float] = []
    theirs: list[float] = []
    seen: list[Any] = []

    class Pairs(pl.Callback):
        """Times our step by its end, and lets the peer do the same batch."""

        begun = 0.0

        def on_train_start(self, *_: Any) -> None:
            self.begun = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            ours.append(time.perf_counter() - self.begun)
            torch.use_deterministic_algorithms(False)
            start = time.perf_counter()
            count = len(seen)
            for batch in seen:
                peer(input_ids=batch["tokens"], labels=batch["tokens"]).loss.div(count).backward()
            torch.nn.utils.clip_grad_norm_(peer.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            theirs.append(time.perf_counter() - start)
            torch.use_deterministic_algorithms(True)
            seen.clear()
            self.begun = time.perf_counter()

    import apertus_nemo.training.module as module

    original = module.ApertusModule.data_step

    def data_step(self: Any, batches: Any) -> Any:
        batch = original(self, batches)
        seen.append(batch)
        return batch

    module.ApertusModule.data_step = data_step  # type: ignore[method-assign]
    assert Recorder  # the record is written, as in any run
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(Path(folder))
        for name in (directory.steps, directory.states, directory.attempt(0), directory.checkpoints):
            name.mkdir(parents=True)
        cache = default_cache(os.environ)
        place = Place(
            0, 0, 0, embedded(cache / "corpus", 4096), Path(folder) / "index", rendezvous=Path(folder) / "rendezvous"
        )
        train(run, directory, lock_digest="0" * 64, place=place, progress=Progress(None), callbacks=[Pairs()])
    skip = 5  # the first steps allocate; the last saves a checkpoint
    ratios = [theirs[i] / ours[i] for i in range(skip, len(ours) - 1)]
    tokens, title = 8 * run.data.seq_length, f"tokens/s, float32, {options.threads} thread"
    figures = [
        Figure.of(f"{title}: ours", [tokens / seconds for seconds in ours[skip:-1]], unit="tokens/s"),
        Figure.of(f"{title}: ApertusForCausalLM", [tokens / seconds for seconds in theirs[skip:-1]], unit="tokens/s"),
        Figure.of(f"{title}: ours over ApertusForCausalLM", ratios, unit="x", at_least=1.0),
    ]
    return finish(figures, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())

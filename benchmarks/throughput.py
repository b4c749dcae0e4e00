"""Tokens per second: a training step of ours against one of `transformers`' ApertusForCausalLM.

Same sizes, same precision (float32), same threads, same batches, in one process: after each step of ours, the
peer does a step on the tokens that ours has just read (forward, backward, clipping, AdamW of torch). Ours is the whole
step of a run, through NeMo: data, Megatron, AdEMAMix, step log. Prints the ratio of the times, pair by pair.

Pre-training (`tiny_pretrain`) and fine-tuning (`tiny_sft`), each in a process of its own. In fine-tuning the peer's
labels are -100 where the loss does not look; tokens are positions, padding included, which both compute.

    python benchmarks/throughput.py [--recipe tiny_pretrain] [--steps 40] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
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


# What keeps the batch as it is, and the learning rate from 0, whatever the number of steps
RECIPES = {
    "tiny_pretrain": ["schedule.batch_ramp=[]", "schedule.warmup_samples=8", "schedule.decay_samples=8"],
    "tiny_sft": ["schedule.warmup_samples=16", "schedule.decay_samples=16"],
}


def labels_of(batch: Any) -> Any:
    """The labels of a batch as the peer takes them, which moves them by one itself: -100 where no loss is."""
    labels = batch["tokens"].clone()
    labels[:, 1:][batch["loss_mask"][:, :-1] == 0] = -100
    labels[:, 0] = -100
    return labels


def main() -> int:
    """Run and print; 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, help="one alone (default: one after the other)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    if options.recipe is None:
        return finish([figure for recipe in RECIPES for figure in alone(recipe, options)], as_json=options.json)
    return finish(measured(options.recipe, options.steps, options.threads), as_json=options.json)


def alone(recipe: str, options: argparse.Namespace) -> list[Figure]:
    """The figures of a recipe, measured in a process of its own."""
    given = ["--recipe", recipe, "--steps", str(options.steps), "--threads", str(options.threads), "--json"]
    done = subprocess.run([sys.executable, __file__, *given], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 1):
        sys.exit(done.returncode)
    return [Figure(**figure) for figure in json.loads(done.stdout)]


def measured(recipe: str, steps: int, threads: int) -> list[Figure]:
    """Train `steps` steps of the recipe beside the peer: tokens/s of both, and the ratio of each pair."""
    from apertus_nemo.training import imports

    imports.install()
    import lightning.pytorch as pl
    import torch

    from apertus_nemo.data.corpus import embedded, embedded_chat
    from apertus_nemo.launch.local import default_cache
    from apertus_nemo.recipe.compose import compose
    from apertus_nemo.record.run_dir import RunDirectory
    from apertus_nemo.training.assemble import prepare_process
    from apertus_nemo.training.progress import Progress
    from apertus_nemo.training.recorder import Recorder
    from apertus_nemo.training.run import Place, train

    batch_size = compose(recipe).config.trainer.global_batch_size
    overrides = [
        f"trainer.max_steps={steps}",
        f"schedule.train_samples={batch_size * steps}",
        f"reproducibility.threads_per_rank={threads}",
        *RECIPES[recipe],
    ]
    run = compose(recipe, overrides).config
    chats = run.data.kind == "chat"
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
            given = [(batch["tokens"], labels_of(batch) if chats else batch["tokens"]) for batch in seen]
            torch.use_deterministic_algorithms(False)
            start = time.perf_counter()
            for tokens, labels in given:
                peer(input_ids=tokens, labels=labels).loss.div(len(given)).backward()
            torch.nn.utils.clip_grad_norm_(peer.parameters(), run.optim.clip_grad)
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
        corpus = (embedded_chat if chats else embedded)(default_cache(os.environ) / "corpus", 4096)
        place = Place(0, 0, 0, corpus, Path(folder) / "index", rendezvous=Path(folder) / "rendezvous")
        train(run, directory, lock_digest="0" * 64, place=place, progress=Progress(None), callbacks=[Pairs()])
    skip = 5  # the first steps allocate; the last saves a checkpoint
    ratios = [theirs[i] / ours[i] for i in range(skip, len(ours) - 1)]
    tokens = batch_size * run.data.seq_length
    title = f"tokens/s, {recipe}, float32, {threads} thread"
    return [
        Figure.of(f"{title}: ours", [tokens / seconds for seconds in ours[skip:-1]], unit="tokens/s"),
        Figure.of(f"{title}: ApertusForCausalLM", [tokens / seconds for seconds in theirs[skip:-1]], unit="tokens/s"),
        Figure.of(f"{title}: ours over ApertusForCausalLM", ratios, unit="x", at_least=1.0),
    ]


if __name__ == "__main__":
    sys.exit(main())

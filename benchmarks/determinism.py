"""What determinism costs on one GPU: a step at `reproducibility=bitwise` over one at `relaxed`; cold runs in turn.

`tiny_pretrain` widened (`--hidden`, `--layers`) and in bf16, by `apertus-nemo train`; tokens per second of each run as
`apertus-nemo runs` has them. Without a GPU there is nothing to measure, which is said on stderr.

    python benchmarks/determinism.py [--pairs 5] [--steps 60] [--hidden 2048] [--layers 16]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from figures import Figure, finish

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-m", "apertus_nemo.cli.main"]


def tokens_per_s(folder: Path, name: str, overrides: list[str]) -> float:
    """Train a run; its throughput."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = ["train", "-q", "--allow-dirty", "--run-dir", name, *overrides]
    subprocess.run([*COMMAND, *words], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    done = subprocess.run(
        [*COMMAND, "runs", name, "--json"], cwd=folder, env=environment, check=True, stdout=subprocess.PIPE
    )
    tree = json.loads(done.stdout)
    [row] = tree["runs"] if isinstance(tree, dict) else tree
    return float(row["tokens_per_second"])


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    if subprocess.run(found, check=False).returncode:
        print("there is no GPU here: nothing to measure", file=sys.stderr)
        return finish([], as_json=options.json)
    overrides = [
        *("trainer=gpu", "trainer.devices=1", f"model.hidden_size={options.hidden}"),
        *(f"model.num_layers={options.layers}", f"model.ffn_hidden_size={4 * options.hidden}"),
        *(f"model.num_attention_heads={options.hidden // 64}", "model.head_dim=64"),
        *(f"trainer.max_steps={options.steps}", "trainer.checkpoint_every_steps=100000", "schedule.batch_ramp=[]"),
    ]
    rates: dict[str, list[float]] = {"bitwise": [], "relaxed": []}
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(options.pairs):
            for level, values in rates.items():
                name = f"{level}-{pair}"
                values.append(tokens_per_s(Path(folder), name, [*overrides, f"reproducibility={level}"]))
    ratios = [fast / slow for slow, fast in zip(rates["bitwise"], rates["relaxed"], strict=True)]
    figures = [
        Figure.of(f"tokens/s at {level}, bf16, one GPU", values, unit="tokens/s") for level, values in rates.items()
    ]
    figures.append(Figure.of("a step at bitwise over one at relaxed, bf16, one GPU", ratios, unit="x"))
    return finish(figures, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())

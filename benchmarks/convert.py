"""What it costs to bring a checkpoint into Hugging Face's form and back, over copying the same bytes on the same disk.

    python benchmarks/convert.py [--rounds 3] [--layers 4] [--folder DIR]

Makes a folder in the published form, of random bf16 weights: the 8B model's widths and vocabulary with fewer layers, of
which the embedding, of 1 GiB, is the largest tensor. Then by turns, each a process of its own: `convert import`,
`convert export` of what that made, and a copy of the folder's files that is synced, as the conversions are. Both hash
what they read and what they write; import digests the weights. Prints the ratios of each round, and the peak memory
(the kernel's high-water mark) above the largest tensor. Goals: a ratio of at most 2; at most 1,024 MiB. The folders
are removed at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import Figure, finish

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apertus_nemo.model.layout import parameter_count, published_shapes  # noqa: E402
from apertus_nemo.recipe.compose import compose  # noqa: E402
from apertus_nemo.recipe.hf_config import to_hf  # noqa: E402
from apertus_nemo.recipe.schema import ModelConfig  # noqa: E402

RATIO_GOAL, MEMORY_GOAL_MIB = 2.0, 1024.0
COMMAND = "import sys; from apertus_nemo.cli.main import main; sys.exit(main(sys.argv[1:]))"
_COPY_BYTES = 2**24
_FILE_BYTES = 10**9


def model_of(layers: int, scale: int) -> ModelConfig:
    """The 8B model with fewer layers; its widths and vocabulary divided by `scale`."""
    model = compose(overrides=["model=apertus_8b"]).config.model
    return dataclasses.replace(
        model,
        num_layers=layers,
        vocab_size=model.vocab_size // scale,
        hidden_size=model.hidden_size // scale,
        ffn_hidden_size=model.ffn_hidden_size // scale,
        head_dim=model.head_dim // scale,
    )


def make(folder: Path, model: ModelConfig) -> None:
    """Random weights in files of about a gigabyte, and what else is in a published folder."""
    import torch

    from apertus_nemo.convert.safetensors import Entry, ShardWriter, size_bytes

    folder.mkdir(parents=True)
    shapes = dict(published_shapes(model))
    constants = {
        f"model.layers.{layer}.mlp.act_fn.{name}": () for layer in range(model.num_layers) for name in ("beta", "eps")
    }
    groups: list[dict[str, Entry]] = [{}]
    for name, shape in sorted({**shapes, **constants}.items()):
        if sum(map(size_bytes, groups[-1].values())) > _FILE_BYTES:
            groups.append({})
        groups[-1][name] = ("BF16", shape)
    coin = torch.Generator().manual_seed(1)
    noise = torch.randn(2**24, generator=coin).to(torch.bfloat16)
    places = {}
    for number, entries in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        with ShardWriter(folder / file, entries) as shard:
            for name, entry in entries.items():
                places[name] = file
                left = size_bytes(entry) // 2
                if name in constants:
                    value = model.xielu_beta if name.endswith("beta") else model.xielu_eps
                    shard.write(name, torch.tensor([value], dtype=torch.bfloat16))
                    continue
                while left:
                    part = noise[:left]
                    shard.write(name, part)
                    left -= part.numel()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    tokens: dict[str, int | None] = {"bos": 1, "eos": 2, "pad": 3}
    (folder / "config.json").write_text(json.dumps(to_hf(model, dtype="torch.bfloat16", tokens=tokens)))


def copied(source: Path, target: Path) -> float:
    """Seconds of a copy of all files, in blocks, synced."""
    target.mkdir()
    begun = time.perf_counter()
    buffer = memoryview(bytearray(_COPY_BYTES))
    for file in sorted(source.iterdir()):
        with file.open("rb", buffering=0) as stream, (target / file.name).open("wb", buffering=0) as out:
            while count := stream.readinto(buffer):
                out.write(buffer[:count])
            os.fsync(out.fileno())
    return time.perf_counter() - begun


def converted(*arguments: str) -> tuple[float, float, float]:
    """(seconds, seconds of processors, peak MiB) of a command, from its start to its end."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "convert", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    if status:
        raise SystemExit(f"convert {arguments[0]} failed")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> int:
    """Exit code: 0 goals met, 1 one is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--scale", type=int, default=1, help="divides widths and vocabulary")
    parser.add_argument("--folder", type=Path, help="of the disk (default: that of temporary files)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = model_of(options.layers, options.scale)
    largest_mib = model.vocab_size * model.hidden_size * 2 / 2**20
    gib = parameter_count(model) * 2 / 2**30
    ratios: dict[str, list[float]] = {"import": [], "export": []}
    peaks: dict[str, list[float]] = {"import": [], "export": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        place = Path(name)
        hf, megatron, back, copy = (place / each for each in ("hf", "megatron", "back", "copy"))
        make(hf, model)
        for round_ in range(options.rounds):
            for verb, source, target in (("import", hf, megatron), ("export", megatron, back)):
                seconds = copied(hf, copy)
                shutil.rmtree(copy)
                took, processors, peak = converted(verb, str(source), str(target))
                ratios[verb].append(took / seconds)
                peaks[verb].append(peak - largest_mib)
                spent = f"{took:.2f} s, of processors {processors:.2f} s, {peak:.0f} MiB"
                print(f"{round_}: copy {seconds:.2f} s, {verb} {spent}", file=sys.stderr)
            shutil.rmtree(megatron)
            shutil.rmtree(back)
    figures = []
    for verb in ("import", "export"):
        what = f"convert {verb}, {gib:.1f} GiB of bf16"
        figures.append(Figure.of(f"{what}, over copying the bytes", ratios[verb], unit="x", at_most=RATIO_GOAL))
        memory = Figure.of(f"{what}, memory above the largest tensor", peaks[verb], unit="MiB", at_most=MEMORY_GOAL_MIB)
        figures.append(memory)
    return finish(figures, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())

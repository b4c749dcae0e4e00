"""Recipes of the published pre-training runs' sizes, with data that are not there."""

from __future__ import annotations

from pathlib import Path

PUBLISHED = """\
# @package _global_
defaults:
  - /model: apertus_{size}
  - /data: built
  - /optim: ademamix_apertus_{size}
  - /schedule: wsd
  - /trainer: gpu
  - /parallel: apertus_{size}
  - /reproducibility: bitwise
  - /cluster: local
  - /image: host
  - _self_
name: {name}
data: {{path: nowhere, seq_length: 4096}}
cluster: {{kind: slurm}}
schedule:
  train_samples: 3662109375
  warmup_samples: 4096000
  decay_samples: 403905806
  batch_ramp: [{{from_sample: {doubled_at}, global_batch_size: {after}}}]
trainer: {{devices: 4, num_nodes: {nodes}, micro_batch_size: {micro}, global_batch_size: {before}}}
"""


def write(folder: Path) -> Path:
    """`published_8b` and `published_70b`, in a folder for --recipes."""
    sizes = {
        "8b": {"doubled_at": 1_718_272_000, "before": 1024, "after": 2048, "nodes": 128, "micro": 4},
        "70b": {"doubled_at": 1_072_164_864, "before": 2048, "after": 4096, "nodes": 1024, "micro": 1},
    }
    (folder / "recipe").mkdir(parents=True)
    for size, values in sizes.items():
        text = PUBLISHED.format(size=size, name=f"published_{size}", **values)
        (folder / "recipe" / f"published_{size}.yaml").write_text(text)
    return folder

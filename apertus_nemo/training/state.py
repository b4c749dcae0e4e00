"""The logical tensors of a run's state, from every rank's shards, as lanes of the state digest.

Weights have the published names; each optimizer state is a kind of its own under the same name. A shard
of the distributed optimizer is a flat range of a local parameter, so its lanes add up with those of the
other data-parallel ranks; see `docs/state-digest.md`.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from megatron.core import parallel_state

from apertus_nemo.model.layout import pieces, published_shapes
from apertus_nemo.optim.module import logical_states
from apertus_nemo.recipe.schema import RunConfig

"""Imports what every rank needs and none of our own modules: the slow part of a start, in one place."""

from __future__ import annotations

import megatron.core.dist_checkpointing
import megatron.core.models.gpt.gpt_model
import megatron.core.optimizer  # noqa: F401
import nemo.lightning  # noqa: F401

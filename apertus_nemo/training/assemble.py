"""Assembles NeMo's trainer, strategy, model and data from a resolved recipe."""

from __future__ import annotations

import nemo.lightning  # noqa: F401

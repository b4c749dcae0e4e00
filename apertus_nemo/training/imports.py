"""Keep NeMo's optional imports out of training; see `install`."""

from __future__ import annotations


def install() -> None:
    """Refuse the optional modules that training does not use."""

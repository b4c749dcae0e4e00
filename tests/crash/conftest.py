"""The corpus and the undisturbed runs of the integration tests."""

from __future__ import annotations

from tests.integration.conftest import cache, corpus, runs

__all__ = ["cache", "corpus", "runs"]

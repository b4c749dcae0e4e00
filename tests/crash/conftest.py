"""The corpus and the undisturbed runs of the integration tests."""

from __future__ import annotations

from tests.integration.conftest import cache, corpus, runs
from tests.unit.image.conftest import registry

__all__ = ["cache", "corpus", "registry", "runs"]

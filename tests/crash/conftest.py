"""The corpus and the undisturbed runs of the integration tests."""

from __future__ import annotations

from tests.integration.conftest import cache, chats, corpus, runs, tuned
from tests.unit.image.conftest import registry

__all__ = ["cache", "chats", "corpus", "registry", "runs", "tuned"]

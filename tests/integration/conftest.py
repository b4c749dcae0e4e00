"""A corpus and short runs, each made once a session and only where a test asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apertus_nemo.data.corpus import embedded, embedded_chat
from apertus_nemo.testing.ranks import Parent
from tests.integration import images
from tests.integration.runs import CHAT, Run, Runs


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder of the session's runs; APERTUS_TEST_CACHE names one that outlives it."""
    given = os.environ.get("APERTUS_TEST_CACHE")
    return Path(given) if given else tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def corpus(cache: Path) -> Path:
    """The embedded corpus."""
    return embedded(cache / "apertus-nemo" / "corpus", 4096)


@pytest.fixture(scope="session")
def runs(parent: Parent, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """`runs(layout, ...)`: a short run, from memory if there was the same one in this session."""
    return Runs(parent, corpus, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def image_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean checkout in git of the tree as it is, to build images from."""
    return images.commit(tmp_path_factory.mktemp("checkout") / "apertus-nemo")


@pytest.fixture(scope="session")
def built_cpu_image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of the whole cpu image for this machine, as `image build` makes it; minutes, once a session.

    Skips where its packages were not fetched. APERTUS_TEST_IMAGE names a layout that is taken instead.
    """
    given = os.environ.get("APERTUS_TEST_IMAGE")
    if given:
        return Path(given)
    images.needs_packages("cpu")
    checkout = request.getfixturevalue("image_checkout")
    output = tmp_path_factory.mktemp("image") / "cpu"
    images.build(checkout, output, "cpu")
    return output


@pytest.fixture(scope="session")
def chats(cache: Path) -> Path:
    """The embedded conversations."""
    return embedded_chat(cache / "apertus-nemo" / "corpus", 4096)


@pytest.fixture(scope="session")
def tuned(parent: Parent, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """`tuned(layout, ...)`: a short run on the embedded conversations, once a session as `runs`."""
    runs = Runs(parent, chats, tmp_path_factory.mktemp("tuned"))

    def call(layout: str, *overrides: str, **options: Any) -> Run:
        return runs(layout, *CHAT, *overrides, **options)

    return call

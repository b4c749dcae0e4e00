"""What a version of an image is pinned to; unknown until it was built and published."""

from __future__ import annotations

from apertus_nemo.errors import UnfitEnvironment


def pin_of(image: str) -> str:
    """The reference by digest of a published image. Raises UnfitEnvironment for one that was never built."""
    family = image.rpartition("-")[0]
    raise UnfitEnvironment(
        f"{image} is unbuilt, so there is no digest to pin: build and publish it (apertus-nemo image build {family}), "
        f"pin an image of your own with --image, or render the settings alone: apertus-nemo edf render {family} ..."
    )

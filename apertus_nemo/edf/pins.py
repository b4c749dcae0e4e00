"""What a version of an image is pinned to: the digest of its release; nothing until it was built and published."""

from __future__ import annotations

from pathlib import Path

from apertus_nemo.edf.sites import PLATFORMS, Site
from apertus_nemo.errors import InputError, UnfitEnvironment
from apertus_nemo.image.families import find
from apertus_nemo.image.reference import Reference


def pin_of(image: str, site: Site, folder: Path | None = None) -> str:
    """REFERENCE@sha256:... of a published image, for the site's processor; `folder` is another `containers/`.

    Raises UnfitEnvironment for an image that is unbuilt, InputError for a version that there is not, or where the
    site leaves the processor open and there are several.
    """
    found = find(image, folder)
    if not found.releases:
        raise UnfitEnvironment(
            f"{found.name} is unbuilt, so there is no digest to pin: build and publish it (apertus-nemo image build "
            f"{found.family}), pin an image of your own with --image, or render the settings alone: apertus-nemo edf "
            f"render {found.family} ..."
        )
    there = sorted(found.releases)
    platform = PLATFORMS.get(site.architecture, there[0])
    if platform not in found.releases:
        raise UnfitEnvironment(
            f"{found.name} was not published for {platform}, which {site.name} has; pin one with --image"
        )
    if not site.architecture and len(there) > 1:
        raise InputError(
            f"{found.name} is published for {' and '.join(there)}, and {site.name} may be any: give --image"
        )
    release = found.releases[platform]
    reference = Reference.parse(release.reference).pinned(release.manifest_digest)
    return f"{reference.registry}/{reference.repository}@{release.manifest_digest}"

"""The bill of materials that an image carries: CycloneDX 1.6, every package with version, hash and package URL.

    data = bill_of_materials(lock, "linux/amd64", wheel, definition)

The same packages give the same bytes: its time is the definition's, and its number follows from what it lists. Written
with cyclonedx-python-lib, of the option `images`.
"""

from __future__ import annotations

import datetime
import uuid
from typing import TYPE_CHECKING

from apertus_nemo.errors import UnfitEnvironment
from apertus_nemo.image.definition import Definition
from apertus_nemo.image.lock import ImageLock
from apertus_nemo.image.wheel import OwnWheel

if TYPE_CHECKING:
    from cyclonedx.model.component import Component

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "image.apertus.ai")


def bill_of_materials(lock: ImageLock, platform: str, wheel: OwnWheel, definition: Definition) -> bytes:
    """JSON. What a base that is an image brings with it is not listed: only its own maker knows it."""
    try:
        from cyclonedx.model.bom import Bom
        from cyclonedx.model.component import Component, ComponentType
        from cyclonedx.output import make_outputter
        from cyclonedx.schema import OutputFormat, SchemaVersion
    except ImportError as error:
        raise UnfitEnvironment(
            f"the bill of materials of an image wants a package that is missing ({error}): "
            "in a checkout type scripts/quickstart --setup-only --tools, else install apertus-nemo[images]"
        ) from error

    image = Component(
        type=ComponentType.CONTAINER, name=lock.name, version=definition.version, bom_ref=f"{lock.name}@{platform}"
    )
    base, release = lock.tree["base"], definition.base.release
    parts = [
        _component(
            one.name,
            one.version,
            one.sha256,
            "deb",
            namespace="debian",
            qualifiers={"arch": one.architecture, "distro": f"debian-{release}"},
        )
        for one in lock.debian(platform)
    ]
    parts += [_component(one.name, one.version, one.sha256, "pypi") for one in lock.python(platform)]
    parts.append(_component("apertus-nemo", wheel.version, wheel.sha256, "pypi"))
    if base["kind"] == "image":
        name, digest = base["reference"].rpartition(":")[0], lock.tree["platforms"][platform]["base"]["manifest_digest"]
        parts.append(Component(type=ComponentType.CONTAINER, name=name, version=digest, bom_ref=f"{name}@{digest}"))
    bom = Bom(
        components=parts,
        serial_number=uuid.uuid5(_NAMESPACE, f"{lock.digest} {platform} {wheel.sha256}"),
    )
    bom.metadata.timestamp = datetime.datetime.fromtimestamp(definition.epoch, datetime.UTC)
    bom.metadata.component = image
    bom.register_dependency(image, parts)
    text = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=1)
    return f"{text}\n".encode()


def _component(
    name: str,
    version: str,
    sha256: str,
    kind: str,
    *,
    namespace: str | None = None,
    qualifiers: dict[str, str] | None = None,
) -> Component:
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    purl = PackageURL(kind, namespace, name, version, qualifiers)
    return Component(
        type=ComponentType.LIBRARY,
        name=name,
        version=version,
        purl=purl,
        bom_ref=purl.to_string(),
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256)],
    )

"""References to images: which registry, which repository, and a tag or a digest.

    reference = Reference.parse("nvcr.io/nvidia/pytorch:25.11-py3@sha256:417c...")
    reference.registry, reference.repository, reference.tag, reference.digest
    str(reference), reference.enroot()

The grammar is that of the distribution project (github.com/distribution/reference). A registry is always named: what a
short name means differs between tools and machines. `docker://` before a reference, and Enroot's `HOST#NAME`, are read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from apertus_nemo.errors import InputError

MAX_LENGTH = 255  # characters of registry and repository together; the specification of distribution

_LABEL = r"(?:[A-Za-z0-9]|[A-Za-z0-9][A-Za-z0-9-]*[A-Za-z0-9])"
_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:]+\])(?::[0-9]{{1,5}})?\Z")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*\Z")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_LOOPBACK = re.compile(r"(?:localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])(?::[0-9]+)?\Z")


def is_image_digest(text: object) -> bool:
    """Whether `text` is "sha256:" and 64 lower-case hex digits."""
    return isinstance(text, str) and _DIGEST.match(text) is not None


def checked_digest(text: object, *, what: str) -> str:
    """`text` if it is a digest that we can check; raises InputError, beginning with `what`, otherwise."""
    if is_image_digest(text):
        return str(text)
    if isinstance(text, str) and re.match(r"[a-z0-9]+(?:[.+_-][a-z0-9]+)*:[A-Za-z0-9=_-]+\Z", text):
        raise InputError(f"{what}: the digest {text[:80]!r} is not sha256 with 64 lower-case hex digits")
    raise InputError(f"{what}: {str(text)[:80]!r} is not a digest: it must be sha256: and 64 lower-case hex digits")


@dataclass(frozen=True)
class Reference:
    """An image in a registry. Where it has a tag and a digest, the digest decides."""

    registry: str  # host, perhaps with a port
    repository: str
    tag: str | None = None
    digest: str | None = None  # "sha256:<64 hex digits>"

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read a reference; without tag and digest the tag is `latest`. Raises InputError for anything else."""
        rest = text.removeprefix("docker://")
        if not rest or len(rest) > 1024 or not rest.isascii() or not rest.isprintable():
            raise InputError(
                f"{text[:100]!r} is not a reference to an image: write HOST/NAME:TAG or HOST/NAME@sha256:..."
            )
        rest, at, digest = rest.partition("@")
        pinned = checked_digest(digest, what=f"image {text}") if at else None
        if "#" in rest:
            registry, _, rest = rest.partition("#")
        else:
            registry, slash, rest = rest.partition("/")
            if not slash or not ("." in registry or ":" in registry or registry == "localhost"):
                raise InputError(_no_registry(text))
        repository, colon, tag = rest.partition(":")
        if not _REGISTRY.match(registry):
            raise InputError(f"image {text}: {registry!r} is not the host of a registry")
        if not _REPOSITORY.match(repository):
            raise InputError(
                f"image {text}: {repository!r} is not a repository: lower-case letters and digits, . _ - / between"
            )
        if len(registry) + 1 + len(repository) > MAX_LENGTH:
            raise InputError(f"image {text[:60]}...: registry and repository have more than {MAX_LENGTH} characters")
        if colon and not _TAG.match(tag):
            raise InputError(f"image {text}: {tag!r} is not a tag: at most 128 letters, digits, and . _ -")
        return cls(registry, repository, tag if colon else None if pinned else "latest", pinned)

    def __str__(self) -> str:
        return (
            f"{self.registry}/{self.repository}"
            + (f":{self.tag}" if self.tag else "")
            + (f"@{self.digest}" if self.digest else "")
        )

    def enroot(self) -> str:
        """As Enroot writes it ("nvcr.io#nvidia/pytorch:25.11-py3"); a digest alone where there is one."""
        end = f"@{self.digest}" if self.digest else f":{self.tag}"
        return f"{self.registry}#{self.repository}{end}"

    @property
    def name(self) -> str:
        """What the registry is asked for: the digest, or the tag."""
        return self.digest or self.tag or "latest"

    @property
    def is_loopback(self) -> bool:
        """Whether the registry is on this machine: the one place that is reached without TLS unasked."""
        return _LOOPBACK.match(self.registry) is not None

    def pinned(self, digest: str) -> Reference:
        """The same with this digest."""
        return replace(self, digest=checked_digest(digest, what=f"image {self}"))


def _no_registry(text: str) -> str:
    rest = text.removeprefix("docker://")
    path = rest if "/" in rest else f"library/{rest}"
    return f"image {text}: the registry is not named; write for example docker.io/{path}"

"""URLs of fsspec: told from paths, and shown without what is secret in them."""

from __future__ import annotations

import re

_LINK = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?:::|://)")


def is_url(text: str) -> bool:
    """Whether `text` is an fsspec URL (`s3://bucket/a`, `file:///a`, a chain `a::b`) and not a path."""
    return _URL.match(text) is not None


def local_path(url: str) -> str | None:
    """The path that a `file://` or `local://` URL names; None for other URLs."""
    match = re.match(r"(?:file|local)://(?:localhost(?=/))?", url, re.IGNORECASE)
    return url[match.end() :] if match and "::" not in url else None


def without_credentials(path: str) -> str:
    """A path or URL without user, password, query and fragment; each link of an fsspec chain (`a::b`) alike."""
    links = []
    for link in path.split("::"):
        if _LINK.match(link):
            link = re.sub(r"[?#].*", "", link, flags=re.DOTALL)
            scheme, slashes, rest = link.partition("://")
            if slashes:
                # A secret with "/" in it is no valid URL, yet people write it.
                rest = re.sub(r"^[^/@:]*:(?!\d+/)[^@]*@", "", rest)
                host, slash, tail = rest.partition("/")
                link = scheme + slashes + host.rpartition("@")[2] + slash + tail
        links.append(link)
    return "::".join(links)

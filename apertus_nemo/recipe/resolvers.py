"""Which `${...}` a recipe may use: references to its own keys, and OmegaConf's harmless functions.

A recipe must say the same on every machine and on every day. So the shell's environment (`oc.env`), the
clock (`now`), Hydra's state (`hydra`), the Python version and whatever other code has registered do not exist
while a recipe is resolved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from omegaconf.basecontainer import BaseContainer

HARMLESS = ("oc.create", "oc.decode", "oc.dict.keys", "oc.dict.values", "oc.select")


@contextmanager
def only_harmless_resolvers() -> Iterator[None]:
    """For the time of the `with`, OmegaConf knows no other resolver than those of HARMLESS."""
    everything = BaseContainer._resolvers
    BaseContainer._resolvers = {name: everything[name] for name in HARMLESS}
    try:
        yield
    finally:
        BaseContainer._resolvers = everything

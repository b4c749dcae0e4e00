"""Keep optional imports out of training: a start of NeMo is mostly the import of what training never uses.

`install()` puts a finder in front of Python's own that raises `ModuleNotFoundError` for the pairs in
`GUARDED`: this module, asked for by this importer. Every importer listed there treats the absence of
the module as an option that is not installed, so nothing is faked and nothing is replaced; any other
importer still gets the module. Everything that training does need fails loudly, as without the hook.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# (module, end of the importing file's path): what the module would be used for there.
GUARDED: dict[tuple[str, str], str] = {
    ("scipy", "lightning_utilities/core/imports.py"): "torchmetrics' audio and signal metrics",
    ("pandas", "sklearn/utils/fixes.py"): "data frames as input of scikit-learn",
    ("wandb", "megatron/core/timers.py"): "timers on Weights & Biases; loggers.py imports it if asked to",
    ("webdataset", "nemo/utils/__init__.py"): "shards of web datasets; Megatron reads .bin and .idx",
    ("transformers.models.llama.tokenization_llama", "nemo/lightning/io/registry.py"): "NeMo's context/ folder",
}

# Pairs that were refused in this process.
refused: set[tuple[str, str]] = set()

_MODULES = frozenset(module for module, _ in GUARDED)


class _Guard(MetaPathFinder):
    """Refuses the modules of `GUARDED` to the importers of `GUARDED`; finds nothing itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None (let the next finder answer), or ModuleNotFoundError for a guarded pair."""
        if fullname in _MODULES:
            frame = sys._getframe(1)
            while frame is not None and "importlib" in frame.f_code.co_filename:
                frame = frame.f_back  # type: ignore[assignment]
            importer = frame.f_code.co_filename.replace("\\", "/") if frame is not None else ""
            for (module, end), reason in GUARDED.items():
                if module == fullname and importer.endswith(end):
                    refused.add((module, end))
                    raise ModuleNotFoundError(f"No module named {fullname!r} (not used here: {reason})", name=fullname)
        return None


def install() -> None:
    """Install the finder once; call it before anything imports torch or NeMo."""
    if not any(isinstance(finder, _Guard) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Guard())

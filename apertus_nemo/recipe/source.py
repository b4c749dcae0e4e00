"""Hydra's view of folders of recipes: a config source that reads data only, and a loader that remembers.

Built from Hydra's own parts (search path, config loader), but without its plugin scan: an installed plugin could
add folders to the search path, and what a recipe means may not depend on that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.core_plugins import basic_launcher, basic_sweeper  # noqa: F401  (register their configs)
from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource
from hydra._internal.core_plugins.structured_config_source import StructuredConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from apertus_nemo.errors import InputError
from apertus_nemo.recipe import typed
from apertus_nemo.recipe.locate import packaged_recipes
from apertus_nemo.recipe.text import read_recipe, where_not_yaml

# The primary config: the schema's defaults, with the recipe on top.
PRIMARY = "apertus_nemo_schema"
SCHEMA = "default of the schema"
GROUPS = (
    "adapter",
    "cluster",
    "data",
    "image",
    "model",
    "optim",
    "parallel",
    "recipe",
    "reproducibility",
    "schedule",
    "trainer",
)


class RecipeSource(ConfigSource):
    """A folder laid out like recipes/; `provider` is the name by which messages call it."""

    @staticmethod
    def scheme() -> str:
        return "recipes"

    def _path(self, config_path: str) -> Path | None:
        """The place below the folder, or None where the name would leave it."""
        if "\0" in config_path:
            return None
        if os.path.isabs(config_path) or ".." in config_path.split("/"):
            return None
        return Path(self.path) / config_path

    def load_config(self, config_path: str) -> ConfigResult:
        name = self._normalize_file_name(config_path)
        path, label = self._path(name), f"{self.provider}/{name}"
        assert path is not None  # Hydra has asked is_config
        text = read_recipe(path, label)
        try:
            header = self._get_header_dict(text[:512])
            config = OmegaConf.create(text)
        except yaml.MarkedYAMLError as error:
            raise InputError(where_not_yaml(label, error)) from None
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
            why = str(error).splitlines()[0]
            if "integer string conversion" in why:  # Python's advice is for programmers
                why = "an integer of thousands of digits, which no recipe needs"
            raise InputError(f"{label}: {why}") from None
        if not OmegaConf.is_dict(config):
            raise InputError(f"{label} must be a mapping of keys to values")
        package = header["package"]
        if name.startswith("recipe/") and package != "_global_":
            raise InputError(f"{label} is a recipe, so its first line must be: # @package _global_")
        if package is not None and package.split(".")[0] == "hydra":
            raise InputError(f"{label}: a recipe does not configure Hydra itself; remove the package {package}")
        return ConfigResult(provider=self.provider, path=self.full_path(), config=config, header=header)

    def available(self) -> bool:
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        path = self._path(config_path)
        return path is not None and _exists(path.is_dir)

    def is_config(self, config_path: str) -> bool:
        name = self._normalize_file_name(config_path)
        path = self._path(name)
        return path is not None and "/" in name and _exists(path.is_file)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        path = self._path(config_path)
        files: list[str] = []
        try:
            names = sorted(os.listdir(path)) if path is not None else []
        except OSError as error:
            raise InputError(f"{self.provider}/{config_path} cannot be read: {error.strerror}") from None
        for name in names:
            self._list_add_result(files, os.path.join(config_path, name), name, results_filter)
        return sorted(set(files))


def _exists(test: Callable[[], bool]) -> bool:
    """A name that the file system refuses (too long, say) is a name that does not exist."""
    try:
        return test()
    except OSError:
        return False


class RecordingLoader(ConfigLoaderImpl):
    """Hydra's loader; `loaded` holds what was merged, in order: (where from, tree)."""

    def __init__(self, config_search_path: ConfigSearchPathImpl) -> None:
        super().__init__(config_search_path)
        self.loaded: list[tuple[str, Any]] = []

    def _load_single_config(self, default: Any, repo: Any) -> ConfigResult:
        result = super()._load_single_config(default, repo)
        if default.config_path == PRIMARY:
            self.loaded.append((SCHEMA, result.config))
        elif result.path.startswith("recipes://"):
            self.loaded.append((f"{result.provider}/{default.config_path}.yaml", result.config))
        return result


def recipe_folders(recipe_dirs: Sequence[Path]) -> list[tuple[str, Path]]:
    """(label, absolute folder) in the order of search: the user's own, then what comes with the package."""
    folders = []
    for folder in recipe_dirs:
        if not folder.is_dir():
            raise InputError(f"--recipes {folder} is not a folder; it must be laid out like recipes/")
        if not any((folder / group).is_dir() for group in GROUPS):
            raise InputError(f"--recipes {folder} would give nothing: it holds none of the folders {', '.join(GROUPS)}")
        folders.append((str(folder), folder.absolute()))
    return [*folders, ("recipes", packaged_recipes())]


def make_loader(recipe_dirs: Sequence[Path] = ()) -> RecordingLoader:
    """Hydra's config loader over the given folders and the packaged ones."""
    version.setbase("1.3")
    registry = SourcesRegistry.instance()
    for source in (RecipeSource, ImportlibResourcesConfigSource, StructuredConfigSource):
        registry.register(source)
    primary = {"defaults": ["_self_", {"recipe": "???"}], **typed.defaults()}
    ConfigStore.instance().store(name=PRIMARY, node=primary, provider=SCHEMA)
    search_path = ConfigSearchPathImpl()
    search_path.append("hydra", "pkg://hydra.conf")
    for label, folder in recipe_folders(recipe_dirs):
        search_path.append(label, f"recipes://{folder}")
    search_path.append("schema", "structured://")
    return RecordingLoader(search_path)


def has_option(loader: RecordingLoader, group: str, name: str) -> bool:
    """Whether a group has a file of that name, in a folder of its own or not."""
    sources = [source for source in loader.get_sources() if isinstance(source, RecipeSource)]
    return any(source.is_config(f"{group}/{name}") for source in sources)


def options(loader: RecordingLoader, group: str) -> list[str]:
    """The names of a group's files, over all folders."""
    found: set[str] = set()
    for source in loader.get_sources():
        if isinstance(source, RecipeSource) and source.is_group(group):
            found.update(source.list(group, ObjectType.CONFIG))
    return sorted(found)

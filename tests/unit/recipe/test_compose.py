"""Composition: Hydra's own answer for the same files and overrides, and where each value came from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from apertus_nemo.errors import InputError
from apertus_nemo.recipe import typed
from apertus_nemo.recipe.check import check
from apertus_nemo.recipe.compose import available, compose, parse_multirun
from apertus_nemo.recipe.locate import packaged_recipes
from apertus_nemo.recipe.schema import to_tree
from tests.unit.recipe.given import GIVEN

# Overrides whose meaning Hydra knows best.
GRAMMAR = [
    [],
    ["optim.lr=2e-3"],
    ["optim.lr=2e-3", "optim.lr=1e-3"],
    ["++optim.lr=2e-3", "++model.rotary_base=1e6"],
    ["parallel=tp2_sp", "parallel.sequence_parallel=false"],
    ["model=apertus_8b", "optim=ademamix_apertus_8b", "parallel=apertus_8b"],
    ["model=[tiny,apertus_8b]"],
    ["optim={lr:1e-3,min_lr:1e-4}"],
    ["schedule.batch_ramp=[]"],
    ["schedule.batch_ramp=[{from_sample:64,global_batch_size:16},{from_sample:320,global_batch_size:32}]"],
    ["schedule.batch_ramp.0.global_batch_size=32"],
    ["name='with-quotes'", 'data.path="a, b: {c}"'],
    ["schedule.decay_samples=${schedule.warmup_samples}", "schedule.warmup_samples=80"],
    ["trainer.seed=int(7.0)", "optim.clip_grad=float(1)"],
    ["optim.lr=${oc.select:nothing.here,0.004}"],
    ["data=built", "data.path=/d"],
    ["model.rope_scaling=FALSE", "trainer.max_steps=null"],
    ["cluster=local", "image=host", "reproducibility=relaxed"],
]


def by_hydra(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """What hydra.compose makes of the same files; the schema's defaults are laid under them as its primary config."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    shutil.copytree(packaged_recipes(), folder, dirs_exist_ok=True)
    defaults = OmegaConf.to_yaml(OmegaConf.create(typed.defaults()))
    (folder / "main.yaml").write_text("defaults:\n  - _self_\n  - recipe: tiny_pretrain\n" + defaults)
    with initialize_config_dir(str(folder), version_base="1.3"):
        tree = OmegaConf.to_container(hydra_compose("main", overrides), resolve=True)
    assert isinstance(tree, dict)
    return tree


@pytest.mark.parametrize("overrides", GRAMMAR, ids=" ".join)
def test_same_as_hydra(overrides: list[str], tmp_path: Path) -> None:
    ours = compose("tiny_pretrain", overrides)
    assert ours.tree == by_hydra(tmp_path, overrides)
    assert ours.tree == to_tree(ours.config)
    assert ours.overrides == tuple(overrides)


def test_removed_value_is_the_schemas_default() -> None:
    resolved = compose(overrides=["~optim.beta3", "~optim.clip_grad=0.1"])
    assert resolved.config.optim.beta3 == 0.9999
    assert resolved.provenance["optim.beta3"] == "default of the schema"
    assert resolved.provenance["optim.beta2"] == "recipes/optim/ademamix.yaml"


def test_provenance() -> None:
    overrides = ["parallel=tp2", "optim.lr=2e-3", "data={goldfish_k:40}", "schedule.batch_ramp.0.global_batch_size=32"]
    origin = compose(overrides=overrides).provenance
    assert list(origin) == list(typed.leaf_keys())
    assert origin["name"] == "recipes/recipe/tiny_pretrain.yaml"
    assert origin["model.num_layers"] == "recipes/model/tiny.yaml"
    assert origin["model.xielu_beta"] == "default of the schema"
    assert origin["parallel.tensor_model_parallel_size"] == "recipes/parallel/tp2.yaml"
    assert origin["trainer.devices"] == "recipes/parallel/tp2.yaml"
    assert origin["trainer.num_nodes"] == "recipes/trainer/cpu.yaml"
    assert origin["optim.lr"] == "override optim.lr=2e-3"
    assert origin["data.goldfish_k"] == "override data={goldfish_k:40}"
    assert origin["data.goldfish_h"] == "default of the schema"
    assert origin["schedule.batch_ramp"] == (
        "recipes/recipe/tiny_pretrain.yaml, override schedule.batch_ramp.0.global_batch_size=32"
    )


def test_provenance_names_the_file_whose_value_it_is(tmp_path: Path) -> None:
    """Against a search by hand: the value of every key attributed to a file stands in that file."""
    import yaml

    resolved = compose(overrides=["model=apertus_70b", "parallel=apertus_70b"])
    for key, origin in resolved.provenance.items():
        if not origin.startswith("recipes/"):
            continue
        tree = yaml.safe_load((packaged_recipes().parent / origin).read_text())
        group = origin.split("/")[1]
        path = key.split(".")
        value: Any = tree
        for part in path if path[0] in tree or group == "recipe" else path[1:]:
            value = value[part]
        ours: Any = resolved.tree
        for part in path:
            ours = ours[part]
        assert ours == (float(value) if isinstance(ours, float) else value), key


def test_choices() -> None:
    assert compose(overrides=["parallel=pp2"]).choices == {
        "cluster": "local",
        "data": "embedded",
        "image": "host",
        "model": "tiny",
        "optim": "ademamix",
        "parallel": "pp2",
        "recipe": "tiny_pretrain",
        "reproducibility": "bitwise",
        "schedule": "wsd",
        "trainer": "cpu",
    }


def user_recipes(folder: Path) -> Path:
    """A folder of a user's own: a recipe on top of a packaged one, and a model."""
    (folder / "recipe").mkdir(parents=True)
    (folder / "model").mkdir()
    (folder / "model" / "three.yaml").write_text("# @package _global_\nmodel:\n  num_layers: 3\n")
    (folder / "recipe" / "mine.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n"
        "  - tiny_pretrain\n"
        "  - /model@_global_: three\n"
        "  - override /parallel: tp2\n"
        "  - _self_\n"
        "name: mine\n"
        "optim: {lr: 1e-3}\n"
    )
    return folder


def test_users_own_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = user_recipes(tmp_path / "own").relative_to(tmp_path)
    resolved = compose("mine", recipe_dirs=[folder])
    assert (resolved.config.name, resolved.config.model.num_layers, resolved.config.model.hidden_size) == (
        "mine",
        3,
        128,
    )
    assert resolved.config.trainer.devices == 2
    assert resolved.provenance["optim.lr"] == "own/recipe/mine.yaml"
    assert resolved.provenance["model.num_layers"] == "own/model/three.yaml"
    assert resolved.provenance["optim.beta1"] == "recipes/optim/ademamix.yaml"
    assert available("recipe", recipe_dirs=[folder]) == sorted([*available("recipe"), "mine"])
    with pytest.raises(InputError, match=r"^recipe=mine does not exist \(there are: [a-z0-9_, ]+\)$"):
        compose("mine")


def test_users_file_comes_before_the_packaged_one(tmp_path: Path) -> None:
    (tmp_path / "parallel").mkdir()
    (tmp_path / "parallel" / "single.yaml").write_text("distributed_optimizer: false\n")
    resolved = compose(recipe_dirs=[tmp_path])
    assert not resolved.config.parallel.distributed_optimizer
    assert resolved.provenance["parallel.distributed_optimizer"] == f"{tmp_path}/parallel/single.yaml"


def test_no_warnings() -> None:
    """Hydra 1.4's rules are obeyed: nothing that Hydra warns about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compose(overrides=["model=apertus_8b", "parallel=tp2"])


def test_nothing_is_left_behind() -> None:
    """Neither Hydra's global state nor OmegaConf's resolvers are changed for other code."""
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf.basecontainer import BaseContainer

    before = BaseContainer._resolvers
    compose()
    with pytest.raises(InputError):
        compose(overrides=["nothing=1"])
    assert BaseContainer._resolvers is before
    assert "oc.env" in before
    assert not GlobalHydra.instance().is_initialized()


# --- the packaged recipes ---


def test_every_packaged_recipe_can_run() -> None:
    """On this machine; those of the published runs: tests/unit/recipe/test_published.py and test_stages.py."""
    for name in (name for name in available("recipe") if name.startswith("tiny_")):
        resolved = compose(name, GIVEN.get(name, []))
        assert resolved.config.name == name
        check(resolved.config)


@pytest.mark.parametrize("name", ["single", "tp2", "tp2_sp", "pp2", "dp2", "tp2_dp2"])
def test_every_small_parallel_group_can_run(name: str) -> None:
    config = compose(overrides=[f"parallel={name}"]).config
    check(config)
    ranks = {"single": 1, "tp2_dp2": 4}.get(name, 2)
    replicas = 2 if "dp2" in name else 1
    assert (config.world_size, config.data_parallel_size) == (ranks, replicas)


@pytest.mark.parametrize(
    ("size", "total", "non_embedding", "ranks"),
    [("8b", 8_053_338_176, 6_979_596_352, 1024), ("70b", 70_599_864_480, 68_452_380_832, 4096)],
)
def test_published_sizes(size: str, total: int, non_embedding: int, ranks: int) -> None:
    """The groups of the published models give the published parameter counts, and fit the published clusters."""
    overrides = [f"model=apertus_{size}", f"parallel=apertus_{size}", f"optim=ademamix_apertus_{size}"]
    overrides += ["trainer=gpu", f"trainer.devices={ranks}", "trainer.global_batch_size=2048", "schedule.batch_ramp=[]"]
    overrides += [f"trainer.micro_batch_size={4 if size == '8b' else 1}", "schedule.train_samples=4096000"]
    overrides += ["data=built", "data.path=/d", "data.seq_length=4096"]
    # The default recipe's own constants stand above the groups.
    overrides += ["optim.lr=1.1e-4", "optim.min_lr=1.1e-5"] if size == "8b" else ["optim.lr=1e-5", "optim.min_lr=1e-6"]
    config = compose(overrides=overrides).config
    check(config)
    m = config.model
    attention = m.hidden_size * m.head_dim * (2 * m.num_attention_heads + 2 * m.num_query_groups)
    layer = attention + 2 * m.hidden_size * m.ffn_hidden_size + 2 * m.hidden_size + 2 * m.head_dim + 2
    count = m.num_layers * layer + m.hidden_size
    assert count == non_embedding
    assert count + 2 * m.vocab_size * m.hidden_size == total


# --- sweeps ---

SWEEPS = [
    ["optim.lr=1e-3,2e-3", "parallel=single,tp2", "name=a"],
    ["trainer.seed=range(1,4,2)", "++optim.alpha=choice(1,2)"],
    ["parallel=glob(tp2*,exclude=*sp)"],
    ["schedule.batch_ramp=[],[{from_sample:64,global_batch_size:16}]", "name='a,b'", "data.path='x',\"y\""],
    ["optim.lr=1e-3", "optim={lr:1e-3},{lr:2e-3}", "optim.lr=3e-3"],
    ["~optim.beta3", "trainer.seed=sort(3,1,reverse=true)", "recipe=tiny_pretrain"],
]

HYDRA_MAIN = """
import json, sys
from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

folder, sweeps = sys.argv[1], json.loads(sys.argv[2])
version.setbase("1.3")
for sweep in sweeps:
    members = []
    GlobalHydra.instance().clear()
    hydra = Hydra.create_main_hydra2("main", create_config_search_path(folder))
    hydra.multirun("main", lambda _: members.append(list(HydraConfig.get().overrides.task)), sweep, False)
    print("MEMBERS" + json.dumps(members), flush=True)
"""


def test_multirun_is_hydras(tmp_path: Path) -> None:
    """The members that Hydra's own multirun starts for the same overrides."""
    by_hydra(tmp_path / "conf", [])
    (tmp_path / "main.py").write_text(HYDRA_MAIN)
    done = subprocess.run(
        [sys.executable, "main.py", str(tmp_path / "conf"), json.dumps(SWEEPS)],
        cwd=tmp_path,
        timeout=240,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("MEMBERS")]
    assert len(answers) == len(SWEEPS)
    for sweep, answer in zip(SWEEPS, answers, strict=True):
        assert len(answer) > 0
        assert parse_multirun(sweep) == [tuple(member) for member in answer], sweep


def test_members_of_a_sweep_compose() -> None:
    members = parse_multirun(["optim.lr=1e-3,2e-3", "parallel=single,tp2", "name='a,b'"])
    with pytest.raises(InputError, match="name is"):  # the quotes have kept the comma
        compose(overrides=members[0])
    members = parse_multirun(["optim.lr=1e-3,2e-3", "parallel=single,tp2"])
    configs = [compose(overrides=member).config for member in members]
    assert [(c.optim.lr, c.trainer.devices) for c in configs] == [(1e-3, 1), (1e-3, 2), (2e-3, 1), (2e-3, 2)]


def test_multirun_without_a_sweep_is_one_run() -> None:
    assert parse_multirun(["optim.lr=1e-3", "hydra.mode=MULTIRUN"]) == [("optim.lr=0.001",)]
    assert parse_multirun([]) == [()]


def test_multirun_finds_users_files(tmp_path: Path) -> None:
    folder = user_recipes(tmp_path / "own")
    assert parse_multirun(["recipe=glob(tiny_p*)"], recipe_dirs=[folder]) == [("recipe=tiny_pretrain",)]
    assert parse_multirun(["recipe=glob(m*)"], recipe_dirs=[folder]) == [("recipe=mine",)]


def test_continuous_sweep_is_refused() -> None:
    with pytest.raises(InputError) as error:
        parse_multirun(["optim.lr=interval(0.1,0.2)"])
    assert str(error.value) == "the sweep cannot be expanded: BasicSweeper does not support sweep type : INTERVAL_SWEEP"

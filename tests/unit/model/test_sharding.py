"""One process against every cut of the model: initial bits, loss, gradients, their norm, and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apertus_nemo.model.init import initial_values
from apertus_nemo.model.layout import published_shapes
from apertus_nemo.testing.ranks import Parent
from tests.cases.model import MODEL, run_config

CUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2_sp": {"tp": 2, "sp": True},
    "pp2": {"pp": 2},
    "pp2_vpp2": {"pp": 2, "vpp": 2},
    "dp2": {},
    "cp2": {"cp": 2},
    "cp4": {"cp": 4},
    "tp2_sp_cp2": {"tp": 2, "sp": True, "cp": 2},
    "pp2_vpp2_cp2": {"pp": 2, "vpp": 2, "cp": 2},
}
FOUR = {"cp4", "tp2_sp_cp2", "pp2_vpp2_cp2"}  # ranks


def _together(folder: Path, kind: str, ranks: int) -> dict[str, np.ndarray]:
    """Published tensors from all ranks; what several of them hold must be the same bits."""
    whole: dict[str, np.ndarray] = {}
    for rank in range(ranks):
        for name, part in np.load(folder / f"{kind}-{rank}.npz").items():
            if name in whole:
                both = ~np.isnan(whole[name]) & ~np.isnan(part)
                assert (whole[name][both] == part[both]).all(), f"{name} differs between ranks"
                whole[name] = np.where(np.isnan(part), whole[name], part)
            else:
                whole[name] = part
    assert sorted(whole) == sorted(published_shapes(MODEL))
    assert not any(np.isnan(array).any() for array in whole.values())
    return whole


@pytest.fixture(scope="module", params=[False, True], ids=["causal", "per document"])
def single(
    parent: Parent, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("single")
    (got,) = parent.run("tests.cases.model:train_step", arguments={"out": str(folder), "masked": request.param})
    initial, gradients = _together(folder, "initial", 1), _together(folder, "gradients", 1)
    run = run_config()
    for name, shape in published_shapes(MODEL).items():
        size = shape if len(shape) == 2 else (1, *shape)
        expected = initial_values(name, shape, (0, size[0]), (0, size[1]), seed=run.trainer.seed, model=MODEL)
        np.testing.assert_array_equal(initial[name], expected)
    norm = float(np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values())))
    assert got["norm"] == pytest.approx(norm, rel=1e-6)
    return {**got, "initial": initial, "masked": request.param}, gradients


@pytest.mark.parametrize("cut", [pytest.param(cut, marks=[pytest.mark.full] if cut in FOUR else []) for cut in CUTS])
def test_a_cut_model_is_the_same_model(
    parent: Parent,
    tmp_path: Path,
    single: tuple[dict[str, Any], dict[str, np.ndarray]],
    cut: str,
) -> None:
    reference, gradients = single
    arguments = {"out": str(tmp_path), "masked": reference["masked"], **CUTS[cut]}
    ranks = 4 if cut in FOUR else 2
    results = parent.run("tests.cases.model:train_step", world_size=ranks, arguments=arguments)
    for name, array in _together(tmp_path, "initial", ranks).items():
        np.testing.assert_array_equal(array, reference["initial"][name], err_msg=name)

    if cut == "dp2":  # micro-batches alternate between the replicas
        losses = [results[i % 2]["losses"][i // 2] for i in range(4)]
    else:
        losses = next(r["losses"] for r in reversed(results) if r["losses"])
    assert losses == pytest.approx(reference["losses"], rel=1e-6)

    for name, array in _together(tmp_path, "gradients", ranks).items():
        scale = np.abs(gradients[name]).max()
        assert scale > 0.0
        if ".act_fn." in name:  # one number, a sum of both signs: its size says nothing of its terms
            scale = max(np.abs(other).max() for key, other in gradients.items() if ".act_fn." in key)
        assert np.abs(array - gradients[name]).max() < 5e-6 * scale, name
    for result in results:
        assert result["norm"] == pytest.approx(reference["norm"], rel=1e-6)
    if "pp" not in CUTS[cut]:
        assert results[0]["alphas"] == results[1]["alphas"]
        assert len(results[0]["alphas"]) == 2 * MODEL.num_layers


@pytest.mark.parametrize(("save", "load"), [({}, {"tp": 2}), ({"tp": 2, "sp": True}, {"pp": 2}), ({"pp": 2}, {})])
def test_checkpoints_load_strictly_at_another_cut(
    parent: Parent, tmp_path: Path, save: dict[str, Any], load: dict[str, Any]
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()

    def run(parallel: dict[str, Any], saving: bool) -> dict[str, list[float]]:
        results = parent.run(
            "tests.cases.model:checkpoint",
            world_size=2 if parallel else 1,
            arguments={"folder": str(folder), "save": saving, **parallel},
        )
        merged: dict[str, list[float]] = {}
        for result in results:
            for name, values in result.items():
                assert merged.setdefault(name, values) == values
        return merged

    saved, loaded = run(save, True), run(load, False)
    assert loaded == saved
    for layer in range(MODEL.num_layers):
        assert saved[f"model.layers.{layer}.mlp.act_fn.alpha_p"] == [layer]
        assert saved[f"model.layers.{layer}.mlp.act_fn.alpha_n"] == [layer + 0.25]

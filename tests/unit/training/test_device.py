"""Device aliasing: "cuda" is the CPU wherever upstream names it, nothing else changes, and all can be put back."""

from __future__ import annotations

import pytest

from apertus_nemo.testing.ranks import Parent


@pytest.fixture(scope="module")
def on_cpu(parent: Parent) -> dict[str, list[object]]:
    """What the creation functions give for device="cpu"."""
    result: dict[str, list[object]] = parent.run("tests.cases.device:created", arguments={"device": "cpu"})[0]
    return result


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:3"])
def test_tensors_are_created_on_the_cpu_with_the_same_values(
    parent: Parent, on_cpu: dict[str, list[object]], device: str
) -> None:
    assert parent.run("tests.cases.device:created", arguments={"device": device}) == [on_cpu]
    assert {place for place, _ in on_cpu.values()} == {"cpu"}


def test_moving_to_cuda_stays_on_the_cpu(parent: Parent) -> None:
    [seen] = parent.run("tests.cases.device:moved")
    where = seen["where"]
    assert {place for place, _ in where.values()} == {"cpu"}
    dtypes = {
        "to keyword": "torch.float64",
        "to device and dtype": "torch.float64",
        "to dtype": "torch.float16",
        "to other": "torch.int32",
        "module to device": "torch.bfloat16",
        "type": "torch.float16",
        "type of a dtype": "torch.float64",
    }
    assert {name: dtype for name, (_, dtype) in where.items()} == {
        name: dtypes.get(name, "torch.float32") for name in where
    }
    assert seen["same object"]
    assert seen["type names"] == [
        "torch.cuda.FloatTensor",
        "torch.cuda.BFloat16Tensor",
        "torch.cuda.HalfTensor",
        "torch.cuda.LongTensor",
    ]
    assert (seen["cpu stays"], seen["meta stays"]) == ("cpu", "meta")
    assert seen["available"] is False


def test_streams_and_events_have_one_order(parent: Parent) -> None:
    [seen] = parent.run("tests.cases.device:ordered")
    assert seen == {
        "values": [1.0, 1.0],
        "done": [True, True, 0.0],
        "devices": 3,
        "current": "cpu",
        "memory": [0, 0],
        "properties": 0,
    }


def test_random_states_are_those_of_the_cpu(parent: Parent) -> None:
    """Megatron's tracker gives each name its own sequence, and leaves the one outside as it was."""
    [seen] = parent.run("tests.cases.device:random_states")
    assert seen["first"] == seen["again"] == seen["cpu"]
    assert seen["kept"]
    assert seen["forked"] == seen["expected"]


def test_a_device_context_still_decides(parent: Parent) -> None:
    assert parent.run("tests.cases.device:meta") == [["meta", "meta", "meta"]]


def test_restore_puts_everything_back(parent: Parent) -> None:
    [seen] = parent.run("tests.cases.device:put_back")
    assert {"torch.zeros", "Tensor.to", "Tensor.cuda", "Module.cuda", "torch.cuda.Stream", "filters"} <= set(
        seen["once"]
    )
    assert seen["twice"] == seen["once"]
    assert seen["after"] == seen["second round"] == []
    assert seen["refuses"]

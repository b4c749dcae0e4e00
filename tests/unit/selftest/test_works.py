"""The part of the self-test in which an installation works: imports, a step, all-reduce, the network plugin."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace

import pytest

from apertus_nemo.cli.main import main
from apertus_nemo.record.step_log import StepRecord
from apertus_nemo.selftest.check import Check
from apertus_nemo.selftest.collectives import CPU_MESSAGES, GPU_MESSAGES, Ended, _judged, all_reduce, network_plugin
from apertus_nemo.selftest.works import importing, same_step
from apertus_nemo.testing.ranks import Parent

STEPS = [StepRecord(0, state_digest="0" * 64), StepRecord(1, loss=2.5, grad_norm=1.5, state_digest="a" * 64)]


def environment() -> dict[str, str]:
    """A small one."""
    return {"PATH": os.environ["PATH"], "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def test_a_step_that_is_the_same_twice() -> None:
    found = same_step(STEPS, list(STEPS))
    assert found.line() == (
        "ok           training step: twice loss 2.500000, gradient norm 1.500000, state digest aaaaaaaaaaaa"
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"loss": 2.5000000000000004}, "the same step twice, and step 1: loss is 2.5, then 2.5000000000000004"),
        ({"grad_norm": 1.25}, "the same step twice, and step 1: grad_norm is 1.5, then 1.25"),
        (
            {"state_digest": "b" * 64},
            f"the same step twice, and step 1: state_digest is {'a' * 64}, then {'b' * 64}",
        ),
    ],
)
def test_a_step_that_is_another_the_second_time(change: Mapping[str, str], reason: str) -> None:
    other = [STEPS[0], replace(STEPS[1], **change)]
    assert same_step(STEPS, other) == Check("training step", "failed", reason)


def test_a_step_without_its_values() -> None:
    assert same_step(STEPS[:1], STEPS[:1]).state == "failed"
    assert same_step([], []).state == "failed"


def test_a_module_that_is_missing_is_named() -> None:
    check, gpus, why = importing(["json", "no_such_module"], environment(), limit_s=120)
    assert check == Check("imports", "failed", "no_such_module: ModuleNotFoundError: No module named 'no_such_module'")
    assert gpus > 0 or why in ("torch is built without CUDA", "no CUDA device")


def test_imports_that_do_not_end() -> None:
    check, _, _ = importing(["json"], environment(), limit_s=0.01)
    assert check == Check("imports", "failed", "not done after 0 s")


def test_all_reduce_over_two_ranks() -> None:
    check, log = all_reduce("gloo", ranks=2, messages=CPU_MESSAGES, environment=environment(), limit_s=120)
    assert (check.name, check.state, log) == ("all-reduce gloo", "ok", "")
    assert (
        check.reason == f"{2 * sum(times for _, times in CPU_MESSAGES)} sums over 2 ranks, each exactly as it must be"
    )


@pytest.mark.parametrize("fault", ["", "element", "late", "moved"])
def test_a_wrong_sum_is_found(parent: Parent, fault: str) -> None:
    ranks = parent.run("tests.cases.selftest:sums", world_size=2, arguments={"fault": fault})
    assert [rank["exact"] for rank in ranks] == [True, True]
    assert ranks[0] == {"done": 10, "wrong": [], "exact": True}
    assert bool(ranks[1]["wrong"]) is bool(fault)
    if fault == "element":
        assert ranks[1]["wrong"][0].startswith("float32, 4096 bytes, round 0: 1 of 1024 elements: [700] is ")
        assert len(ranks[1]["wrong"]) == 8  # of bfloat16, too, where it is large enough


def answer(*wrong: str) -> Ended:
    """Of a rank that ended well."""
    return Ended(0, json.dumps({"done": 4, "wrong": list(wrong)}), "")


@pytest.mark.parametrize(
    ("ended", "state", "reason"),
    [
        ([answer(), answer()], "ok", "4 sums over 2 ranks, each exactly as it must be"),
        ([answer(), answer("float32, 4 bytes, ...")], "failed", "rank 1: float32, 4 bytes, ..."),
        ([Ended(None, "", ""), Ended(1, "", "x\nRuntimeError: no")], "failed", "rank 1 ended with 1: RuntimeError: no"),
        ([Ended(None, "", ""), Ended(None, "", "")], "failed", "rank 0 did not end within 9 s: without a word"),
        (
            [Ended(1, "", "no algorithm/protocol available for function AllReduce"), Ended(None, "", "")],
            "not checked",
            "NCCL offers it on no connection of these GPUs",
        ),
    ],
)
def test_how_ranks_end(ended: list[Ended], state: str, reason: str) -> None:
    assert _judged("all-reduce", 2, ended, 9.0) == Check("all-reduce", state, reason)


def test_ranks_that_hang_are_ended() -> None:
    check, _ = all_reduce("gloo", ranks=2, messages=CPU_MESSAGES, environment=environment(), limit_s=0.2)
    assert check == Check("all-reduce gloo", "failed", "rank 0 did not end within 0 s: without a word")


LOG = "node-1:17:42 [0] NCCL INFO Using network {}\nnode-1:17:42 [0] NCCL INFO comm 0x1 rank 0 nranks 4"


@pytest.mark.parametrize(
    ("wanted", "log", "state", "reason"),
    [
        ("Libfabric", LOG.format("Libfabric"), "ok", "NCCL uses Libfabric"),
        ("Libfabric", LOG.format("AWS Libfabric"), "ok", "NCCL uses AWS Libfabric"),
        ("Libfabric", LOG.format("Socket"), "failed", "NCCL uses Socket, the definition says Libfabric"),
        ("Libfabric", "", "failed", "NCCL did not say which network it uses; it should be Libfabric"),
        (None, LOG.format("Socket"), "not checked", "the definition names none; NCCL uses Socket"),
        (None, "", "not checked", "the definition names none"),
    ],
)
def test_the_network_plugin(wanted: str | None, log: str, state: str, reason: str) -> None:
    assert network_plugin(wanted, log) == Check("network plugin", state, reason)


def test_the_verb_needs_no_torch() -> None:
    import subprocess

    script = "import sys, apertus_nemo.cli.selftest as s; s.parser(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.full
def test_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["selftest", "--only", "imports", "--only", "step", "--only", "collectives", "--json"])
    tree = json.loads(capsys.readouterr().out)
    assert code == 0, tree
    states = {check["name"]: check["state"] for check in tree["checks"]}
    assert {name: states[name] for name in ("imports", "training step", "all-reduce gloo")} == {
        "imports": "ok",
        "training step": "ok",
        "all-reduce gloo": "ok",
    }


@pytest.mark.gpu
@pytest.mark.parametrize("protocol", ["Simple", "LL", "LL128"])
def test_all_reduce_of_nccl(protocol: str) -> None:
    import torch

    gpus = torch.cuda.device_count()
    messages = GPU_MESSAGES if gpus > 1 else ()
    check, log = all_reduce(
        "nccl", ranks=gpus, messages=messages, environment=dict(os.environ), limit_s=280, protocol=protocol
    )
    assert check.state in ("ok", "not checked"), check
    assert network_plugin("no such network", log).state == "failed"

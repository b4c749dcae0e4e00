"""Impossible combinations: one failing example for each rule and branch, its text word for word, and the edge that passes."""
# ruff: noqa: E501  (messages are held word for word)

from __future__ import annotations

import ast
import copy
import inspect
import sys
from typing import Any

import pytest

from apertus_nemo.errors import InputError
from apertus_nemo.recipe import check as module
from apertus_nemo.recipe.batches import BatchPlan
from apertus_nemo.recipe.check import RULES, check, find
from apertus_nemo.recipe.schema import RunConfig
from apertus_nemo.recipe.typed import from_tree
from tests.unit.recipe.test_typed import TINY

TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
VPP, CP = "parallel.virtual_pipeline_model_parallel_size", "parallel.context_parallel_size"


def configured(**changes: Any) -> RunConfig:
    """A config that passes, with changes; `__` stands for the dot."""
    tree = copy.deepcopy(TINY)
    tree["data"]["seq_length"] = 256
    tree["schedule"]["train_samples"] = 640
    tree.setdefault("initial", {"kind": "none", "path": None, "step": None})  # optional: not in the first records
    tree.setdefault("adapter", {"kind": "none", "rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": ["linear_qkv"]})
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
    return from_tree(tree)


def tp(size: int) -> dict[str, Any]:
    return {"parallel__tensor_model_parallel_size": size, "trainer__devices": size}


def ramp(*steps: tuple[int, int]) -> dict[str, Any]:
    return {"schedule__batch_ramp": [{"from_sample": a, "global_batch_size": b} for a, b in steps]}


VIRTUAL = {"parallel__virtual_pipeline_model_parallel_size": 2}
LORA = {"adapter__kind": "lora"}
CP2 = {"parallel__context_parallel_size": 2, "trainer__devices": 2}
PP2 = {"parallel__pipeline_model_parallel_size": 2, "trainer__devices": 2}

# (rule, what fails, its message, what passes beside it)
CASES: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    (
        "image_by_digest",
        {"image__reference": "registry.example/apertus/cpu:1.0.0"},
        "image.reference=registry.example/apertus/cpu:1.0.0: a tag may come to mean another image, and a record must say which it was; name it by its digest, HOST/NAME@sha256:...",
        {"image__reference": f"registry.example/apertus/cpu@sha256:{'a' * 64}"},
    ),
    (
        "heads_share_key_value_heads",
        {"model__num_query_groups": 3},
        "model.num_attention_heads=8, model.num_query_groups=3: each key/value head serves the same number of query heads; make the query heads a multiple of the query groups",
        {"model__num_query_groups": 8},
    ),
    (
        "kept_checkpoints",
        {"trainer__keep_every_steps": 10, "trainer__checkpoint_every_steps": 5},
        "trainer.keep_every_steps=10, trainer.keep_checkpoints=0: without a number of checkpoints to keep, all are kept; set trainer.keep_checkpoints to how many of the newest stay besides",
        {"trainer__keep_every_steps": 10, "trainer__checkpoint_every_steps": 5, "trainer__keep_checkpoints": 1},
    ),
    (
        "kept_checkpoints",
        {"trainer__keep_every_steps": 12, "trainer__checkpoint_every_steps": 5, "trainer__keep_checkpoints": 1},
        "trainer.keep_every_steps=12, trainer.checkpoint_every_steps=5: at some of the steps to be kept for ever no checkpoint is made; make trainer.keep_every_steps a multiple of trainer.checkpoint_every_steps",
        {"trainer__keep_every_steps": 5, "trainer__checkpoint_every_steps": 5, "trainer__keep_checkpoints": 1},
    ),
    (
        "head_is_even",
        {"model__head_dim": 15},
        "model.head_dim=15: rotary embedding turns the elements of a head in pairs; make it an even number",
        {"model__head_dim": 14},
    ),
    (
        "rope_frequency_band",
        {"model__rope_low_freq_factor": 4.0},
        "model.rope_low_freq_factor=4.0, model.rope_high_freq_factor=4.0: RoPE scaling interpolates between the two, and divides by their difference; make the low one smaller, or set model.rope_scaling=false",
        {"model__rope_low_freq_factor": 4.0, "model__rope_scaling": False},
    ),
    (
        "xielu_slope",
        {"model__xielu_alpha_n_init": 0.5},
        "model.xielu_alpha_n_init=0.5, model.xielu_beta=0.5: alpha_n is beta plus a softplus, so no raw value gives this one; choose alpha_n above beta (Apertus: 0.8 and 0.5)",
        {"model__xielu_alpha_n_init": 0.51},
    ),
    (
        "sequence_fits_model",
        {"model__max_position_embeddings": 128},
        "data.seq_length=256, model.max_position_embeddings=128: samples are longer than the longest sequence that the model announces; shorten the samples, or set model.max_position_embeddings=256",
        {"model__max_position_embeddings": 256},
    ),
    (
        "tokens_fit_embedding",
        {"data__tokenizer_vocab_size": 4097},
        "data.tokenizer_vocab_size=4097, model.vocab_size=4096: the tokenizer has tokens without a row in the embedding; set data.tokenizer_vocab_size=4096 or smaller",
        {"data__tokenizer_vocab_size": 4096},
    ),
    (
        "data_path",
        {"data__source": "built"},
        "data.path=null, data.source=built: built data lies in a folder; name the folder that `apertus-nemo data build` wrote, or choose data=embedded",
        {"data__source": "built", "data__path": "/d"},
    ),
    (
        "data_path",
        {"data__path": "/d"},
        "data.path=/d, data.source=embedded: the embedded corpus has no folder, so the path would be ignored; choose data=built, or set data.path=null",
        {},
    ),
    (
        "data_path",
        {"data__source": "built", "data__stages": [{"name": "a", "from_sample": 0, "mixture": [{"source": "web"}]}]},
        "data.path=null, data.source=built: built data lies in a folder; name the folder that holds a built corpus for each source of the mixtures",
        {
            "data__source": "built",
            "data__path": "/d",
            "data__stages": [{"name": "a", "from_sample": 0, "mixture": [{"source": "web"}]}],
        },
    ),
    (
        "chat",
        {"data__packing": True},
        "data.packing=true, data.kind=text: documents of text always fill their samples; set data.packing=false, or data.kind=chat",
        {"data__packing": True, "data__kind": "chat", "data__goldfish": False},
    ),
    (
        "chat",
        {"data__kind": "chat"},
        "data.goldfish=true, data.kind=chat: the Goldfish mask could drop every label of a short answer, and no published fine-tuning had it; set data.goldfish=false",
        {"data__kind": "chat", "data__goldfish": False},
    ),
    (
        "chat",
        {"data__kind": "chat", "data__goldfish": False, "data__stages": [{"name": "one", "from_sample": 0}]},
        "data.stages.0.name=one, data.kind=chat: a run reads one set of conversations; build one from all files, and leave the stages out",
        {"data__stages": [{"name": "one", "from_sample": 0}]},
    ),
    (
        "initial_path",
        {"initial__kind": "run"},
        "initial.path=null, initial.kind=run: weights that are read lie in a folder; name it, or set initial.kind=none",
        {"initial__kind": "run", "initial__path": "runs/a"},
    ),
    (
        "initial_path",
        {"initial__path": "runs/a"},
        "initial.path=runs/a, initial.kind=none: weights are drawn from trainer.seed, so the path would be ignored; set initial.kind to run, hugging_face or megatron, or initial.path=null",
        {},
    ),
    (
        "initial_path",
        {"initial__kind": "hugging_face", "initial__path": "hf", "initial__step": 3},
        "initial.step=3, initial.kind=hugging_face: only a run has checkpoints of several steps; set initial.step=null, or initial.kind=run",
        {"initial__kind": "run", "initial__path": "hf", "initial__step": 3},
    ),
    (
        "data_stages",  # each of its rules: test_stage_rules.py
        {"data__stages": [{"name": "a", "from_sample": 8}]},
        "data.stages.0.from_sample=8: the samples before it belong to no stage; let the first stage begin with sample 0",
        {"data__stages": [{"name": "a", "from_sample": 0}]},
    ),
    (
        "goldfish_window",
        {"data__goldfish_h": 257},
        "data.goldfish_h=257, data.seq_length=256: the hash sees more labels than a sample has, so no label would ever be dropped; make goldfish_h at most the sequence length, or set data.goldfish=false",
        {"data__goldfish_h": 256},
    ),
    (
        "learning_rates",
        {"optim__min_lr": 2e-3},
        "optim.min_lr=0.002, optim.lr=0.001: the decay would raise the rate; make min_lr at most lr",
        {"optim__min_lr": 1e-3},
    ),
    (
        "learning_rates",
        {"schedule__warmup_init_lr": 2e-3},
        "schedule.warmup_init_lr=0.002, optim.lr=0.001: the warm-up would lower the rate; make it at most lr",
        {"schedule__warmup_init_lr": 1e-3},
    ),
    (
        "slow_average_is_slower",
        {"optim__beta3": 0.8},
        "optim.beta3=0.8, optim.beta1=0.9: the slow average would forget faster than the fast one; make beta3 at least beta1 (Apertus: 0.9999 and 0.9)",
        {"optim__beta3": 0.9},
    ),
    (
        "schedule_fits",
        {"schedule__warmup_samples": 321, "schedule__decay_samples": 320},
        "schedule.train_samples=640, schedule.warmup_samples=321, schedule.decay_samples=320: warm-up and decay together need 641 samples; shorten one of them, or train on more samples",
        {"schedule__warmup_samples": 320, "schedule__decay_samples": 320},
    ),
    (
        "batch_ramp",
        {"schedule__train_samples": 7},
        "schedule.train_samples=7, trainer.global_batch_size=8: the run ends before its first batch is full; train on more samples",
        {"schedule__train_samples": 8},
    ),
    (
        "batch_ramp",
        ramp((320, 16), (320, 32)),
        "schedule.batch_ramp.1.from_sample=320: the piece before it begins at sample 320; put the ramp in order",
        ramp((320, 16), (336, 32)),
    ),
    (
        "batch_ramp",
        ramp((640, 16)),
        "schedule.batch_ramp.0.from_sample=640, schedule.train_samples=640: the run is over by then; begin the piece earlier, or leave it out",
        ramp((632, 16)),
    ),
    (
        "batch_ramp",
        ramp((320, 16), (345, 32)),
        "schedule.batch_ramp.1.from_sample=345, schedule.batch_ramp.0.global_batch_size=16: sample 345 lies inside a batch of 16; change the size between two batches, for example at sample 352",
        ramp((320, 16), (352, 32)),
    ),
    (
        "tensor_parallel",
        {**tp(8), "model__num_query_groups": 8, "model__num_attention_heads": 24, "model__ffn_hidden_size": 676},
        f"model.ffn_hidden_size=676, {TP}=8: 676 rows of the MLP cannot be shared evenly by 8 ranks; choose a tensor parallel size that divides 676",
        {**tp(8), "model__num_query_groups": 8, "model__num_attention_heads": 24},
    ),
    (
        "tensor_parallel",
        {**tp(2), "model__num_query_groups": 1},
        f"model.num_query_groups=1, {TP}=2: 1 key/value heads cannot be shared evenly by 2 ranks; choose a tensor parallel size that divides 1",
        {**tp(2), "model__num_query_groups": 2},
    ),
    (
        "tensor_parallel",
        {**tp(2), "model__vocab_size": 4097},
        f"model.vocab_size=4097, {TP}=2: 4097 rows of the embedding cannot be shared evenly by 2 ranks; choose a tensor parallel size that divides 4097",
        {**tp(2), "model__vocab_size": 4098},
    ),
    (
        "pipeline_parallel",
        {**PP2, "model__num_layers": 5},
        f"model.num_layers=5, {PP}=2, {VPP}=null: 5 layers cannot be shared evenly by 2 stages; choose pipeline sizes whose product divides the number of layers",
        {**PP2, "model__num_layers": 6},
    ),
    (
        "virtual_pipeline",
        VIRTUAL,
        f"{VPP}=2, {PP}=1: virtual stages interleave on a pipeline, and there is none; set {VPP}=null, or {PP} above 1",
        {},
    ),
    (
        "virtual_pipeline",
        {**PP2, **VIRTUAL, "trainer__global_batch_size": 12},
        f"trainer.global_batch_size=12, trainer.micro_batch_size=4, {PP}=2, {VPP}=2: a replica has 3 micro-batches a step, and the interleaved schedule takes them in groups of 2; make the batch a multiple of 8",
        {**PP2, **VIRTUAL, "trainer__global_batch_size": 16},
    ),
    (
        "sequence_parallel",
        {"parallel__sequence_parallel": True},
        f"parallel.sequence_parallel=true, {TP}=1: the sequence is cut over tensor-parallel ranks, and there is one; set parallel.sequence_parallel=false, or {TP} above 1",
        {"parallel__sequence_parallel": True, **tp(2)},
    ),
    (
        "sequence_parallel",
        {"parallel__sequence_parallel": True, **tp(2), "data__seq_length": 255},
        f"data.seq_length=255, {TP}=2, parallel.sequence_parallel=true: 255 positions cannot be shared evenly by 2 ranks; choose a sequence length that is a multiple of 2",
        {**tp(2), "data__seq_length": 255},
    ),
    (
        "sequence_parallel",
        {"parallel__sequence_parallel": True, **tp(4), **CP2, "trainer__devices": 8, "data__seq_length": 252},
        f"data.seq_length=252, {TP}=4, {CP}=2, parallel.sequence_parallel=true: 252 positions cannot be shared evenly by 8 ranks; choose a sequence length that is a multiple of 8",
        {"parallel__sequence_parallel": True, **tp(4), **CP2, "trainer__devices": 8, "data__seq_length": 248},
    ),
    (
        "context_parallel",
        {**CP2, "data__seq_length": 254},
        f"data.seq_length=254, {CP}=2: the causal mask is balanced by giving each rank two of 4 equal chunks; choose a sequence length that is a multiple of 4",
        {**CP2, "data__seq_length": 252},
    ),
    (
        "ranks",
        {**tp(2), "trainer__devices": 3},
        f"trainer.devices=3, trainer.num_nodes=1, {TP}=2, {PP}=1, {CP}=1: 3 ranks cannot hold whole replicas of 2 ranks each; start a multiple of 2 ranks",
        {**tp(2), "trainer__devices": 4, "trainer__micro_batch_size": 4},
    ),
    (
        "batch_over_replicas",
        {"trainer__devices": 3},
        "trainer.global_batch_size=8, trainer.micro_batch_size=4: 8 samples are no whole number of micro-batches of 4 on each of 3 replicas; make it a multiple of 12",
        {"trainer__devices": 2},
    ),
    (
        "batch_over_replicas",
        {"trainer__devices": 2, **ramp((320, 20))},
        "schedule.batch_ramp.0.global_batch_size=20, trainer.micro_batch_size=4: 20 samples are no whole number of micro-batches of 4 on each of 2 replicas; make it a multiple of 8",
        {"trainer__devices": 2, **ramp((320, 24))},
    ),
    (
        "cpu",
        {"model__layer_spec": "transformer_engine"},
        "model.layer_spec=transformer_engine, trainer.accelerator=cpu: Transformer Engine has no CPU kernels; set model.layer_spec=local, or trainer.accelerator=gpu",
        {"model__layer_spec": "transformer_engine", "trainer__accelerator": "gpu"},
    ),
    (
        "cpu",
        {"parallel__overlap_grad_reduce": True},
        "parallel.overlap_grad_reduce=true, trainer.accelerator=cpu: gloo has no streams to overlap on; set parallel.overlap_grad_reduce=false",
        {"parallel__overlap_grad_reduce": True, "trainer__accelerator": "gpu"},
    ),
    (
        "documents_on_one_rank",
        {
            "data__document_masking": "per_document",
            "model__layer_spec": "transformer_engine",
            "trainer__accelerator": "gpu",
            **CP2,
        },
        f"data.document_masking=per_document, {CP}=2, model.layer_spec=transformer_engine: Transformer Engine cuts documents over the ranks, each padded for that; our samples are cut as they are; set {CP}=1, data.document_masking=causal, or model.layer_spec=local",
        {"data__document_masking": "per_document", **CP2},
    ),
    (
        "overlap",
        {"parallel__overlap_param_gather": True, "trainer__accelerator": "gpu"},
        "parallel.overlap_param_gather=true, parallel.overlap_grad_reduce=false: parameters are gathered early only where gradients are reduced early; set both to true, or both to false",
        {
            "parallel__overlap_param_gather": True,
            "parallel__overlap_grad_reduce": True,
            "trainer__accelerator": "gpu",
        },
    ),
    (
        "sharded_optimizer",
        {"parallel__distributed_optimizer": False},
        "parallel.distributed_optimizer=false, optim.name=ademamix: AdEMAMix's three states are kept by Megatron's distributed optimizer only; set parallel.distributed_optimizer=true",
        {},
    ),
    (
        "adapters",
        {**LORA, "adapter__targets": []},
        "adapter.targets=(), adapter.kind=lora: no layer would get an adapter, and nothing would be trained; name some, or set adapter.kind=none",
        {**LORA, "adapter__targets": ["linear_fc1"]},
    ),
    (
        "adapters",
        {**LORA, "adapter__targets": ["linear_qkv", "linear_qkv"]},
        "adapter.targets=('linear_qkv', 'linear_qkv'): a layer has one adapter; name each layer once",
        {**LORA, "adapter__targets": ["linear_qkv"]},
    ),
    (
        "adapters",
        {**LORA, "adapter__rank": 65, "adapter__targets": ["linear_qkv"]},
        "adapter.rank=65, adapter.targets=('linear_qkv',): the smallest matrix that would get one has 64 rows or columns, so its rank is at most 64; choose a smaller rank (published: 8)",
        {**LORA, "adapter__rank": 65, "adapter__targets": ["linear_fc2"]},
    ),
    (
        "adapters",
        {**LORA, **tp(2), "adapter__rank": 3},
        "adapter.rank=3, parallel.tensor_model_parallel_size=2: each tensor-parallel rank holds the same share of an adapter's rows; choose a rank that is a multiple of 2",
        {**LORA, "adapter__rank": 3},
    ),
    (
        "local_cluster",
        {"trainer__num_nodes": 2, "reproducibility__instruction_set": "avx2"},
        "trainer.num_nodes=2, cluster.kind=local: ranks are processes on this machine, which is one node; set trainer.num_nodes=1 and give the ranks as trainer.devices",
        {"trainer__devices": 2},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_rule(case: tuple[str, dict[str, Any], str, dict[str, Any]]) -> None:
    rule, fails, message, passes = case
    bad = configured(**fails)
    with pytest.raises(InputError) as error:
        check(bad)
    assert str(error.value) == message
    assert [f for f in RULES if f.__name__ == rule and list(f(bad))]  # found by the rule that it is meant for
    check(configured(**passes))


def test_several_findings_of_one_setting() -> None:
    """What cannot fail alone: a gather that overlaps on the CPU, and a bitwise promise on several nodes."""
    with pytest.raises(InputError) as error:
        check(configured(parallel__overlap_param_gather=True, parallel__overlap_grad_reduce=True))
    assert str(error.value).splitlines() == [
        "parallel.overlap_param_gather=true, trainer.accelerator=cpu: on gloo, ranks were seen to wait for each other for ever; set parallel.overlap_param_gather=false",
        "parallel.overlap_grad_reduce=true, trainer.accelerator=cpu: gloo has no streams to overlap on; set parallel.overlap_grad_reduce=false",
    ]
    with pytest.raises(InputError) as error:
        check(configured(trainer__num_nodes=2))
    assert str(error.value).splitlines() == [
        "trainer.num_nodes=2, cluster.kind=local: ranks are processes on this machine, which is one node; set trainer.num_nodes=1 and give the ranks as trainer.devices",
        "reproducibility.level=bitwise, reproducibility.instruction_set=native, trainer.num_nodes=2: nodes may differ in their best instruction set, and AVX-512 and AVX2 differ in the last bits; set reproducibility.instruction_set=avx2",
    ]
    with pytest.raises(InputError) as error:
        check(configured(model__xielu_tensor_parallel_gradient="as_published_restart"))
    assert str(error.value) == (
        "reproducibility.level=bitwise, model.xielu_tensor_parallel_gradient=as_published_restart: on a restart every tensor-parallel rank takes the first one's scalars of xIELU, so a run that was stopped ends elsewhere than one that was not; set model.xielu_tensor_parallel_gradient=as_published, or reproducibility=relaxed"
    )
    with pytest.raises(InputError) as error:
        check(configured(**LORA, adapter__dropout=0.1))
    assert str(error.value) == (
        "reproducibility.level=bitwise, adapter.dropout=0.1: each rank would draw masks of its own, so that layouts differ, and a run that was stopped draws others; set adapter.dropout=0 (as published), or reproducibility=relaxed"
    )
    relaxed = configured(trainer__num_nodes=2, reproducibility__level="relaxed")
    assert [f.keys[0] for f in find(relaxed)] == ["trainer.num_nodes"]
    with pytest.raises(InputError) as error:
        check(configured(**tp(3)))
    assert [line.split("=")[0] for line in str(error.value).splitlines()] == [
        "model.num_attention_heads",
        "model.num_query_groups",
        "model.vocab_size",
    ]


def test_all_findings_together() -> None:
    bad = configured(model__head_dim=15, optim__min_lr=2e-3, trainer__devices=3, parallel__sequence_parallel=True)
    assert [finding.keys[0] for finding in find(bad)] == [
        "model.head_dim",
        "optim.min_lr",
        "parallel.sequence_parallel",
        "trainer.global_batch_size",
    ]


def test_every_rule_has_an_example() -> None:
    assert {rule.__name__ for rule in RULES} == {case[0] for case in CASES} | {"bitwise"}
    assert all(rule.__doc__ for rule in RULES)


def test_every_finding_has_an_example() -> None:
    """Each `yield Finding` of the module is reached by an example: one added without an example is seen here."""
    source, first = inspect.getsourcelines(module)
    places = {first + i for i, line in enumerate(source, start=1 - first) if "yield Finding(" in line}
    reached: set[int] = set()

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line":
            reached.add(frame.f_lineno)
        return trace

    several = [{"parallel__overlap_param_gather": True}, {"trainer__num_nodes": 2}]
    configs = [configured(**changes) for changes in [*(case[1] for case in CASES), *several]]
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for config in configs:
            find(config)
    finally:
        sys.settrace(before)
    assert len(places) > 25
    assert sorted(places - reached) == []


def test_ramp_rule_is_what_the_batch_plan_needs() -> None:
    """Against batch geometry: a ramp passes if and only if its steps tile the samples without a gap."""
    for first in range(1, 40):
        for size in (8, 16):
            config = configured(schedule__train_samples=64, trainer__micro_batch_size=1, **ramp((first, size)))
            plan = BatchPlan.from_config(config)
            ends = [plan.consumed_samples(step) for step in range(plan.num_steps + 1)]
            starts = [plan.batch_at(step)[0] for step in range(1, plan.num_steps + 1)]
            assert (starts == ends[:-1]) == (not find(config)), (first, size)


def test_nothing_heavy_is_imported() -> None:
    tree = ast.parse(inspect.getsource(module))
    names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    names |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert names <= {
        "__future__",
        "collections.abc",
        "dataclasses",
        "typing",
        "apertus_nemo.errors",
        "apertus_nemo.recipe",  # stage_rules
        "apertus_nemo.recipe.schema",
    }

"""What the values of a recipe must be to each other: every impossible combination, all of them at once.

    check(config)      # InputError, one line a finding: keys and values, reason, remedy

Each rule is a small function that yields what it finds, with its reason beside it. Nothing heavy is imported: these
checks come before anything starts. What a value may be by itself is in `values.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from apertus_nemo.errors import InputError
from apertus_nemo.recipe import stage_rules
from apertus_nemo.recipe.schema import RunConfig


@dataclass(frozen=True)
class Finding:
    """One impossible combination."""

    keys: tuple[str, ...]  # dotted keys, the one to change first
    reason: str
    remedy: str

    def line(self, config: RunConfig) -> str:
        """The finding as the user reads it."""
        values = ", ".join(f"{key}={_shown(_get(config, key))}" for key in self.keys)
        return f"{values}: {self.reason}; {self.remedy}"


Rule = Callable[[RunConfig], Iterator[Finding]]
RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Put a rule into the table."""
    RULES.append(function)
    return function


def find(config: RunConfig) -> list[Finding]:
    """All findings, in the order of the rules."""
    return [finding for each in RULES for finding in each(config)]


def check(config: RunConfig) -> None:
    """Raise InputError with one line a finding, if there is any."""
    findings = find(config)
    if findings:
        raise InputError("\n".join(finding.line(config) for finding in findings))


def _get(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[int(part)] if part.isdigit() else getattr(value, part)
    return value


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
VPP = "parallel.virtual_pipeline_model_parallel_size"
CP = "parallel.context_parallel_size"
SP = "parallel.sequence_parallel"


def _batch_sizes(config: RunConfig) -> list[tuple[str, int]]:
    """(dotted key, global batch size) of every piece of the batch ramp."""
    ramp = config.schedule.batch_ramp
    keys = [f"schedule.batch_ramp.{i}.global_batch_size" for i in range(len(ramp))]
    sizes = [step.global_batch_size for step in ramp]
    return list(zip(["trainer.global_batch_size", *keys], [config.trainer.global_batch_size, *sizes], strict=True))


def _ranks_fit(config: RunConfig) -> bool:
    return config.world_size % config.model_parallel_size == 0


# --- the model ---


@rule
def heads_share_key_value_heads(c: RunConfig) -> Iterator[Finding]:
    """GQA: each key/value head serves the same number of query heads."""
    m = c.model
    if m.num_attention_heads % m.num_query_groups:
        yield Finding(
            ("model.num_attention_heads", "model.num_query_groups"),
            "each key/value head serves the same number of query heads",
            "make the query heads a multiple of the query groups",
        )


@rule
def head_is_even(c: RunConfig) -> Iterator[Finding]:
    """RoPE turns pairs of a head's elements."""
    if c.model.head_dim % 2:
        yield Finding(
            ("model.head_dim",), "rotary embedding turns the elements of a head in pairs", "make it an even number"
        )


@rule
def rope_frequency_band(c: RunConfig) -> Iterator[Finding]:
    """The "llama3" scaling interpolates between two wavelengths; its divisor is their difference."""
    m = c.model
    if m.rope_scaling and m.rope_low_freq_factor >= m.rope_high_freq_factor:
        yield Finding(
            ("model.rope_low_freq_factor", "model.rope_high_freq_factor"),
            "RoPE scaling interpolates between the two, and divides by their difference",
            "make the low one smaller, or set model.rope_scaling=false",
        )


@rule
def xielu_slope(c: RunConfig) -> Iterator[Finding]:
    """alpha_n = beta + softplus(raw), so it is above beta."""
    m = c.model
    if m.xielu_alpha_n_init <= m.xielu_beta:
        yield Finding(
            ("model.xielu_alpha_n_init", "model.xielu_beta"),
            "alpha_n is beta plus a softplus, so no raw value gives this one",
            "choose alpha_n above beta (Apertus: 0.8 and 0.5)",
        )


@rule
def sequence_fits_model(c: RunConfig) -> Iterator[Finding]:
    """The model must not be trained on positions that it does not announce."""
    if c.data.seq_length > c.model.max_position_embeddings:
        yield Finding(
            ("data.seq_length", "model.max_position_embeddings"),
            "samples are longer than the longest sequence that the model announces",
            f"shorten the samples, or set model.max_position_embeddings={c.data.seq_length}",
        )


@rule
def tokens_fit_embedding(c: RunConfig) -> Iterator[Finding]:
    """Every token has its row in the embedding."""
    if c.data.source == "embedded" and c.data.tokenizer_vocab_size > c.model.vocab_size:
        yield Finding(
            ("data.tokenizer_vocab_size", "model.vocab_size"),
            "the tokenizer has tokens without a row in the embedding",
            f"set data.tokenizer_vocab_size={c.model.vocab_size} or smaller",
        )


# --- the data ---


@rule
def data_path(c: RunConfig) -> Iterator[Finding]:
    """A path belongs to built data, and only to it."""
    if c.data.source == "built" and c.data.path is None:
        mixed = any(stage.mixture for stage in c.data.stages)
        one = "name the folder that `apertus-nemo data build` wrote, or choose data=embedded"
        several = "name the folder that holds a built corpus for each source of the mixtures"
        yield Finding(("data.path", "data.source"), "built data lies in a folder", several if mixed else one)
    if c.data.source == "embedded" and c.data.path is not None:
        yield Finding(
            ("data.path", "data.source"),
            "the embedded corpus has no folder, so the path would be ignored",
            "choose data=built, or set data.path=null",
        )


@rule
def goldfish_window(c: RunConfig) -> Iterator[Finding]:
    """A hash over more labels than a sample has never sees a whole window, so nothing is dropped."""
    if c.data.goldfish and c.data.goldfish_h > c.data.seq_length:
        yield Finding(
            ("data.goldfish_h", "data.seq_length"),
            "the hash sees more labels than a sample has, so no label would ever be dropped",
            "make goldfish_h at most the sequence length, or set data.goldfish=false",
        )


@rule
def chat(c: RunConfig) -> Iterator[Finding]:
    """Conversations are whole, and their loss is that of assistant turns alone."""
    if c.data.kind != "chat":
        if c.data.packing:
            yield Finding(
                ("data.packing", "data.kind"),
                "documents of text always fill their samples",
                "set data.packing=false, or data.kind=chat",
            )
        return
    if c.data.goldfish:
        yield Finding(
            ("data.goldfish", "data.kind"),
            "the Goldfish mask could drop every label of a short answer, and no published fine-tuning had it",
            "set data.goldfish=false",
        )
    if c.data.stages:
        yield Finding(
            ("data.stages.0.name", "data.kind"),
            "a run reads one set of conversations",
            "build one from all files, and leave the stages out",
        )


@rule
def data_stages(c: RunConfig) -> Iterator[Finding]:
    """Stages tile the run, each with data of its own; the rules are in `stage_rules.py`."""
    for keys, reason, remedy in stage_rules.faults(c):
        yield Finding(keys, reason, remedy)


@rule
def initial_path(c: RunConfig) -> Iterator[Finding]:
    """A path belongs to weights that are read, a step to those of a run."""
    initial = c.initial
    if initial.kind != "none" and initial.path is None:
        yield Finding(
            ("initial.path", "initial.kind"),
            "weights that are read lie in a folder",
            "name it, or set initial.kind=none",
        )
    if initial.kind == "none" and initial.path is not None:
        yield Finding(
            ("initial.path", "initial.kind"),
            "weights are drawn from trainer.seed, so the path would be ignored",
            "set initial.kind to run, hugging_face or megatron, or initial.path=null",
        )
    if initial.kind != "run" and initial.step is not None:
        yield Finding(
            ("initial.step", "initial.kind"),
            "only a run has checkpoints of several steps",
            "set initial.step=null, or initial.kind=run",
        )


# --- adapters ---


@rule
def adapters(c: RunConfig) -> Iterator[Finding]:
    """Adapters have layers to stand beside, are smaller than these, and are shared evenly by tensor-parallel ranks."""
    a, m = c.adapter, c.model
    if a.kind == "none":
        return
    if not a.targets:
        yield Finding(
            ("adapter.targets", "adapter.kind"),
            "no layer would get an adapter, and nothing would be trained",
            "name some, or set adapter.kind=none",
        )
    if len(set(a.targets)) != len(a.targets):
        yield Finding(("adapter.targets",), "a layer has one adapter", "name each layer once")
    attention = [m.num_attention_heads * m.head_dim, m.num_query_groups * m.head_dim]
    sizes = {"linear_qkv": attention, "linear_proj": attention[:1], "linear_fc1": [m.ffn_hidden_size]}
    sizes["linear_fc2"] = sizes["linear_fc1"]
    least = min([m.hidden_size, *(size for target in a.targets for size in sizes[target])])
    if a.rank > least:
        yield Finding(
            ("adapter.rank", "adapter.targets"),
            f"the smallest matrix that would get one has {least} rows or columns, so its rank is at most {least}",
            "choose a smaller rank (published: 8)",
        )
    if a.rank % c.parallel.tensor_model_parallel_size:
        yield Finding(
            ("adapter.rank", TP),
            "each tensor-parallel rank holds the same share of an adapter's rows",
            f"choose a rank that is a multiple of {c.parallel.tensor_model_parallel_size}",
        )


# --- optimizer and schedule ---


@rule
def learning_rates(c: RunConfig) -> Iterator[Finding]:
    """The peak is the highest rate."""
    if c.optim.min_lr > c.optim.lr:
        yield Finding(("optim.min_lr", "optim.lr"), "the decay would raise the rate", "make min_lr at most lr")
    if c.schedule.warmup_init_lr > c.optim.lr:
        yield Finding(("schedule.warmup_init_lr", "optim.lr"), "the warm-up would lower the rate", "make it at most lr")


@rule
def slow_average_is_slower(c: RunConfig) -> Iterator[Finding]:
    """AdEMAMix's second average has the longer memory; its warm-up goes from beta1 up to beta3."""
    if c.optim.beta3 < c.optim.beta1:
        yield Finding(
            ("optim.beta3", "optim.beta1"),
            "the slow average would forget faster than the fast one",
            "make beta3 at least beta1 (Apertus: 0.9999 and 0.9)",
        )


@rule
def schedule_fits(c: RunConfig) -> Iterator[Finding]:
    """Warm-up and decay do not overlap."""
    s = c.schedule
    if s.warmup_samples + s.decay_samples > s.train_samples:
        yield Finding(
            ("schedule.train_samples", "schedule.warmup_samples", "schedule.decay_samples"),
            f"warm-up and decay together need {s.warmup_samples + s.decay_samples} samples",
            "shorten one of them, or train on more samples",
        )


@rule
def batch_ramp(c: RunConfig) -> Iterator[Finding]:
    """The batch size changes between two steps: no batch is cut, no sample is skipped."""
    start, size, before = 0, c.trainer.global_batch_size, "trainer.global_batch_size"
    if c.schedule.train_samples < size:
        yield Finding(
            ("schedule.train_samples", before), "the run ends before its first batch is full", "train on more samples"
        )
    for i, step in enumerate(c.schedule.batch_ramp):
        key = f"schedule.batch_ramp.{i}.from_sample"
        if step.from_sample <= start:
            yield Finding((key,), f"the piece before it begins at sample {start}", "put the ramp in order")
        elif step.from_sample >= c.schedule.train_samples:
            yield Finding(
                (key, "schedule.train_samples"), "the run is over by then", "begin the piece earlier, or leave it out"
            )
        elif (step.from_sample - start) % size:
            fits = start + max(1, round((step.from_sample - start) / size)) * size
            yield Finding(
                (key, before),
                f"sample {step.from_sample} lies inside a batch of {size}",
                f"change the size between two batches, for example at sample {fits}",
            )
        start, size, before = step.from_sample, step.global_batch_size, f"schedule.batch_ramp.{i}.global_batch_size"


# --- how the model is cut ---


@rule
def tensor_parallel(c: RunConfig) -> Iterator[Finding]:
    """Each tensor-parallel rank holds the same share of every cut dimension."""
    size = c.parallel.tensor_model_parallel_size
    for key, what in (
        ("model.num_attention_heads", "query heads"),
        ("model.num_query_groups", "key/value heads"),
        ("model.ffn_hidden_size", "rows of the MLP"),
        ("model.vocab_size", "rows of the embedding"),
    ):
        if _get(c, key) % size:
            yield Finding(
                (key, TP),
                f"{_get(c, key)} {what} cannot be shared evenly by {size} ranks",
                f"choose a tensor parallel size that divides {_get(c, key)}",
            )


@rule
def pipeline_parallel(c: RunConfig) -> Iterator[Finding]:
    """Each stage holds the same number of layers."""
    p = c.parallel
    stages = p.pipeline_model_parallel_size * (p.virtual_pipeline_model_parallel_size or 1)
    if c.model.num_layers % stages:
        yield Finding(
            ("model.num_layers", PP, VPP),
            f"{c.model.num_layers} layers cannot be shared evenly by {stages} stages",
            "choose pipeline sizes whose product divides the number of layers",
        )


@rule
def virtual_pipeline(c: RunConfig) -> Iterator[Finding]:
    """Interleaving needs something to interleave, and Megatron's schedule groups of PP micro-batches."""
    p = c.parallel
    if p.virtual_pipeline_model_parallel_size is None:
        return
    if p.pipeline_model_parallel_size == 1:
        yield Finding(
            (VPP, PP), "virtual stages interleave on a pipeline, and there is none", f"set {VPP}=null, or {PP} above 1"
        )
        return
    if not _ranks_fit(c):
        return
    for key, size in _batch_sizes(c):
        share = c.trainer.micro_batch_size * c.data_parallel_size
        if size % share == 0 and (size // share) % p.pipeline_model_parallel_size:
            yield Finding(
                (key, "trainer.micro_batch_size", PP, VPP),
                f"a replica has {size // share} micro-batches a step, and the interleaved schedule takes them "
                f"in groups of {p.pipeline_model_parallel_size}",
                f"make the batch a multiple of {share * p.pipeline_model_parallel_size}",
            )


@rule
def sequence_parallel(c: RunConfig) -> Iterator[Finding]:
    """Sequence parallelism cuts the sequence over the tensor-parallel ranks."""
    size = c.parallel.tensor_model_parallel_size
    if not c.parallel.sequence_parallel:
        return
    if size == 1:
        yield Finding(
            (SP, TP),
            "the sequence is cut over tensor-parallel ranks, and there is one",
            f"set {SP}=false, or {TP} above 1",
        )
        return
    both = size * c.parallel.context_parallel_size
    if c.data.seq_length % both:
        cut = (TP, SP) if both == size else (TP, CP, SP)
        yield Finding(
            ("data.seq_length", *cut),
            f"{c.data.seq_length} positions cannot be shared evenly by {both} ranks",
            f"choose a sequence length that is a multiple of {both}",
        )


@rule
def context_parallel(c: RunConfig) -> Iterator[Finding]:
    """A rank takes two chunks of a sample, so that all have as much of the causal mask; both are of one length."""
    size = c.parallel.context_parallel_size
    if size == 1:
        return
    if c.data.seq_length % (2 * size):
        yield Finding(
            ("data.seq_length", CP),
            f"the causal mask is balanced by giving each rank two of {2 * size} equal chunks",
            f"choose a sequence length that is a multiple of {2 * size}",
        )


@rule
def documents_on_one_rank(c: RunConfig) -> Iterator[Finding]:
    """Transformer Engine cuts each packed document over the ranks, not the sample."""
    if c.model.layer_spec == "local" or c.parallel.context_parallel_size == 1:
        return
    if c.data.document_masking == "per_document":
        yield Finding(
            ("data.document_masking", CP, "model.layer_spec"),
            "Transformer Engine cuts documents over the ranks, each padded for that; our samples are cut as they are",
            f"set {CP}=1, data.document_masking=causal, or model.layer_spec=local",
        )


@rule
def ranks(c: RunConfig) -> Iterator[Finding]:
    """The data-parallel size is a whole number."""
    if not _ranks_fit(c):
        yield Finding(
            ("trainer.devices", "trainer.num_nodes", TP, PP, CP),
            f"{c.world_size} ranks cannot hold whole replicas of {c.model_parallel_size} ranks each",
            f"start a multiple of {c.model_parallel_size} ranks",
        )


@rule
def batch_over_replicas(c: RunConfig) -> Iterator[Finding]:
    """Each replica sees the same number of whole micro-batches."""
    if not _ranks_fit(c):
        return  # there is no data-parallel size to divide by
    share = c.trainer.micro_batch_size * c.data_parallel_size
    for key, size in _batch_sizes(c):
        if size % share:
            yield Finding(
                (key, "trainer.micro_batch_size"),
                f"{size} samples are no whole number of micro-batches of {c.trainer.micro_batch_size} on each of "
                f"{c.data_parallel_size} replicas",
                f"make it a multiple of {share}",
            )


# --- where it runs ---


@rule
def cpu(c: RunConfig) -> Iterator[Finding]:
    """What does not exist on the CPU, or was seen to hang there."""
    if c.trainer.accelerator != "cpu":
        return
    if c.model.layer_spec == "transformer_engine":
        yield Finding(
            ("model.layer_spec", "trainer.accelerator"),
            "Transformer Engine has no CPU kernels",
            "set model.layer_spec=local, or trainer.accelerator=gpu",
        )
    if c.parallel.overlap_param_gather:
        yield Finding(
            ("parallel.overlap_param_gather", "trainer.accelerator"),
            "on gloo, ranks were seen to wait for each other for ever",
            "set parallel.overlap_param_gather=false",
        )
    if c.parallel.overlap_grad_reduce:
        yield Finding(
            ("parallel.overlap_grad_reduce", "trainer.accelerator"),
            "gloo has no streams to overlap on",
            "set parallel.overlap_grad_reduce=false",
        )


@rule
def sharded_optimizer(c: RunConfig) -> Iterator[Finding]:
    """AdEMAMix is made for Megatron's distributed optimizer alone."""
    if not c.parallel.distributed_optimizer:
        yield Finding(
            ("parallel.distributed_optimizer", "optim.name"),
            "AdEMAMix's three states are kept by Megatron's distributed optimizer only",
            "set parallel.distributed_optimizer=true",
        )


@rule
def overlap(c: RunConfig) -> Iterator[Finding]:
    """Megatron gathers parameters early only where it reduces gradients early."""
    p = c.parallel
    if p.overlap_param_gather and not p.overlap_grad_reduce:
        yield Finding(
            ("parallel.overlap_param_gather", "parallel.overlap_grad_reduce"),
            "parameters are gathered early only where gradients are reduced early",
            "set both to true, or both to false",
        )


@rule
def local_cluster(c: RunConfig) -> Iterator[Finding]:
    """One machine is one node."""
    if c.cluster.kind == "local" and c.trainer.num_nodes != 1:
        yield Finding(
            ("trainer.num_nodes", "cluster.kind"),
            "ranks are processes on this machine, which is one node",
            "set trainer.num_nodes=1 and give the ranks as trainer.devices",
        )


@rule
def kept_checkpoints(c: RunConfig) -> Iterator[Finding]:
    """A policy that keeps what is never made, or what is kept anyway, is not what was meant."""
    t = c.trainer
    if not t.keep_every_steps:
        return
    if not t.keep_checkpoints:
        yield Finding(
            ("trainer.keep_every_steps", "trainer.keep_checkpoints"),
            "without a number of checkpoints to keep, all are kept",
            "set trainer.keep_checkpoints to how many of the newest stay besides",
        )
    if not t.checkpoint_every_steps or t.keep_every_steps % t.checkpoint_every_steps:
        yield Finding(
            ("trainer.keep_every_steps", "trainer.checkpoint_every_steps"),
            "at some of the steps to be kept for ever no checkpoint is made",
            "make trainer.keep_every_steps a multiple of trainer.checkpoint_every_steps",
        )


# --- the image ---


@rule
def image_by_digest(c: RunConfig) -> Iterator[Finding]:
    """A record must say which image it was; a tag may come to mean another."""
    name, _, digits = (c.image.reference or "").rpartition("@sha256:")
    if c.image.reference is not None and (not name or len(digits) != 64 or set(digits) - set("0123456789abcdef")):
        yield Finding(
            ("image.reference",),
            "a tag may come to mean another image, and a record must say which it was",
            "name it by its digest, HOST/NAME@sha256:...",
        )


# --- the promise ---


@dataclass(frozen=True)
class Unbound:
    """A setting with which the same lock may give other bits, and why."""

    keys: tuple[str, ...]
    applies: Callable[[RunConfig], bool]
    reason: str
    remedy: str


NOT_BITWISE = (
    Unbound(
        keys=("adapter.dropout",),
        applies=lambda c: c.adapter.kind != "none" and c.adapter.dropout > 0,
        reason="each rank would draw masks of its own, so that layouts differ, and a run that was stopped draws others",
        remedy="set adapter.dropout=0 (as published), or reproducibility=relaxed",
    ),
    Unbound(
        keys=("reproducibility.instruction_set", "trainer.num_nodes"),
        applies=lambda c: (
            c.trainer.accelerator == "cpu" and c.trainer.num_nodes > 1 and c.reproducibility.instruction_set == "native"
        ),
        reason="nodes may differ in their best instruction set, and AVX-512 and AVX2 differ in the last bits",
        remedy="set reproducibility.instruction_set=avx2",
    ),
    Unbound(
        keys=("model.xielu_tensor_parallel_gradient",),
        applies=lambda c: c.model.xielu_tensor_parallel_gradient == "as_published_restart",
        reason="on a restart every tensor-parallel rank takes the first one's scalars of xIELU, so a run that was "
        "stopped ends elsewhere than one that was not",
        remedy="set model.xielu_tensor_parallel_gradient=as_published, or reproducibility=relaxed",
    ),
)


@rule
def bitwise(c: RunConfig) -> Iterator[Finding]:
    """A run whose settings cannot give its level is refused."""
    if c.reproducibility.level != "bitwise":
        return
    for row in NOT_BITWISE:
        if row.applies(c):
            yield Finding(("reproducibility.level", *row.keys), row.reason, row.remedy)

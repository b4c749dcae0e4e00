"""What each value of a recipe may be, and why: one row a key.

A row holds for the value alone; what values must be to each other is in `check.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class Allowed:
    """A closed range (without its lower end where `above`), or a list of choices, and the reason for it."""

    reason: str
    low: float | None = None
    high: float | None = None
    above: bool = False  # low itself is not allowed
    choices: tuple[str, ...] = ()

    def admits(self, value: object) -> bool:
        """Whether a value of the right type is allowed."""
        if self.choices:
            return value in self.choices
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return True
        low_ok = self.low is None or (value > self.low if self.above else value >= self.low)
        high_ok = self.high is None or value <= self.high
        return low_ok and high_ok

    def describe(self) -> str:
        """The range in words, after "an integer" or the like; empty where there is none."""
        if self.choices:
            quoted = [f'"{choice}"' for choice in self.choices]
            return " or ".join(quoted) if len(quoted) < 3 else "one of " + ", ".join(quoted)
        low = "" if self.low is None else f"{'above' if self.above else 'of at least'} {self.low}"
        high = "" if self.high is None else f"at most {self.high}"
        return " and ".join(part for part in (low, high) if part)


def _size(reason: str, high: int = 1 << 24) -> Allowed:
    return Allowed(reason, low=1, high=high)


def _choice(reason: str, *choices: str) -> Allowed:
    return Allowed(reason, choices=choices)


_SEED = Allowed("generators take a seed of 63 bits", low=0, high=INT64_MAX)
_SWITCH = Allowed("it is on or off")
_STEPS = Allowed("it counts steps", low=0, high=1 << 40)
_SAMPLES = Allowed("it counts samples", low=0, high=1 << 50)
_BETA = Allowed("the average that it decays has a half-life, log(0.5) / log(beta + 1e-8)", low=0, high=0.9999999)
_RATE = Allowed("a step goes down the gradient, by a bounded amount", low=0, high=1)
_RANKS = _size("it counts ranks", high=1 << 20)

ALLOWED: dict[str, Allowed] = {
    "name": Allowed('it becomes part of a folder\'s name, so it has letters, digits, ".", "_" and "-" only'),
    "model.num_layers": _size("it counts transformer blocks", high=1 << 12),
    "model.hidden_size": _size("it is a width"),
    "model.ffn_hidden_size": _size("it is a width"),
    "model.num_attention_heads": _size("it counts heads", high=1 << 16),
    "model.num_query_groups": _size("it counts heads", high=1 << 16),
    "model.head_dim": _size("it is a width", high=1 << 16),
    "model.vocab_size": Allowed("it counts tokens, and data stores them in 32 bits", low=2, high=1 << 31),
    "model.max_position_embeddings": _size("it counts positions", high=1 << 31),
    "model.rotary_base": Allowed("frequencies are its negative powers, falling", low=1, high=1e12, above=True),
    "model.rope_scaling": _SWITCH,
    "model.rope_scaling_factor": Allowed("it divides frequencies, so that they get lower", low=1, high=1e6),
    "model.rope_low_freq_factor": Allowed("it divides a length", low=0, high=1e6, above=True),
    "model.rope_high_freq_factor": Allowed("it divides a length", low=0, high=1e6, above=True),
    "model.rope_original_max_position_embeddings": _size("it counts positions", high=1 << 31),
    "model.layernorm_epsilon": Allowed("it keeps a division away from zero", low=0, high=1, above=True),
    "model.init_method_std": Allowed("weights that are all zero do not train", low=0, high=10, above=True),
    "model.xielu_beta": Allowed("it is the slope of xIELU at zero", low=0, high=1e3, above=True),
    "model.xielu_eps": Allowed("it bounds the argument of expm1 from above, just under zero", low=-1, high=0),
    "model.xielu_alpha_p_init": Allowed("it is the result of a softplus", low=0, high=1e3, above=True),
    "model.xielu_alpha_n_init": Allowed("it is xielu_beta plus the result of a softplus", low=0, high=1e3, above=True),
    "model.xielu_tensor_parallel_gradient": _choice(
        "the sum over tensor-parallel ranks is the gradient of the published formula; the published runs took none",
        "as_intended",
        "as_published",
        "as_published_restart",
    ),
    "model.layer_spec": _choice(
        "one is plain Megatron, which the CPU runs; the other is for GPUs", "local", "transformer_engine"
    ),
    "data.source": _choice("there are two sources", "embedded", "built"),
    "data.path": Allowed("it names a folder made by `apertus-nemo data build`"),
    "data.seq_length": Allowed("a sample holds at least one input and its label", low=2, high=1 << 31),
    "data.seed": Allowed("numpy's generator, which orders the samples, takes 32 bits", low=0, high=2**32 - 1),
    "data.tokenizer_vocab_size": Allowed("256 bytes and the special tokens must fit", low=260, high=1 << 20),
    "data.goldfish": _SWITCH,
    "data.goldfish_k": Allowed("one label in k is dropped, and at 1 none would be left", low=2, high=1 << 20),
    "data.goldfish_h": _size("the hash sees that many labels", high=1 << 20),
    "data.eod_mask_loss": _SWITCH,
    "data.document_masking": _choice(
        "one is what the published runs did, the other what their report says", "causal", "per_document"
    ),
    "data.kind": _choice("documents are cut into samples, conversations are not", "text", "chat"),
    "data.packing": _SWITCH,
    "data.stages.name": Allowed('it names a stage, so it has letters, digits, ".", "_" and "-" only'),
    "data.stages.from_sample": Allowed("the first stage begins with sample 0", low=0, high=1 << 50),
    "data.stages.seed": Allowed("numpy's generator, which orders the samples, takes 32 bits", low=0, high=2**32 - 1),
    "data.stages.seq_length": Allowed("a sample holds at least one input and its label", low=2, high=1 << 31),
    "data.stages.position": _choice(
        "a stage reads each source from its start, or from where the stage before stopped", "restart", "continue"
    ),
    "data.stages.mixture.source": Allowed(
        'it names a source: letters, digits, ".", "_" and "-", with "/" between the names of folders'
    ),
    "data.stages.mixture.weight": Allowed("it is a share of the samples", low=0, high=1e12, above=True),
    "optim.lr": Allowed("a step goes down the gradient, by a bounded amount", low=0, high=1, above=True),
    "optim.min_lr": _RATE,
    "optim.name": _choice("it is the optimizer of Apertus", "ademamix"),
    "optim.beta1": _BETA,
    "optim.beta2": _BETA,
    "optim.beta3": _BETA,
    "optim.alpha": Allowed("it weighs the slow average", low=0, high=1e6),
    "optim.eps": Allowed("it keeps a division away from zero", low=0, high=1, above=True),
    "optim.weight_decay": Allowed("it pulls weights towards zero", low=0, high=1e3),
    "optim.clip_grad": Allowed("it is a norm; 0 turns clipping off", low=0, high=1e9),
    "optim.alpha_warmup_steps": _STEPS,
    "optim.beta3_warmup_steps": _STEPS,
    "schedule.train_samples": Allowed("a run consumes samples", low=1, high=1 << 50),
    "schedule.warmup_samples": _SAMPLES,
    "schedule.decay_samples": _SAMPLES,
    "schedule.warmup_init_lr": _RATE,
    "schedule.style": _choice(
        "one is that of pre-training, one of fine-tuning, one of fine-tuning with adapters", "wsd", "linear", "cosine"
    ),
    "schedule.batch_ramp.from_sample": Allowed("the batch before it holds samples", low=1, high=1 << 50),
    "schedule.batch_ramp.global_batch_size": _size("it counts samples a step"),
    "parallel.tensor_model_parallel_size": _RANKS,
    "parallel.pipeline_model_parallel_size": _RANKS,
    "parallel.virtual_pipeline_model_parallel_size": Allowed(
        "it counts the stages of one rank; with one there is nothing virtual (null)", low=2, high=1 << 12
    ),
    "parallel.context_parallel_size": _RANKS,
    "parallel.sequence_parallel": _SWITCH,
    "parallel.distributed_optimizer": _SWITCH,
    "parallel.overlap_grad_reduce": _SWITCH,
    "parallel.overlap_param_gather": _SWITCH,
    "parallel.recompute": _choice("layers are computed again as a whole, or not at all", "none", "full"),
    "trainer.global_batch_size": _size("it counts samples a step"),
    "trainer.micro_batch_size": _size("it counts samples"),
    "trainer.devices": _RANKS,
    "trainer.num_nodes": _RANKS,
    "trainer.accelerator": _choice("a rank runs on one or the other", "cpu", "gpu"),
    "trainer.precision": _choice("bf16 keeps its master weights in fp32", "fp32", "bf16"),
    "trainer.seed": _SEED,
    "trainer.max_steps": Allowed("it counts steps; null runs to the end", low=1, high=1 << 40),
    "trainer.max_time": Allowed(
        'it is days, hours, minutes and seconds, as "00:03:55:00", and more than none; in YAML, in quotes'
    ),
    "trainer.checkpoint_every_steps": _STEPS,
    "trainer.keep_checkpoints": Allowed("it counts checkpoints; 0 keeps all", low=0, high=1 << 30),
    "trainer.keep_every_steps": _STEPS,
    "trainer.collective_timeout_s": Allowed("ranks must not wait for a dead one for ever", low=1, high=86400),
    "trainer.heartbeat_timeout_s": Allowed("it bounds the silence of ranks; 0 turns it off", low=0, high=604800),
    "trainer.tensorboard": _SWITCH,
    "trainer.wandb": _choice("curves are stored here or uploaded; null does neither", "offline", "online"),
    "trainer.wandb_project": Allowed("it names a project"),
    "reproducibility.level": _choice("a run promises one or the other", "bitwise", "relaxed"),
    "reproducibility.instruction_set": _choice(
        "PyTorch, MKL and oneDNN can be held to these", "native", "avx2", "avx512", "default"
    ),
    "reproducibility.threads_per_rank": _size("it counts threads", high=1 << 10),
    "reproducibility.state_digest_every_steps": _STEPS,
    "initial.kind": _choice("weights are drawn, or read from one of these", "none", "run", "hugging_face", "megatron"),
    "initial.path": Allowed("it names a run directory, or a folder with config.json and safetensors"),
    "initial.step": Allowed("it is the step of a checkpoint; null takes the newest", low=0, high=1 << 40),
    "adapter.kind": _choice("all weights are trained, or adapters beside them", "none", "lora"),
    "adapter.rank": _size("it is the width of an adapter's two matrices", high=1 << 16),
    "adapter.alpha": Allowed("over the rank, it weighs what an adapter adds", low=0, high=1e6, above=True),
    "adapter.dropout": Allowed("it is the share of an adapter's inputs that is left out", low=0, high=0.99),
    "adapter.targets": _choice(
        "these are the linear layers of a block", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"
    ),
    "cluster.kind": _choice("ranks are processes on this machine, or tasks of a Slurm job", "local", "slurm"),
    "image.reference": Allowed("it names an image"),
}

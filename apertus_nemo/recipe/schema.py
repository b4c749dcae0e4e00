"""RunConfig: everything that a recipe decides, as frozen dataclasses.

YAML holds choices; whatever follows from them (data-parallel size, number of steps) is a property
here or a function elsewhere, never a second choice. Units stand in the names (`_samples`, `_steps`,
`_s`, `_bytes`). Published values are in `recipes/`; the defaults here are those of the architecture.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """The Apertus architecture (arXiv 2509.14233, section 2.1)."""

    num_layers: int  # transformer blocks
    hidden_size: int  # width of the residual stream
    ffn_hidden_size: int  # width between up and down projection; the MLP is not gated
    num_attention_heads: int  # query heads
    num_query_groups: int  # key/value heads (GQA)
    head_dim: int  # width of one head
    vocab_size: int  # rows of the embedding and of the output layer; tokens must be below it
    max_position_embeddings: int = 4096  # longest sequence that the exported model announces
    rotary_base: float = 500_000.0  # RoPE theta
    rope_scaling: bool = True  # the "llama3" kind, on from the first step
    rope_scaling_factor: float = 8.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max_position_embeddings: int = 8192
    layernorm_epsilon: float = 1e-5  # of every RMSNorm
    init_method_std: float = 0.008944  # output projections: divided by sqrt(2 * num_layers)
    xielu_beta: float = 0.5  # constant of xIELU
    xielu_eps: float = -1e-6  # upper bound of the argument of expm1 in xIELU
    xielu_alpha_p_init: float = 0.8  # effective (after softplus) slope scalar of the positive branch
    xielu_alpha_n_init: float = 0.8  # effective scalar of the negative branch, beta included
    xielu_tensor_parallel_gradient: str = "as_intended"  # summed over TP ranks; "as_published": not, each has its own
    layer_spec: str = "local"  # "local" (plain Megatron, CPU) or "transformer_engine"


# Of a field that a tree may leave out: it then has its default. Every field that came after the first locks is one, so
# that their records can be read for ever.
OPTIONAL = {"optional": True}


@dataclass(frozen=True)
class MixturePart:
    """One source of a mixture."""

    source: str  # "documentation" or "library" of the embedded text; a folder below data.path of built data
    # share of the stage's samples, relative to the others; null in all parts: by the samples that each source has
    weight: float | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class DataStage:
    """From this sample on, this data. Null stands for what the recipe says in `data`."""

    name: str
    from_sample: int
    seed: int | None = field(default=None, metadata=OPTIONAL)  # order of samples
    seq_length: int | None = field(default=None, metadata=OPTIONAL)  # tokens a sample
    position: str = field(default="restart", metadata=OPTIONAL)  # of every source; "continue": after the stage before
    mixture: tuple[MixturePart, ...] = field(default=(), metadata=OPTIONAL)  # none: all of the data


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how samples are cut from it."""

    source: str = "embedded"  # "embedded" (text of the running Python), or "built" (see path)
    # folder made by `apertus-nemo data build`, or, with mixtures, the folder of such folders; only with source=built
    path: str | None = None
    seq_length: int = 4096  # tokens a sample
    seed: int = 28  # order of samples
    tokenizer_vocab_size: int = 4096  # of the BPE trained on the embedded corpus
    goldfish: bool = True  # drop about 1/k of the labels from the loss (arXiv 2406.10209)
    goldfish_k: int = 50  # 1/k of the labels is dropped
    goldfish_h: int = 50  # labels that the hash sees
    eod_mask_loss: bool = True  # no loss where the input is the end-of-document token
    # "causal": documents of a sample see those before; "per_document": not
    document_masking: str = field(default="causal", metadata=OPTIONAL)
    stages: tuple[DataStage, ...] = field(default=(), metadata=OPTIONAL)  # none: one stage, of all of the data
    # "text": documents, cut into samples; "chat": conversations, with the loss on assistant turns
    kind: str = field(default="text", metadata=OPTIONAL)
    packing: bool = field(default=False, metadata=OPTIONAL)  # chat: fill samples with several whole conversations


@dataclass(frozen=True)
class OptimConfig:
    """AdEMAMix (arXiv 2409.03137) as Apertus used it."""

    lr: float  # peak learning rate
    min_lr: float  # learning rate after the decay
    name: str = "ademamix"
    beta1: float = 0.9  # fast average
    beta2: float = 0.999  # second moment
    beta3: float = 0.9999  # slow average
    alpha: float = 8.0  # weight of the slow average
    eps: float = 1e-8
    weight_decay: float = 0.1  # matrices only; not norms, not xIELU's scalars
    clip_grad: float = 0.1  # global norm of the gradient
    alpha_warmup_steps: int = 100_000  # linear, 0 to alpha
    beta3_warmup_steps: int = 100_000  # linear in half-life, beta1 to beta3


@dataclass(frozen=True)
class BatchRampStep:
    """From this sample on, this many samples a step."""

    from_sample: int
    global_batch_size: int


@dataclass(frozen=True)
class ScheduleConfig:
    """Warm-up, stable, decay; all in samples."""

    train_samples: int  # samples that the run consumes
    warmup_samples: int = 0
    decay_samples: int = 0  # the last ones of train_samples
    warmup_init_lr: float = 0.0  # learning rate at sample 0
    style: str = "wsd"  # form of the decay: "wsd" (1 - sqrt), "linear" or "cosine"
    batch_ramp: tuple[BatchRampStep, ...] = ()  # changes of trainer.global_batch_size, in order


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is cut; the data-parallel size follows."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    # "full": the backward pass computes each layer again instead of keeping what it needs; the same bits
    recompute: str = field(default="none", metadata=OPTIONAL)


@dataclass(frozen=True)
class TrainerConfig:
    """One run of training."""

    global_batch_size: int  # samples a step, before any step of schedule.batch_ramp
    micro_batch_size: int  # samples that one model replica sees at once
    devices: int = 1  # ranks a node
    num_nodes: int = 1
    accelerator: str = "cpu"  # "cpu" or "gpu"
    precision: str = "fp32"  # "fp32", or "bf16" with fp32 master weights
    seed: int = 28  # of the initial weights
    max_steps: int | None = None  # stop after so many steps; the schedules do not move
    # "DD:HH:MM:SS" a start; then saved and left. No part of the lock: see docs/train.md
    max_time: str | None = field(default=None, metadata=OPTIONAL)
    checkpoint_every_steps: int = 0  # 0: only at the end
    keep_checkpoints: int = field(default=0, metadata=OPTIONAL)  # so many of the newest stay; 0: all
    # and, for ever, those of steps that it divides; 0: none for that reason
    keep_every_steps: int = field(default=0, metadata=OPTIONAL)
    collective_timeout_s: int = 600  # a collective that takes longer ends the run
    # no rank goes on for longer in a step: the run is ended; 0: never
    heartbeat_timeout_s: int = field(default=300, metadata=OPTIONAL)
    tensorboard: bool = field(default=True, metadata=OPTIONAL)  # curves in the run directory, under logs/tensorboard
    # curves for Weights & Biases: "offline" (kept under logs/wandb), or "online"
    wandb: str | None = field(default=None, metadata=OPTIONAL)
    wandb_project: str = field(default="apertus-nemo", metadata=OPTIONAL)  # project of Weights & Biases


@dataclass(frozen=True)
class InitialConfig:
    """Where the first weights come from; optimizer, step and random numbers always begin anew."""

    # "none": drawn from trainer.seed; "run": a checkpoint; "hugging_face": a published folder; "megatron": what
    # `convert import` made of one
    kind: str = "none"
    path: str | None = None  # run directory, folder with config.json and safetensors, or what was imported
    step: int | None = None  # of the checkpoint, with kind=run; null: the newest


@dataclass(frozen=True)
class AdapterConfig:
    """Small matrices that are trained beside weights that are not (LoRA, arXiv 2106.09685)."""

    kind: str = "none"  # "none": all weights are trained; "lora": W x + alpha / rank B A x, with A and B alone trained
    rank: int = 8  # rows of A, columns of B
    alpha: float = 16.0  # over rank, it weighs what the adapter adds
    dropout: float = 0.0  # of the adapter's input
    # linear layers that get one, by Megatron's names: attention's two and the MLP's two
    targets: tuple[str, ...] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class ReproducibilityConfig:
    """What the run promises, and what it pins for that."""

    level: str = "bitwise"  # "bitwise", or "relaxed" (declared faster kernels)
    instruction_set: str = "native"  # CPU: "native", "avx2" (portable between x86 machines), "avx512", "default"
    threads_per_rank: int = 1  # CPU threads of one rank
    state_digest_every_steps: int = 0  # 0: at the start, at checkpoints and at the end only


@dataclass(frozen=True)
class ClusterConfig:
    """Where ranks are started."""

    kind: str = "local"  # processes on this machine


@dataclass(frozen=True)
class ImageConfig:
    """The software environment."""

    reference: str | None = None  # none: the environment that runs the command, pinned package by package


@dataclass(frozen=True)
class RunConfig:
    """A recipe with its overrides, resolved."""

    name: str
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    parallel: ParallelConfig
    trainer: TrainerConfig
    reproducibility: ReproducibilityConfig = field(default_factory=ReproducibilityConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    initial: InitialConfig = field(default_factory=InitialConfig, metadata=OPTIONAL)
    adapter: AdapterConfig = field(default_factory=AdapterConfig, metadata=OPTIONAL)

    @property
    def world_size(self) -> int:
        """Ranks in total."""
        return self.trainer.devices * self.trainer.num_nodes

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one replica of the model."""
        p = self.parallel
        return p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.context_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the model."""
        return self.world_size // self.model_parallel_size


def to_tree(config: Any) -> Any:
    """A dataclass as plain dicts, lists and scalars, ready for YAML or canonical JSON."""
    import dataclasses

    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_tree(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, (tuple, list)):
        return [to_tree(item) for item in config]
    return config

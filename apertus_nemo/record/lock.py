"""RunLock: what must be the same for two runs to be the same run; `lock.json`.

    lock = build_lock(config, overrides=["optim.lr=2e-5"], environment=pinned, data_manifest_digest=digest)
    lock_digest(lock)                    # equals `sha256sum lock.json`: the file is the canonical JSON, no more
    RunLock.from_bytes(path.read_bytes(), what=str(path))

A field that cannot be known is written as unknown with the reason, never left out. Version 1 of the schema.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from apertus_nemo.errors import InputError
from apertus_nemo.recipe.batches import BatchPlan
from apertus_nemo.recipe.schema import RunConfig, to_tree
from apertus_nemo.record.canonical import dumps, loads_canonical, sha256_hex, unknown
from apertus_nemo.record.software import packages, source

SCHEMA_VERSION = 1
RANK_ORDER = "tp-cp-ep-dp-pp"  # fastest first, Megatron's default: which ranks form which group

FIELDS = frozenset(
    {
        "config",
        "data",
        "environment",
        "hardware",
        "image",
        "initial_state",
        "level",
        "overrides",
        "packages",
        "schema_version",
        "source",
        "stages",
    }
)

# Variables that can change a result, and hold no secret. Nothing else of an environment enters a lock.
ENVIRONMENT = (
    "ATEN_CPU_CAPABILITY",  # instruction set of torch's own kernels
    "CUBLAS_WORKSPACE_CONFIG",  # deterministic cuBLAS
    "CUDA_DEVICE_MAX_CONNECTIONS",  # order of communication and computation
    "DNNL_MAX_CPU_ISA",  # oneDNN, older name
    "FLASH_ATTENTION_DETERMINISTIC",
    "HF_HUB_OFFLINE",  # nothing is fetched at run time
    "LC_ALL",  # sorting and texts
    "MKL_CBWR",  # MKL's conditional numerical reproducibility
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS",
    "NCCL_ALGO",  # order of summation in collectives
    "NCCL_NVLS_ENABLE",
    "NCCL_PROTO",
    "NVIDIA_TF32_OVERRIDE",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
    "NVTE_FLASH_ATTN",
    "NVTE_FUSED_ATTN",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "PYTHONHASHSEED",  # order of sets
    "PYTHONNOUSERSITE",  # packages of the user's home stay out
    "PYTORCH_CUDA_ALLOC_CONF",
    "TOKENIZERS_PARALLELISM",
    "TORCHDYNAMO_DISABLE",  # fused kernels
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_NCCL_AVOID_RECORD_STREAMS",
    "TRANSFORMERS_OFFLINE",
    "TZ",
)


@dataclass(frozen=True)
class RunLock:
    """The fields of `lock.json`, by name."""

    tree: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        """Canonical JSON: the whole content of `lock.json`."""
        return dumps(dict(self.tree))

    @cached_property
    def digest(self) -> str:
        """The lock digest: SHA-256 over `to_bytes`."""
        return sha256_hex(self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes, *, what: str) -> RunLock:
        """Read a lock; raises InputError, beginning with `what`, where it is none of this version."""
        tree = loads_canonical(data, what=what)
        if not isinstance(tree, dict) or "schema_version" not in tree:
            raise InputError(f"{what}: is not a lock")
        if tree["schema_version"] != SCHEMA_VERSION:
            raise InputError(
                f"{what}: has schema version {tree['schema_version']!r}; this version reads {SCHEMA_VERSION}"
            )
        for key in sorted(FIELDS ^ set(tree)):
            raise InputError(f"{what}: {'unknown' if key in tree else 'missing'} field {key!r}")
        return cls(tree)


def lock_digest(lock: RunLock) -> str:
    """SHA-256 of the lock: the identity of the recipe as pinned, not of a run."""
    return lock.digest


def build_lock(
    config: RunConfig,
    *,
    overrides: Sequence[str],
    environment: Mapping[str, str],
    data_manifest_digest: str | None,
    installed: Mapping[str, str] | None = None,
    code: Mapping[str, Any] | None = None,
) -> RunLock:
    """The lock of a resolved recipe.

    `overrides` as typed; `environment` as the ranks will have it (only names in ENVIRONMENT are taken);
    `data_manifest_digest` is the SHA-256 of the data's manifest, None while the data are not built. `installed` and
    `code` default to what this process runs: `software.packages()` and `software.source()`.
    """
    cpu = config.trainer.accelerator == "cpu"
    no_gpu_answer = unknown("a property of CPUs; the run asks for GPUs")
    manifest: Any = data_manifest_digest
    if manifest is None:
        manifest = unknown("the data were not built when the lock was written")
    data = {"manifest_digest": manifest, "seed": config.data.seed, "source": config.data.source}
    reproducibility = config.reproducibility
    mkl_mode: Any = environment.get("MKL_CBWR", unknown("MKL_CBWR is not set: MKL chooses by processor"))
    tree = {
        "config": to_tree(config),
        "data": data,
        "environment": {name: environment[name] for name in ENVIRONMENT if name in environment},
        "hardware": {
            "accelerator": config.trainer.accelerator,
            "instruction_set": reproducibility.instruction_set if cpu else no_gpu_answer,
            "mkl_mode": mkl_mode if cpu else no_gpu_answer,
            "threads_per_rank": reproducibility.threads_per_rank if cpu else no_gpu_answer,
        },
        "image": config.image.reference or unknown("no image: the installed packages are listed one by one"),
        "initial_state": {"kind": "none"},
        "level": reproducibility.level,
        "overrides": list(overrides),
        "packages": dict(packages() if installed is None else installed),
        "schema_version": SCHEMA_VERSION,
        "source": dict(source() if code is None else code),
        "stages": _stages(config, data),
    }
    return RunLock(tree)


def _stages(config: RunConfig, data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry a piece of the batch plan: from which sample to which, cut how, from what data."""
    plan = BatchPlan.from_config(config)
    parallel = config.parallel
    topology = {
        "context_parallel_size": parallel.context_parallel_size,
        "data_parallel_size": config.data_parallel_size,
        "order": RANK_ORDER,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "world_size": config.world_size,
    }
    ends = (*plan.starts[1:], plan.train_samples)
    return [
        {
            "data": dict(data),
            "from_sample": start,
            "global_batch_size": size,
            "micro_batch_size": config.trainer.micro_batch_size,
            "seed": config.trainer.seed,
            "to_sample": end,
            "topology": dict(topology),
        }
        for start, size, end in zip(plan.starts, plan.sizes, ends, strict=True)
    ]

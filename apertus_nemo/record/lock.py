"""RunLock: what must be the same for two runs to be the same run; `lock.json`.

    lock = build_lock(config, overrides=["optim.lr=2e-5"], environment=pinned, data=found, surroundings=look())
    lock_digest(lock)                    # equals `sha256sum lock.json`: the file is the canonical JSON, no more
    RunLock.from_bytes(path.read_bytes(), what=str(path))

A field that cannot be known is written as unknown with the reason, never left out. What looks like a secret is refused.
Version 1 of the schema. The same choices in the same surroundings give the same bytes, on every machine and every day.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from apertus_nemo.errors import InputError
from apertus_nemo.recipe.batches import BatchPlan
from apertus_nemo.recipe.schema import RunConfig, to_tree
from apertus_nemo.recipe.stages import Stage, StagePlan
from apertus_nemo.recipe.time_limit import without_time_limit
from apertus_nemo.record.canonical import dumps, loads_canonical, sha256_hex, unknown
from apertus_nemo.record.image import find_image, pinned
from apertus_nemo.record.machine import machine
from apertus_nemo.record.secrets import leaves, override_pairs, refuse_secrets
from apertus_nemo.record.software import interpreter, packages
from apertus_nemo.record.source import Source, find_source

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
        "python",
        "schema_version",
        "source",
        "stages",
    }
)
LATER = frozenset({"python"})  # the first records of version 1 lack it
ALL = "all"  # in the place of a source's name: all of the data
RELAUNCH = "relaunch_of"  # only in the lock of a relaunch that was let differ: see `RunLock.allowing`

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

    def allowing(self, original: RunLock, allowed: Sequence[Mapping[str, Any]]) -> RunLock:
        """The lock of a relaunch of `original` in which fields may differ: {"field", "locked", "found"} where there.

        It says so for ever, in a field of its own; two relaunches that were let differ alike have one lock digest.
        """
        fields = sorted((dict(item) for item in allowed), key=lambda item: str(item["field"]))
        return RunLock({**self.tree, RELAUNCH: {"allowed": fields, "lock_digest": original.digest}})

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
        for key in sorted((FIELDS ^ set(tree)) - {RELAUNCH} - (LATER - set(tree))):
            raise InputError(f"{what}: {'unknown' if key in tree else 'missing'} field {key!r}")
        return cls(tree)


def lock_digest(lock: RunLock) -> str:
    """SHA-256 of the lock: the identity of the recipe as pinned, not of a run."""
    return lock.digest


@dataclass(frozen=True)
class Surroundings:
    """What a lock pins that no recipe says, as found here."""

    packages: Mapping[str, Any]  # see software.packages
    python: Mapping[str, Any]  # see software.interpreter
    machine: Mapping[str, Any]  # see machine.machine
    source: Mapping[str, Any]  # see source.describe
    image: Mapping[str, Any] | None = None  # see image.find_image


def look(*, source: Source | None = None, cache: Path | None = None) -> Surroundings:
    """The surroundings of this process; `cache` is the folder where hashes of packages are kept between runs."""
    return Surroundings(
        packages=packages(cache=None if cache is None else cache / "packages.json"),
        python=interpreter(),
        machine=machine(),
        source=(source or find_source()).tree,
        image=find_image(),
    )


@dataclass(frozen=True)
class PinnedSource:
    """One source of a mixture, as a lock pins it."""

    manifest_digest: str  # of its corpus
    documents: tuple[int, int] | None  # the first, and one past the last; None: all of its corpus
    tokens: int


@dataclass(frozen=True)
class PinnedData:
    """Built corpora, as a lock pins them."""

    manifest_digest: str | None  # SHA-256 of the manifest; None where there is one for each source
    files: Mapping[str, str]  # path -> SHA-256, those of the tokenizer included
    tokenizer: Mapping[str, Any]  # kind, size of the vocabulary, special ids
    sources: Mapping[str, PinnedSource] = field(default_factory=dict)  # by name, where the recipe has stages


def build_lock(
    config: RunConfig,
    *,
    overrides: Sequence[str],
    environment: Mapping[str, str],
    data: PinnedData | None,
    surroundings: Surroundings | None = None,
    initial: Mapping[str, Any] | None = None,
) -> RunLock:
    """The lock of a resolved recipe; without its time limit, which each start has for itself.

    `overrides` as typed; `environment` as the ranks will have it (only names in ENVIRONMENT are taken); `data` is
    None while they are not built; `surroundings` default to those of this process. `initial` is what `find_initial`
    gives for a recipe that starts from weights.

    Raises InputError where the recipe or an override holds what looks like a secret, or where the recipe names another
    image than the one that this is.
    """
    here = look() if surroundings is None else surroundings
    tree = recorded(config)
    variables = {name: environment[name] for name in ENVIRONMENT if name in environment}
    refuse_secrets(leaves(tree), where="the recipe")
    refuse_secrets(override_pairs(overrides), where="the overrides")
    refuse_secrets(variables.items(), where="the environment")
    corpus = _data(config, data)
    return RunLock(
        {
            "config": tree,
            "data": corpus,
            "environment": variables,
            "hardware": _hardware(config, environment, here.machine),
            "image": pinned(here.image, config.image.reference),
            "initial_state": _initial(config, initial),
            "level": config.reproducibility.level,
            "overrides": without_time_limit(overrides),
            "packages": dict(here.packages),
            "python": dict(here.python),
            "schema_version": SCHEMA_VERSION,
            "source": dict(here.source),
            "stages": _stages(config, corpus),
        }
    )


def _initial(config: RunConfig, found: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the first weights are: see record/initial.py."""
    if config.initial.kind == "none":
        return {"kind": "none"}
    return dict(found) if found is not None else unknown("what the run starts from was not looked at")


def recorded(config: RunConfig) -> dict[str, Any]:
    """A recipe as a lock holds it: without a time limit, which changes no number, and without `data.stages`,
    `data.kind`, `data.packing`, `initial` and `adapter` where they say what the first records of version 1 mean."""
    tree: dict[str, Any] = to_tree(config)
    tree["trainer"]["max_time"] = None
    for name, none in (("stages", ()), ("kind", "text"), ("packing", False)):
        if getattr(config.data, name) == none:
            del tree["data"][name]
    if config.initial.kind == "none":
        del tree["initial"]
    if config.adapter.kind == "none":
        del tree["adapter"]
    return tree


def _data(config: RunConfig, data: PinnedData | None) -> dict[str, Any]:
    found: dict[str, Any]
    if data is None:
        found = dict.fromkeys(
            ("files", "manifest_digest", "tokenizer"), unknown("the data were not built when the lock was written")
        )
    else:
        found = {
            "files": dict(data.files),
            "manifest_digest": data.manifest_digest or unknown("each source has one of its own: see sources"),
            "tokenizer": dict(data.tokenizer),
        }
    if config.data.stages:
        found["sources"] = _sources(config, data)
    return {"seed": config.data.seed, "source": config.data.source, **found}


def _hardware(config: RunConfig, environment: Mapping[str, str], here: Mapping[str, Any]) -> dict[str, Any]:
    """The kind of hardware asked for; of this machine, what a result depends on at the settings asked for."""
    found: dict[str, Any] = {"accelerator": config.trainer.accelerator, "architecture": here["architecture"]}
    reproducibility = config.reproducibility
    if config.trainer.accelerator != "cpu":
        of_cpus = unknown("a property of CPUs; the run asks for GPUs")
        names = ("cpu_features", "cpu_model", "instruction_set", "mkl_mode", "threads_per_rank")
        return {**found, **dict.fromkeys(names, of_cpus), "driver": here["driver"], "gpu": here["gpu"]}
    native = reproducibility.instruction_set == "native"
    any_model = unknown(f"any that has it: the instruction set is pinned to {reproducibility.instruction_set}")
    of_gpus = unknown("a property of GPUs; the run asks for CPUs")
    return {
        **found,
        "cpu_features": here["cpu_features"] if native else any_model,
        "cpu_model": here["cpu_model"] if native else any_model,
        "driver": of_gpus,
        "gpu": of_gpus,
        "instruction_set": reproducibility.instruction_set,
        "mkl_mode": environment.get("MKL_CBWR", unknown("MKL_CBWR is not set: MKL chooses by processor")),
        "threads_per_rank": reproducibility.threads_per_rank,
    }


def _sources(config: RunConfig, data: PinnedData | None) -> dict[str, Any]:
    """What each source of the stages is, by name; "all" is all of the data."""
    names = {name for stage in StagePlan.from_config(config).stages for name in stage.sources}
    if data is None:
        return dict.fromkeys(
            (name or ALL for name in names), unknown("the data were not built when the lock was written")
        )
    return {
        name or ALL: {
            "documents": None if data.sources[name].documents is None else list(data.sources[name].documents or ()),
            "manifest_digest": data.sources[name].manifest_digest,
            "tokens": data.sources[name].tokens,
        }
        for name in names
    }


def _stages(config: RunConfig, data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry wherever batch or data change: from which sample to which, cut how, from what data."""
    plan, stages = BatchPlan.from_config(config), StagePlan.from_config(config)
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
    starts = sorted({*plan.starts, *(stage.from_sample for stage in stages.stages)})
    found = []
    for start, end in zip(starts, (*starts[1:], plan.train_samples), strict=True):
        stage = stages.at(start)
        found.append(
            {
                "data": _stage_data(config, stage, data),
                "from_sample": start,
                "global_batch_size": plan.size_at(start),
                "micro_batch_size": config.trainer.micro_batch_size,
                "seed": config.trainer.seed,
                "to_sample": end,
                "topology": dict(topology),
            }
        )
    return found


def _stage_data(config: RunConfig, stage: Stage, data: Mapping[str, Any]) -> dict[str, Any]:
    """The data of one stage; of a recipe without stages, as the first records of version 1 have it."""
    if not config.data.stages:
        return {name: data[name] for name in ("manifest_digest", "seed", "source")}
    weights = [part.weight for part in stage.mixture] or [None]
    return {
        "mixture": [
            {
                "data": data["sources"][name or ALL],
                "source": name or ALL,
                "weight": "by samples" if weight is None else weight,
            }
            for name, weight in zip(stage.sources, weights, strict=True)
        ],
        "position": stage.position,
        "seed": stage.seed,
        "seq_length": stage.seq_length,
        "source": config.data.source,
        "stage": stage.name,
    }

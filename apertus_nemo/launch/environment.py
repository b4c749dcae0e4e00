"""The environment of a rank: an allow-list of the shell's, and what the recipe pins.

Every row has its reason. Nothing else of the shell's environment reaches a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from apertus_nemo.recipe.schema import RunConfig

# From the shell: where things are. None of these enters arithmetic; LD_LIBRARY_PATH could, and stays out.
ALLOWED: dict[str, str] = {
    "PATH": "programs that libraries start",
    "HOME": "caches of libraries",
    "USER": "names the owner of caches",
    "TMPDIR": "temporary files",
    "SSL_CERT_FILE": "certificates of a site",
}

FIXED: dict[str, str] = {
    "LC_ALL": "C.UTF-8",  # texts and sorting do not depend on the user's language
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",  # order of sets
    "PYTHONNOUSERSITE": "1",  # packages of the user's home do not shadow the pinned ones
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",  # a run fetches nothing
    "TRANSFORMERS_OFFLINE": "1",
    "NEMO_LOG_MEMORY_USAGE": "0",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron: order of kernels under tensor parallelism
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS: same bits each time
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # Transformer Engine: same bits each time
    "NCCL_ALGO": "Ring",  # one order of summation
    "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
}

CPU: dict[str, str] = {
    "GLOO_SOCKET_IFNAME": "lo",  # ranks of one machine talk over loopback
    "TORCHDYNAMO_DISABLE": "1",  # Megatron's fusions are torch.compile and would want a C++ compiler
    "CUDA_VISIBLE_DEVICES": "",
}

# Instruction set -> ATen's capability, MKL's code path (CNR), oneDNN's upper bound.
INSTRUCTION_SETS: dict[str, tuple[str, str, str]] = {
    "default": ("default", "COMPATIBLE", "SSE41"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512", "AVX512_CORE"),
}


# From the shell, for the first rank alone, where the recipe asks for it; the value is written nowhere.
SECRETS: dict[str, tuple[str, Callable[[RunConfig], bool]]] = {
    "WANDB_API_KEY": ("uploads curves to Weights & Biases", lambda run: run.trainer.wandb == "online"),
}


def secrets(run: RunConfig, shell: Mapping[str, str]) -> dict[str, str]:
    """Secrets that the first rank of `run` gets beside `rank_environment`; never to be recorded or shown."""
    return {name: shell[name] for name, (_, wanted) in SECRETS.items() if name in shell and wanted(run)}


def rank_environment(run: RunConfig, shell: Mapping[str, str]) -> dict[str, str]:
    """Environment of every rank of `run`, without the variables that name the rank."""
    environment = {name: shell[name] for name in ALLOWED if name in shell}
    environment.update(FIXED)
    if run.trainer.accelerator == "cpu":
        threads = str(run.reproducibility.threads_per_rank)
        environment.update(CPU, OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads)
        pinned = INSTRUCTION_SETS.get(run.reproducibility.instruction_set)
        if pinned is not None:
            environment.update(zip(("ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA"), pinned, strict=True))
    return environment

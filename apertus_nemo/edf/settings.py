"""Environment variables for GH200 nodes on Slingshot: value, reason, source, and who says something else.

One table; everything that writes or explains such a variable reads it. A value of None means: left unset on purpose.
No value was measured by us; each has its source. Keys of the sources stand in SOURCES.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SOURCES = {
    "ncclenv": "cscs-docs, software/communication/nccl_env_vars (2026-08)",
    "nccl": "cscs-docs, software/communication/nccl.md (2026-08)",
    "hook": "hook aws_ofi_nccl since Container Engine 26.06.1: cscs-docs, clusters/daint.md, change log of 2026-06-17",
    "aei": "eth-cscs/alps-extended-images 2f16898, Alps-Images/common/*.env, NGC/alps-runtime.cuda.env",
    "hpe": "HewlettPackard/shs-ccl-docs 438fcce, ccl_env.sh",
    "ptc": "swiss-ai/pretrain-code 531cc8b, pretraining/submit_apertus_70b.sh: the published launcher of Apertus",
    "serving": "swiss-ai/model-launch 5844ccd, assets/envs/*.toml",
    "pytorch": "cscs-docs, software/ml/pytorch.md (2026-08)",
    "post": "swiss-ai/posttraining b19a318, setup.sh",
    "issues": "cscs-docs, container-engine/known-issue.md",
    "nodes": "swiss-ai/nodes_test (2026-08), EDF",
    "tutorial": "cscs-docs, tutorials/ml/llm-nanotron-training.md (2026-08)",
    "nccl#2001": "NVIDIA/nccl#2001 (2026-01, open): wrong sums on GH200 with Slingshot from NCCL 2.27.3 on",
    "nccl#2053": "NVIDIA/nccl#2053 (2026-03): the cause in LL128 over NVLink-C2C",
    "hpe#21": "HewlettPackard/shs-ccl-docs#21 (merged 2026-04): keeps LL128 off the eager path",
}

SLINGSHOT = "slingshot"  # NCCL through libfabric on Slingshot
FRAMEWORK = "framework"  # PyTorch and Megatron on GPUs, whatever the network
PYTHON = "python"  # any run
NO_HOST_SLURM = "no-host-slurm"  # images with an older C library than the host's Slurm wants


@dataclass(frozen=True)
class Setting:
    """One variable."""

    name: str
    value: str | None
    layer: str
    reason: str
    sources: tuple[str, ...]
    conflict: str = ""


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "NCCL_NET",
        "AWS Libfabric",
        SLINGSHOT,
        "NCCL fails without the plugin; not forced, it falls back to TCP without a word, at a twentieth of the speed",
        ("ncclenv", "hook", "aei", "hpe"),
        "the plugin also takes Libfabric and OFI; useless on one node (hpe: a wasted VNI)",
    ),
    Setting(
        "NCCL_NET_PLUGIN",
        None,
        SLINGSHOT,
        "NCCL prefers it to NCCL_NET and then does not find the plugin",
        ("nccl", "aei"),
        "NGC images from 26.06 on set it to another network's plugin; aei unsets it",
    ),
    Setting(
        "NCCL_NET_GDR_LEVEL",
        "PHB",
        SLINGSHOT,
        "GPUDirect RDMA where GPU and NIC share a NUMA node",
        ("ncclenv", "hook", "aei", "hpe"),
    ),
    Setting(
        "NCCL_CROSS_NIC",
        "0",
        SLINGSHOT,
        "a ring stays on one NIC; what the hook and CSCS's images set",
        ("hook", "aei"),
        "ncclenv, hpe and serving: 1; the hook itself changed from 1 to 0 on 2026-06-17",
    ),
    Setting(
        "NCCL_PROTO",
        "^LL128",
        SLINGSHOT,
        "LL128 gives wrong sums on GH200 with Slingshot in about 30 % of runs, silently; first mitigation",
        ("nccl#2001", "nccl#2053", "hook", "aei", "ncclenv"),
        "ncclenv names speed as the reason; ptc leaves it unset, with an older NCCL; hpe has the second mitigation",
    ),
    Setting(
        "NCCL_NCHANNELS_PER_NET_PEER",
        "4",
        SLINGSHOT,
        "point-to-point bandwidth",
        ("nccl", "hook", "aei"),
        "nccl: 16 or 32 are faster still point to point, and slower in collectives",
    ),
    Setting("NCCL_PXN_DISABLE", "1", SLINGSHOT, "each GPU uses its own NIC", ("hook", "aei")),
    Setting("NCCL_P2P_LEVEL", "NVL", SLINGSHOT, "GPUs of a node talk over NVLink", ("hook", "aei")),
    Setting("NCCL_NET_GDR_C2C", "1", SLINGSHOT, "GPUDirect over the chip-to-chip link of GH200", ("hook", "aei")),
    Setting("NCCL_NET_GDR_READ", "1", SLINGSHOT, "the NIC reads from GPU memory when it sends", ("hook", "aei")),
    Setting(
        "NCCL_SOCKET_IFNAME",
        "hsn",
        SLINGSHOT,
        "NCCL's bootstrap goes over the high-speed network",
        ("aei", "serving"),
        "hpe lists hsn0,hsn1,hsn2,hsn3",
    ),
    Setting(
        "FI_CXI_DEFAULT_CQ_SIZE",
        "131072",
        SLINGSHOT,
        "completion queues that do not overflow at scale",
        ("ncclenv", "hook", "aei", "hpe"),
    ),
    Setting(
        "FI_CXI_DEFAULT_TX_SIZE",
        "16384",
        SLINGSHOT,
        "transmit queues that do not overflow at scale",
        ("ncclenv", "aei", "ptc"),
        "hpe: 2048; serving: 32768",
    ),
    Setting(
        "FI_CXI_DISABLE_HOST_REGISTER",
        "1",
        SLINGSHOT,
        "prevents a deadlock between libfabric and CUDA",
        ("ncclenv", "hook", "aei", "hpe"),
    ),
    Setting(
        "FI_CXI_RX_MATCH_MODE",
        "software",
        SLINGSHOT,
        "matching does not run out of hardware entries at scale",
        ("ncclenv", "serving"),
        "aei and hpe: hybrid",
    ),
    Setting(
        "FI_CXI_RDZV_PROTO",
        "alt_read",
        SLINGSHOT,
        "rendezvous that reads; wants srun --network=disable_rdzv_get",
        ("hook", "aei", "hpe"),
    ),
    Setting(
        "FI_CXI_RDZV_EAGER_SIZE",
        "0",
        SLINGSHOT,
        "no eager part of a rendezvous; prevents hangs",
        ("hook", "aei", "hpe"),
        "nccl: only against hangs",
    ),
    Setting(
        "FI_CXI_RDZV_GET_MIN",
        "0",
        SLINGSHOT,
        "with FI_CXI_RDZV_THRESHOLD: keeps LL128 off the eager path; second mitigation of the wrong sums",
        ("hpe#21", "hook", "aei", "hpe", "ptc"),
    ),
    Setting(
        "FI_CXI_RDZV_THRESHOLD",
        "0",
        SLINGSHOT,
        "with FI_CXI_RDZV_GET_MIN: keeps LL128 off the eager path; second mitigation of the wrong sums",
        ("hpe#21", "hook", "aei", "hpe"),
    ),
    Setting(
        "FI_CXI_SAFE_DEVMEM_COPY_THRESHOLD",
        "16777216",
        SLINGSHOT,
        "copies from GPU memory that need no registration up to 16 MiB",
        ("hook", "aei", "ptc"),
        "cscs-docs, cray-mpich.md: 0 against errors of cxil_map",
    ),
    Setting(
        "FI_MR_CACHE_MONITOR",
        "userfaultfd",
        SLINGSHOT,
        "the cache of memory registrations sees every unmapping",
        ("ncclenv", "hook", "aei", "hpe"),
        "hpe: kdreg2 too; cray-mpich.md: disabled, against hangs of MPI",
    ),
    Setting("FI_MR_CACHE_MAX_SIZE", "-1", SLINGSHOT, "registrations are not thrown out by size", ("hook", "aei")),
    Setting(
        "FI_MR_CACHE_MAX_COUNT", "524288", SLINGSHOT, "registrations are not thrown out by number", ("hook", "aei")
    ),
    Setting(
        "FI_PROVIDER",
        None,
        SLINGSHOT,
        "NCCL_NET is forced already, and MPICH aborts with it",
        ("aei",),
        "aei and cscs-docs, openmpi.md: cxi; spcl/HPCAgent-Bench: MPICH aborts",
    ),
    Setting("MPICH_GPU_SUPPORT_ENABLED", "0", SLINGSHOT, "GPU-aware MPI beside NCCL can deadlock", ("nccl", "pytorch")),
    Setting(
        "PMIX_MCA_psec",
        "native",
        SLINGSHOT,
        "PMIx does not look for munge, which is not in the container",
        ("aei",),
        "nccl.md: ^munge; both only silence an error",
    ),
    Setting(
        "CUDA_CACHE_DISABLE",
        "1",
        SLINGSHOT,
        "the site puts this cache into /dev/shm, which is wiped after each job",
        ("hook", "aei", "ptc"),
    ),
    Setting(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "1",
        FRAMEWORK,
        "Megatron: order of kernels under tensor parallelism",
        ("ptc", "pytorch"),
    ),
    Setting("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1", FRAMEWORK, "a rank fails instead of hanging", ("pytorch", "ptc")),
    Setting(
        "TORCH_NCCL_AVOID_RECORD_STREAMS", "1", FRAMEWORK, "memory of finished collectives is free at once", ("ptc",)
    ),
    Setting("NCCL_DEBUG", "VERSION", FRAMEWORK, "the log says which NCCL ran", ("tutorial",), "tutorial: INFO"),
    Setting(
        "NCCL_NET_FORCE_FLUSH",
        None,
        FRAMEWORK,
        "no documented need with current NCCL",
        ("ptc",),
        "ptc: 1; Isambard's guide: 0",
    ),
    Setting(
        "PYTHONNOUSERSITE",
        "1",
        PYTHON,
        "packages of ~/.local do not shadow those of the image",
        ("nodes",),
        "none; there a stray package of a home had won",
    ),
    Setting(
        "ENROOT_SLURM_HOOK",
        "0",
        NO_HOST_SLURM,
        "the host's Slurm is not mounted: it wants glibc 2.38, and Debian 12 has 2.36",
        ("issues",),
        "then there is no srun in the container",
    ),
    Setting("HF_HUB_OFFLINE", "1", PYTHON, "a run fetches nothing", ("ptc",)),
    Setting("TOKENIZERS_PARALLELISM", "false", PYTHON, "no threads beside those of the run", ("post",)),
)

BY_NAME = {setting.name: setting for setting in SETTINGS}

# What the hook aws_ofi_nccl is documented to set since Container Engine 26.06.1, beside what `ncclenv` lists.
HOOK_SETS = tuple(setting.name for setting in SETTINGS if setting.value is not None and "hook" in setting.sources)


def variables(layers: Iterable[str]) -> dict[str, str]:
    """The variables of some layers that have a value, sorted by name."""
    wanted = set(layers)
    return {
        s.name: s.value for s in sorted(SETTINGS, key=lambda s: s.name) if s.layer in wanted and s.value is not None
    }


def uses_ll128(nccl_proto: str) -> bool:
    """Whether NCCL may choose LL128 with this value of NCCL_PROTO (a list, or ^ and a list of what is left out)."""
    without = nccl_proto.startswith("^")
    names = {name.strip().upper() for name in nccl_proto.removeprefix("^").split(",")}
    return ("LL128" not in names) if without else "LL128" in names

# gh200 at GH200 and Slingshot with Enroot and Pyxis.
# Written by: apertus-nemo edf render gh200 --site pyxis-slingshot
# What a line is for, who says so and who says otherwise: apertus-nemo edf explain NAME
# No hook brings libfabric and NCCL's plugin: they are the image's, or are mounted; NCCL fails without them.
#
# Pyxis reads no EDF. Source this in the batch script: the variables are exported, and Pyxis is told to
# let them win over the image's:
#
#     . /path/of/gh200-pyxis-slingshot.sh
#     srun "${apertus_pyxis[@]}" --container-image=/path/of/image-SHA256.sqsh ...

export CUDA_CACHE_DISABLE=1  # the site puts this cache into /dev/shm, which is wiped after each job
export CUDA_DEVICE_MAX_CONNECTIONS=1  # Megatron: order of kernels under tensor parallelism
export FI_CXI_DEFAULT_CQ_SIZE=131072  # completion queues that do not overflow at scale
export FI_CXI_DEFAULT_TX_SIZE=16384  # transmit queues that do not overflow at scale
export FI_CXI_DISABLE_HOST_REGISTER=1  # prevents a deadlock between libfabric and CUDA
export FI_CXI_RDZV_EAGER_SIZE=0  # no eager part of a rendezvous; prevents hangs
export FI_CXI_RDZV_GET_MIN=0  # with FI_CXI_RDZV_THRESHOLD: keeps LL128 off the eager path; second mitigation of the wrong sums
export FI_CXI_RDZV_PROTO=alt_read  # rendezvous that reads; wants srun --network=disable_rdzv_get
export FI_CXI_RDZV_THRESHOLD=0  # with FI_CXI_RDZV_GET_MIN: keeps LL128 off the eager path; second mitigation of the wrong sums
export FI_CXI_RX_MATCH_MODE=software  # matching does not run out of hardware entries at scale
export FI_CXI_SAFE_DEVMEM_COPY_THRESHOLD=16777216  # copies from GPU memory that need no registration up to 16 MiB
export FI_MR_CACHE_MAX_COUNT=524288  # registrations are not thrown out by number
export FI_MR_CACHE_MAX_SIZE=-1  # registrations are not thrown out by size
export FI_MR_CACHE_MONITOR=userfaultfd  # the cache of memory registrations sees every unmapping
export HF_HUB_OFFLINE=1  # a run fetches nothing
export MPICH_GPU_SUPPORT_ENABLED=0  # GPU-aware MPI beside NCCL can deadlock
export NCCL_CROSS_NIC=0  # a ring stays on one NIC; what the hook and CSCS's images set
export NCCL_DEBUG=VERSION  # the log says which NCCL ran
export NCCL_NCHANNELS_PER_NET_PEER=4  # point-to-point bandwidth
export NCCL_NET='AWS Libfabric'  # NCCL fails without the plugin; not forced, it falls back to TCP without a word, at a twentieth of the speed
export NCCL_NET_GDR_C2C=1  # GPUDirect over the chip-to-chip link of GH200
export NCCL_NET_GDR_LEVEL=PHB  # GPUDirect RDMA where GPU and NIC share a NUMA node
export NCCL_NET_GDR_READ=1  # the NIC reads from GPU memory when it sends
export NCCL_P2P_LEVEL=NVL  # GPUs of a node talk over NVLink
export NCCL_PROTO='^LL128'  # LL128 gives wrong sums on GH200 with Slingshot in about 30 % of runs, silently; first mitigation
export NCCL_PXN_DISABLE=1  # each GPU uses its own NIC
export NCCL_SOCKET_IFNAME=hsn  # NCCL's bootstrap goes over the high-speed network
export PMIX_MCA_psec=native  # PMIx does not look for munge, which is not in the container
export PYTHONNOUSERSITE=1  # packages of ~/.local do not shadow those of the image
export TOKENIZERS_PARALLELISM=false  # no threads beside those of the run
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1  # a rank fails instead of hanging
export TORCH_NCCL_AVOID_RECORD_STREAMS=1  # memory of finished collectives is free at once
unset FI_PROVIDER  # NCCL_NET is forced already, and MPICH aborts with it
unset NCCL_NET_FORCE_FLUSH  # no documented need with current NCCL
unset NCCL_NET_PLUGIN  # NCCL prefers it to NCCL_NET and then does not find the plugin

apertus_pyxis=(
  --container-env=CUDA_CACHE_DISABLE,CUDA_DEVICE_MAX_CONNECTIONS,FI_CXI_DEFAULT_CQ_SIZE,FI_CXI_DEFAULT_TX_SIZE,FI_CXI_DISABLE_HOST_REGISTER,FI_CXI_RDZV_EAGER_SIZE,FI_CXI_RDZV_GET_MIN,FI_CXI_RDZV_PROTO,FI_CXI_RDZV_THRESHOLD,FI_CXI_RX_MATCH_MODE,FI_CXI_SAFE_DEVMEM_COPY_THRESHOLD,FI_MR_CACHE_MAX_COUNT,FI_MR_CACHE_MAX_SIZE,FI_MR_CACHE_MONITOR,HF_HUB_OFFLINE,MPICH_GPU_SUPPORT_ENABLED,NCCL_CROSS_NIC,NCCL_DEBUG,NCCL_NCHANNELS_PER_NET_PEER,NCCL_NET,NCCL_NET_GDR_C2C,NCCL_NET_GDR_LEVEL,NCCL_NET_GDR_READ,NCCL_P2P_LEVEL,NCCL_PROTO,NCCL_PXN_DISABLE,NCCL_SOCKET_IFNAME,PMIX_MCA_psec,PYTHONNOUSERSITE,TOKENIZERS_PARALLELISM,TORCH_NCCL_ASYNC_ERROR_HANDLING,TORCH_NCCL_AVOID_RECORD_STREAMS
  --no-container-mount-home  # packages and caches of the home stay outside
  --no-container-remap-root
  --no-container-entrypoint
  --container-writable
  --network=disable_rdzv_get  # FI_CXI_RDZV_PROTO=alt_read wants it
)

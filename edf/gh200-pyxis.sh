# gh200 at any cluster with Enroot and Pyxis.
# Written by: apertus-nemo edf render gh200 --site pyxis
# What a line is for, who says so and who says otherwise: apertus-nemo edf explain NAME
# No settings of a network: they belong to the cluster.
#
# Pyxis reads no EDF. Source this in the batch script: the variables are exported, and Pyxis is told to
# let them win over the image's:
#
#     . /path/of/gh200-pyxis.sh
#     srun "${apertus_pyxis[@]}" --container-image=/path/of/image-SHA256.sqsh ...

export CUDA_DEVICE_MAX_CONNECTIONS=1  # Megatron: order of kernels under tensor parallelism
export HF_HUB_OFFLINE=1  # a run fetches nothing
export NCCL_DEBUG=VERSION  # the log says which NCCL ran
export PYTHONNOUSERSITE=1  # packages of ~/.local do not shadow those of the image
export TOKENIZERS_PARALLELISM=false  # no threads beside those of the run
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1  # a rank fails instead of hanging
export TORCH_NCCL_AVOID_RECORD_STREAMS=1  # memory of finished collectives is free at once
unset NCCL_NET_FORCE_FLUSH  # no documented need with current NCCL

apertus_pyxis=(
  --container-env=CUDA_DEVICE_MAX_CONNECTIONS,HF_HUB_OFFLINE,NCCL_DEBUG,PYTHONNOUSERSITE,TOKENIZERS_PARALLELISM,TORCH_NCCL_ASYNC_ERROR_HANDLING,TORCH_NCCL_AVOID_RECORD_STREAMS
  --no-container-mount-home  # packages and caches of the home stay outside
  --no-container-remap-root
  --no-container-entrypoint
  --container-writable
)

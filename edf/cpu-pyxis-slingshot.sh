# cpu at GH200 and Slingshot with Enroot and Pyxis.
# Written by: apertus-nemo edf render cpu --site pyxis-slingshot
# What a line is for, who says so and who says otherwise: apertus-nemo edf explain NAME
#
# Pyxis reads no EDF. Source this in the batch script: the variables are exported, and Pyxis is told to
# let them win over the image's:
#
#     . /path/of/cpu-pyxis-slingshot.sh
#     srun "${apertus_pyxis[@]}" --container-image=/path/of/image-SHA256.sqsh ...

export HF_HUB_OFFLINE=1  # a run fetches nothing
export PYTHONNOUSERSITE=1  # packages of ~/.local do not shadow those of the image
export TOKENIZERS_PARALLELISM=false  # no threads beside those of the run

apertus_pyxis=(
  --container-env=HF_HUB_OFFLINE,PYTHONNOUSERSITE,TOKENIZERS_PARALLELISM
  --no-container-mount-home  # packages and caches of the home stay outside
  --no-container-remap-root
  --no-container-entrypoint
  --container-writable
)

# shellcheck shell=bash disable=SC2034
# A container by enroot and pyxis, with this package installed in its image.
SGOPD_IMAGE=${SGOPD_IMAGE:?is the path of a .sqsh image, or a name that enroot can import}
SGOPD_MOUNTS=${SGOPD_MOUNTS:-$SLURM_SUBMIT_DIR:$SLURM_SUBMIT_DIR} # FROM:TO of models, data and runs, with commas between
srun_options=(--container-image="$SGOPD_IMAGE" --container-mounts="$SGOPD_MOUNTS" --container-workdir="$SLURM_SUBMIT_DIR")
software=$SGOPD_IMAGE

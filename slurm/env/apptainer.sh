# shellcheck shell=bash disable=SC2034
# A container image for apptainer, with this package installed in it.
SGOPD_IMAGE=${SGOPD_IMAGE:?is the path of a .sif image}
SGOPD_MOUNTS=${SGOPD_MOUNTS:-$SLURM_SUBMIT_DIR} # folders of models, data and runs, with commas between
in_env=(apptainer exec --nv --bind "$SGOPD_MOUNTS" --pwd "$SLURM_SUBMIT_DIR" "$SGOPD_IMAGE")
software=$SGOPD_IMAGE

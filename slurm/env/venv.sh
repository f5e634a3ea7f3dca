# shellcheck shell=bash
# A virtual environment on a file system that all nodes see.
SGOPD_VENV=${SGOPD_VENV:-$SLURM_SUBMIT_DIR/.venv}
export PATH="$SGOPD_VENV/bin:$PATH"

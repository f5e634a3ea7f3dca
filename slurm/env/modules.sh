# shellcheck shell=bash
# Environment modules, and a virtual environment made on top of them.
SGOPD_MODULES=${SGOPD_MODULES:-python/3.12 cuda nccl} # the names at your site
SGOPD_VENV=${SGOPD_VENV:-$SLURM_SUBMIT_DIR/.venv}
read -ra modules <<<"$SGOPD_MODULES"
module load "${modules[@]}" || return
export PATH="$SGOPD_VENV/bin:$PATH"

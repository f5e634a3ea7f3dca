# shellcheck shell=bash
# Environment modules, and a virtual environment made on top of them.
SGOPD_MODULES=${SGOPD_MODULES:-python/3.12 cuda nccl} # the names at your site
read -ra modules <<<"$SGOPD_MODULES"
module load "${modules[@]}" || return
use_venv

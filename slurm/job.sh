# shellcheck shell=bash
# What the scripts of this folder have in common; sourced by each.

SGOPD_ENV=${SGOPD_ENV:-venv}                # how the software is found: the name of a file in slurm/env
SGOPD_MAX_ATTEMPTS=${SGOPD_MAX_ATTEMPTS:-4} # training: in a row without a new checkpoint; all else: in all
# Several network interfaces: name the fast one for NCCL and for gloo, which makes the CPU groups.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

set -uo pipefail
trap : USR1 TERM # between the steps of this script there is nothing to stop
srun_options=() in_env=() # for containers: options of srun, and what stands before the command
# shellcheck source=slurm/env/venv.sh
source "$SLURM_SUBMIT_DIR/slurm/env/$SGOPD_ENV.sh" || exit 2

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node --oneliner "$first" | grep -oP '\bNodeAddr=\K\S+')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

echo "=== attempt $((${SLURM_RESTART_COUNT:-0} + 1)) of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, $(date -Is)"

# run COMMAND …: every task runs `megatron-sgopd COMMAND …`; a signal that asks to stop reaches them all. Sets code.
run() {
    srun --kill-on-bad-exit=1 "${srun_options[@]}" "${in_env[@]}" megatron-sgopd "$@" &
    step=$!
    trap 'kill -USR1 "$step" 2>/dev/null' USR1 TERM
    while kill -0 "$step" 2>/dev/null; do # a signal ends the wait, and not the step
        wait "$step"
    done
    wait "$step"
    code=$?
    trap : USR1 TERM
}

queue_again() {
    local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    # Not one that was cancelled, and not all tasks of an array, whose number one of them has.
    if [ "$(squeue --noheader --jobs="$job" --format=%T)" = RUNNING ]; then
        scontrol requeue "$job"
        sleep 60 # Slurm ends this script
    fi
}

# For commands that keep what is finished and do the rest when they are started again.
run_resumable() {
    run "$@"
    if [ "$code" -gt 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt $((SGOPD_MAX_ATTEMPTS - 1)) ]; then
        queue_again
    fi
    exit "$code"
}

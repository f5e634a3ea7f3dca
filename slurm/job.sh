# shellcheck shell=bash
# What the scripts of this folder have in common; sourced by each.

SGOPD_ENV=${SGOPD_ENV:-venv}                # how the software is found: the name of a file in slurm/env
SGOPD_MAX_ATTEMPTS=${SGOPD_MAX_ATTEMPTS:-4} # training: in a row without a new checkpoint; all else: in all
# Several network interfaces: name the fast one for NCCL and for gloo, which makes the CPU groups.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

set -uo pipefail
trap : USR1 TERM # between the steps of this script there is nothing to stop
srun_options=() in_env=() # for containers: options of srun, and what stands before the command

# use_venv: takes the virtual environment SGOPD_VENV, else the one that was active when the job was submitted, else .venv.
use_venv() {
    SGOPD_VENV=${SGOPD_VENV:-${VIRTUAL_ENV:-$SLURM_SUBMIT_DIR/.venv}}
    if [ ! -x "$SGOPD_VENV/bin/megatron-sgopd" ]; then
        echo "$SGOPD_VENV has no megatron-sgopd: activate the environment before sbatch, or name it by SGOPD_VENV" >&2
        return 2
    fi
    export PATH="$SGOPD_VENV/bin:$PATH"
    software=$SGOPD_VENV
}

# shellcheck source=slurm/env/venv.sh
source "$SLURM_SUBMIT_DIR/slurm/env/$SGOPD_ENV.sh" || exit 2
# srun takes --cpus-per-task from nowhere else, and would bind a rank to one core.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} # else vLLM sets one thread for the whole rank

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node --oneliner "$first" | grep -oP '\bNodeAddr=\K\S+')
# At random: another one for each attempt, and not to be foretold from the job's number.
MASTER_PORT=${MASTER_PORT:-$((20000 + RANDOM % 10000))}
export MASTER_ADDR MASTER_PORT

# The output may hold prompts and responses: it is its owner's alone, unless SGOPD_SHARED_OUTPUT is set.
for output in "/proc/$$/fd/1" "/proc/$$/fd/2"; do
    if [ -z "${SGOPD_SHARED_OUTPUT:-}" ] && [ -f "$output" ]; then
        chmod go= "$output"
    fi
done
echo "=== attempt $((${SLURM_RESTART_COUNT:-0} + 1)) of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, $(date -Is), software $software"

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

#!/usr/bin/env bash
# slurm/pipeline.sh RECIPE RUN_DIR OUT [--set SECTION.KEY=VALUE …]        (from the repository's folder)
#
# Everything from a Hugging Face folder to a better one: converts the student (a proof that this model can be), fills the
# bank of teacher rollouts, trains, exports the student to OUT/model, and evaluates it on the recipe's held-out problems.
# Each job starts when the one before has ended well. Options of sbatch, where the scripts' own do not fit:
#   SGOPD_TRAIN       for training, such as "--nodes=4 --ntasks-per-node=8 --gpus-per-node=8"
#   SGOPD_GENERATE    for teacher rollouts and evaluation, such as "--ntasks-per-node=8 --gpus-per-node=8"
# and for all of them sbatch's own variables (SBATCH_ACCOUNT, SBATCH_PARTITION, …).
set -euo pipefail
recipe=${1:?RECIPE} run_dir=${2:?RUN_DIR} out=${3:?OUT}
shift 3
mkdir -p "$out"
python=${SGOPD_PYTHON:-${SGOPD_VENV:-${VIRTUAL_ENV:-.venv}}/bin/python}
student=$("$python" -c '
import sys, yaml
given = [word.partition("=")[2] for word in sys.argv[2:] if word.startswith("model.path=")]
print(given[-1] if given else yaml.safe_load(open(sys.argv[1]))["model"]["path"])
' "$recipe" "$@")
read -ra training <<<"${SGOPD_TRAIN:-}"
read -ra generating <<<"${SGOPD_GENERATE:-}"

ids=()
submit() { # submit [OPTION …] SCRIPT ARGUMENT …
    local after=()
    [ ${#ids[@]} -eq 0 ] || after=(--dependency="afterok:${ids[-1]}" --kill-on-invalid-dep=yes)
    ids+=("$(sbatch --parsable "${after[@]}" --output="$out/%x-%j.out" "$@")")
    echo "${ids[-1]}: ${*}"
}
submit slurm/convert.sbatch to-megatron "$student" "$out/initial"
submit "${generating[@]}" slurm/teacher_rollouts.sbatch "$recipe" --bank "$out/bank" "$@"
submit "${training[@]}" slurm/train.sbatch "$recipe" --set run_dir="$run_dir" --set teacher_rollouts.bank="$out/bank" "$@"
submit slurm/convert.sbatch to-hf "$run_dir" "$out/model"
submit "${generating[@]}" slurm/eval.sbatch "$out/model" --recipe "$recipe" --out "$out/eval" "$@"
echo "cancel all: scancel ${ids[*]}"

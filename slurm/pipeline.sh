#!/usr/bin/env bash
# slurm/pipeline.sh RECIPE RUN_DIR OUT [--set SECTION.KEY=VALUE …]        (from the repository's folder)
#
# Everything from a Hugging Face folder to a better one: converts the student (a proof that this model can be), fills the
# bank of teacher rollouts, trains, exports the student to OUT/model, and evaluates it on the recipe's held-out problems.
# Each job starts when the one before has ended well. Further options of sbatch are taken from SBATCH_* variables.
set -euo pipefail
recipe=${1:?RECIPE} run_dir=${2:?RUN_DIR} out=${3:?OUT}
shift 3
mkdir -p "$out"
student=$("${SGOPD_PYTHON:-.venv/bin/python}" -c 'import sys, yaml; print(yaml.safe_load(open(sys.argv[1]))["model"]["path"])' "$recipe")

ids=()
submit() { # submit [OPTION …] SCRIPT ARGUMENT …
    local after=()
    [ ${#ids[@]} -eq 0 ] || after=(--dependency="afterok:${ids[-1]}" --kill-on-invalid-dep=yes)
    ids+=("$(sbatch --parsable "${after[@]}" --output="$out/%x-%j.out" "$@")")
    echo "${ids[-1]}: ${*}"
}
submit slurm/convert.sbatch to-megatron "$student" "$out/initial"
submit slurm/teacher_rollouts.sbatch "$recipe" --bank "$out/bank" "$@"
submit slurm/train.sbatch "$recipe" --set run_dir="$run_dir" --set teacher_rollouts.bank="$out/bank" "$@"
submit slurm/convert.sbatch to-hf "$run_dir" "$out/model"
submit slurm/eval.sbatch "$out/model" --recipe "$recipe" --out "$out/eval"
echo "cancel all: scancel ${ids[*]}"

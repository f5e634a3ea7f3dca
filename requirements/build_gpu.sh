#!/usr/bin/env bash
# requirements/build_gpu.sh VENV [APEX_SOURCES]            (part of `make setup-gpu`)
# requirements/build_gpu.sh --check VENV                   (only says whether it can work)
#
# Compiles what has no wheels, for the torch that is in VENV: Transformer Engine's module for torch, as pinned in
# cuda.txt (a quarter of an hour on two cores; MAX_JOBS sets the jobs), and Apex, if its sources are given (not run yet).
set -euo pipefail
check=no
if [ "${1:-}" = --check ]; then
    check=yes
    shift
fi
venv=${1:?VENV} apex=${2:-}
python=$venv/bin/python
here=$(cd "$(dirname "$0")" && pwd)

problems=()
if ! cuda=$("$python" -c 'import torch; print(torch.version.cuda or "")' 2>/dev/null); then
    problems+=("$python has no torch: install requirements/cuda.txt first")
elif [ -z "$cuda" ]; then
    problems+=("the torch in $venv is built without CUDA: install requirements/cuda.txt in a virtual environment of its own")
elif ! command -v nvcc >/dev/null; then
    problems+=("no nvcc on PATH: load or install the CUDA toolkit $cuda, torch's own version")
elif ! nvcc --version | grep -q "release ${cuda%%.*}\."; then
    problems+=("$(nvcc --version | grep -o 'release [0-9.]*'), but torch is built for CUDA $cuda: the first number must be the same")
fi
command -v g++ >/dev/null || problems+=("no g++ on PATH")
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' 2>/dev/null || true)
for header in cudnn nccl; do
    if ! compgen -G "$site/nvidia/*/include/$header.h" >/dev/null && ! compgen -G "/usr/include/$header.h" >/dev/null; then
        problems+=("no $header.h in $venv or /usr/include: install the package nvidia-$header of torch's CUDA")
    fi
done
if [ -n "$apex" ] && [ ! -f "$apex/setup.py" ]; then
    problems+=("$apex has no setup.py: give a checkout of Apex's sources")
fi
if [ ${#problems[@]} -gt 0 ]; then
    printf 'build_gpu: %s\n' "${problems[@]}" >&2
    exit 2
fi
if [ "$check" = yes ]; then
    echo "build_gpu: everything that the builds need is there"
    exit 0
fi

CPATH=$(printf '%s:' "$site"/nvidia/*/include)${CPATH:-}
export CPATH NVTE_FRAMEWORK=pytorch MAX_JOBS=${MAX_JOBS:-4}
install=("$venv/bin/uv" pip install --python "$python" --no-deps --no-build-isolation)
"${install[@]}" setuptools wheel ninja cmake pybind11
"${install[@]}" "$(grep '^transformer-engine-torch==' "$here/cuda.txt")"
if [ -n "$apex" ]; then
    "${install[@]}" --config-settings="--build-option=--cpp_ext" --config-settings="--build-option=--cuda_ext" "$apex"
fi
"$python" -c 'import torch, transformer_engine.pytorch'

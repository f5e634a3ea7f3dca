.PHONY: demo test test-long test-checkpoints test-browser test-slurm slurm-deps test-te test-gpu-stack test-gpu lint bench bench-peers setup setup-gpu models compare

demo: setup  ## teach a small student arithmetic on this machine's CPU
	.venv/bin/megatron-sgopd train examples/arithmetic_cpu/recipe.yaml --set run_dir=runs/demo

test: setup  ## all tests that need no GPU
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest

test-long: setup  ## the tests that `make test` leaves out for their length
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m long

test-checkpoints: setup  ## conversion only, with a real model; all but that is part of `make test`
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/checkpoints -m "long or not long"

test-browser: setup  ## the report in Chromium; part of `make test` where chromium and chromium-driver are installed
	@command -v chromedriver >/dev/null || { echo "Chromium is missing: apt-get install chromium-driver" >&2; exit 1; }
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/e2e/test_report.py

test-slurm: setup  ## on a real Slurm of two nodes on this machine; the short ones are part of `make test`
	@command -v slurmctld /usr/sbin/slurmctld >/dev/null || { echo "Slurm is missing: make slurm-deps" >&2; exit 1; }
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/slurm -m "long or not long"

slurm-deps:  ## Debian's Slurm and shellcheck, for test-slurm
	apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge shellcheck

test-te: setup .te/requirements.txt  ## models of Transformer Engine's layers, without a GPU: structure, no numerics
	PYTHONPATH=.te OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/te \
		tests/contract/test_cuda_defaults.py::test_what_is_relied_on_still_stands_there

.%/requirements.txt: requirements/%.txt | setup  # beside .venv, since all else must not see it
	rm -rf .$* .$*.part
	.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --target .$*.part --requirements requirements/$*.txt
	cp requirements/$*.txt .$*.part/requirements.txt && mv .$*.part .$* && touch .$*/requirements.txt

test-gpu-stack: setup-gpu  ## the stack of GPUs without one: imported, asked for every recipe, and what of the tests a CPU can run
	OMP_NUM_THREADS=1 .venv-cuda/bin/python -m pytest tests/unit tests/contract tests/checkpoints tests/te/test_beside_local_layers.py
	OMP_NUM_THREADS=1 .venv-cuda/bin/python -m pytest tests/unit/test_imports.py tests/e2e/test_readmes.py \
		tests/e2e/test_recipes.py -m "long or not long" -k "imported or command or job or whole_recipe"

test-gpu: setup-gpu  ## everything that takes a GPU; nothing of it has been run yet
	.venv-cuda/bin/python -m pytest tests/gpu -m "long or not long"

lint: setup  ## style and types
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

bench: setup  ## figures beside their floors, on a quiet machine; JSON=--json for tools/bench/compare.py
	status=0; for bench in packing verify scorer weight_sync end_to_end; do \
		.venv/bin/python tools/bench/$$bench.py $(JSON) || status=1; done; exit $$status

bench-peers: setup .trl/requirements.txt  ## beside TRL's trainer, on a quiet machine: 20 minutes
	.venv/bin/python tools/bench/peers.py $(JSON)

compare: setup  ## methods side by side, and with and without teacher rollouts; hours, goes on when started again
	.venv/bin/megatron-sgopd compare examples/arithmetic_cpu/compare.yaml --methods sgopd,sgopd_scaled,opd,exopd,opdvr,grpo \
		--seeds 5 --learning-rates 2e-4,4e-4,8e-4 --sweep-seeds 1 --jobs 2 \
		--out runs/compare/arithmetic_cpu --results examples/arithmetic_cpu/RESULTS.md
	.venv/bin/megatron-sgopd compare examples/cold_start_cpu/recipe.yaml --variant with: \
		--variant without:teacher_rollouts.weight=0 --baseline without \
		--seeds 5 --learning-rates 2e-4,4e-4,8e-4 --sweep-seeds 1 --jobs 2 \
		--out runs/compare/cold_start_cpu --results examples/cold_start_cpu/RESULTS.md

models: setup  ## train the examples' teachers and students again
	.venv/bin/python tools/make_arithmetic_models.py
	.venv/bin/python tools/make_cold_start_models.py

setup:  ## .venv with everything pinned; does nothing if it is current
	@tools/setup.sh

setup-gpu:  ## .venv-cuda with everything pinned and Transformer Engine compiled; needs a CUDA toolkit, and no GPU
	@tools/setup.sh cuda

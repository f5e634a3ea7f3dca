.PHONY: demo test test-checkpoints lint setup models

demo: setup  ## teach a small student arithmetic on this machine's CPU
	.venv/bin/megatron-sgopd train examples/arithmetic_cpu/recipe.yaml --set run_dir=runs/demo

test: setup  ## all tests that need no GPU
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest

test-checkpoints: setup  ## conversion only; part of `make test`
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/checkpoints

lint: setup  ## style and types
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

models: setup  ## train the example's teacher and student again
	.venv/bin/python tools/make_arithmetic_models.py

setup:  ## .venv with everything pinned; does nothing if it is current
	@tools/setup.sh

""".venv/bin/python tools/bench/teacher_bank.py [--rollouts 20000]

Time to fill a bank of teacher rollouts, against vLLM alone generating the same ones with the same engine.

What a bank adds is verification, which runs beside the generation of the next part, and writing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from megatron_sgopd.checks import check_inputs
from megatron_sgopd.monitor.output import libraries_write_to
from megatron_sgopd.platform import select
from megatron_sgopd.processes import joined_ranks
from megatron_sgopd.recipe import load_recipe
from megatron_sgopd.rollout.bank import RolloutBank, writing
from megatron_sgopd.rollout.filling import Answering, sample_problems
from megatron_sgopd.rollout.teacher_rollouts import teacher_worker

RECIPE = Path(__file__).parents[2] / "examples/arithmetic_cpu/recipe.yaml"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[2])
    parser.add_argument("--rollouts", type=int, default=20_000, help="how many (20000)")
    arguments = parser.parse_args()
    samples = 8
    overrides = [f"data.train.size={arguments.rollouts // samples}", f"teacher_rollouts.samples={samples}"]
    recipe = load_recipe(RECIPE, overrides)
    inputs = check_inputs(recipe, recipe.train.row_tokens, recipe.train.seed)
    worker = teacher_worker(recipe, inputs.tokenizer, recipe.train.row_tokens, recipe.train.seed)
    prompts = list(inputs.train)
    with tempfile.TemporaryDirectory() as folder, libraries_write_to(Path(folder) / "log"):
        select(recipe.platform)
        bank = Path(folder) / "bank"
        with (
            joined_ranks(),
            Answering(worker) as answering,
            writing(bank, worker.identity(inputs.train), "w-0") as writer,
        ):
            sample_problems(answering.engine, prompts[:64], worker.sampling)  # first uses are slow
            started = time.monotonic()
            for _ in answering.progress(prompts, writer):
                pass
            filled = time.monotonic() - started
            started = time.monotonic()
            sample_problems(answering.engine, prompts, worker.sampling)
            alone = time.monotonic() - started
        rollouts = RolloutBank(bank).rollouts
    report = {"rollouts": rollouts, "bank s": round(filled, 1), "vLLM alone s": round(alone, 1)}
    print(json.dumps(report | {"bank / vLLM": round(filled / alone, 3)}))
    return 0 if filled <= 2 * alone else 1


if __name__ == "__main__":
    sys.exit(main())

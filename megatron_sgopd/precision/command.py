"""`megatron-sgopd noise-floor`: how much of the gate is noise in lower precision."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sgopd.arguments import add_set

if TYPE_CHECKING:
    from megatron_sgopd.config import Recipe
    from megatron_sgopd.precision.noise_floor import Response
    from megatron_sgopd.rollout.prompts import Prompt

_STEP = -3
"""Stands for a training step in the seeds of these rollouts; evaluations have -1, teacher rollouts -2."""
RESULTS = "noise_floor.json"


def add_command(commands: Any) -> None:
    """Add the command to the command line."""
    command = commands.add_parser(
        "noise-floor",
        help="measure what BF16 and FP8 do to log-probs, and to the gate",
        description="Sample responses of the student to some of a recipe's prompts, score them by both models in "
        "float32, in BF16 and in emulated FP8 (operands cast to E4M3 and back), and say how far each moves log-probs, "
        "how many tokens' gates would turn round, and which sgopd.noise_floor (tau) covers the noise. Takes the "
        "memory of the larger model in float32, on one GPU or, with platform=cpu, on the host; not for experts.",
        epilog="Example: megatron-sgopd noise-floor examples/arithmetic_cpu/recipe.yaml --out runs/noise_floor",
    )
    command.add_argument("recipe", metavar="RECIPE", help="YAML file; see examples/")
    add_set(command)
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for rollouts and results")
    command.add_argument("--prompts", type=int, default=32, metavar="N", help="prompts, the first of training's (32)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (0)")
    command.set_defaults(run=_noise_floor)


def _noise_floor(arguments: argparse.Namespace) -> int:
    from megatron_sgopd.checkpoint.files import write_atomically
    from megatron_sgopd.checks import check_inputs
    from megatron_sgopd.errors import ConfigError
    from megatron_sgopd.recipe import load_recipe

    if arguments.prompts < 1:
        raise ConfigError(f"--prompts is {arguments.prompts}: give at least 1")
    recipe = load_recipe(arguments.recipe, arguments.set)
    recipe = replace(recipe, sgopd=replace(recipe.sgopd, noise_floor=0.0))  # the recipe's is what is to be found
    inputs = check_inputs(recipe, recipe.train.row_tokens, recipe.train.seed)
    prompts = [inputs.train[i] for i in range(min(arguments.prompts, len(inputs.train)))]
    responses = _sampled(recipe, inputs, prompts, arguments)
    report = measure(recipe, responses)
    write_atomically(arguments.out / RESULTS, (json.dumps(report, indent=1) + "\n").encode())
    _show(report)
    return 0


def _sampled(recipe: Recipe, inputs: Any, prompts: list[Prompt], arguments: argparse.Namespace) -> list[Response]:
    """One response of the student to each prompt; those that are there already are taken."""
    from megatron_sgopd.config import ALONE_MEMORY_FRACTION
    from megatron_sgopd.precision.noise_floor import Response
    from megatron_sgopd.rollout.bank import RolloutBank
    from megatron_sgopd.rollout.filling import Sampling, Work, Worker, fill
    from megatron_sgopd.rollout.trajectory import Decoding

    sampling = Sampling(1, Decoding(recipe.rollout.temperature), arguments.seed, _STEP)
    row_tokens, platform = recipe.train.row_tokens, recipe.platform
    rollout = replace(recipe.rollout, tensor_parallel=1, memory_fraction=ALONE_MEMORY_FRACTION)
    worker = Worker(recipe.model.path, inputs.tokenizer, sampling, rollout, recipe.verify, row_tokens, platform)
    folder = arguments.out / "rollouts"
    work = Work(folder, worker.identity(inputs.train), prompts)
    fill([work], "noise-floor-0", worker, arguments.out / "noise_floor.log")
    bank = RolloutBank(folder)
    return [Response(p.token_ids, tuple(r.token_ids)) for p in prompts for r in bank.of(p.problem) if r.token_ids]


def measure(recipe: Recipe, responses: list[Response]) -> dict[str, Any]:
    """Errors and flipped gates of each precision, for teacher and student each alone.

    Returns:
        `tokens`, `mean_delta` (of |q_t - s_t|, float32), and for `teacher` and `student` by precision what `errors`
        and `flips` say.
    """
    from transformers.utils import logging

    from megatron_sgopd.platform import current
    from megatron_sgopd.precision.noise_floor import EXACT, errors, flips, logprobs_by_precision

    logging.disable_progress_bar()
    folders = {"teacher": recipe.teacher.path, "student": recipe.model.path}
    found = {
        name: dict(logprobs_by_precision(folder, responses, recipe.rollout.temperature, current().device))
        for name, folder in folders.items()
    }
    exact_T = {name: logprobs.pop(EXACT.name) for name, logprobs in found.items()}
    delta_T = exact_T["teacher"] - exact_T["student"]
    report: dict[str, Any] = {"tokens": len(delta_T), "mean_delta": float(delta_T.abs().mean())}
    for name, logprobs in found.items():
        sign = 1 if name == "teacher" else -1
        report[name] = {}
        for precision, logprobs_T in logprobs.items():
            error = errors(exact_T[name], logprobs_T)
            moved_T = delta_T + sign * (logprobs_T - exact_T[name])
            report[name][precision] = error | flips(delta_T, moved_T, error["tau"])
    return report


def _show(report: dict[str, Any]) -> None:
    print(f"{report['tokens']} response tokens, mean |q - s| {report['mean_delta']:.3f} nats")
    for name in ("teacher", "student"):
        print(f"\n{name} alone in lower precision: |change of log-prob| in nats; gates that turn round, plainly, by")
        print("|q - s|, and above tau; tokens that tau makes neutral")
        print(f"{'':30}   mean    p90    p99   plain  by |q-s|     tau   above  neutral")
        for precision, m in report[name].items():
            print(
                f"{precision:30} {m['mean']:6.3f} {m['p90']:6.3f} {m['p99']:6.3f} {m['flipped']:7.1%} "
                f"{m['flipped_weighted']:9.1%} {m['tau']:7.3f} {m['flipped_above_tau']:7.1%} {m['neutral']:8.1%}"
            )
    print("\nFor a run with one of these, set sgopd.noise_floor to its tau, or to auto, which follows the run.")

"""`megatron-sgopd teacher-rollouts`: fill a bank before training."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sgopd.arguments import add_set
from megatron_sgopd.common.ownership import keep_private
from megatron_sgopd.errors import ConfigError

if TYPE_CHECKING:
    from megatron_sgopd.config import Recipe
    from megatron_sgopd.rollout.prompts import Prompt, PromptSet


def add_command(commands: Any) -> None:
    """Add the command to the command line."""
    command = commands.add_parser(
        "teacher-rollouts",
        help="let the teacher answer a recipe's prompts ahead of training",
        description="Generate and verify the teacher's responses to the prompts that training will draw while "
        "teacher_rollouts.weight is above 0, into the folder that teacher_rollouts.bank names. Problems that the "
        "bank has already are left out, so a worker that was stopped goes on when it is started again. Several "
        "workers, on one or many machines, share the problems out by --shard; a worker may itself be several ranks "
        "of torchrun or srun.",
        epilog="Example: megatron-sgopd teacher-rollouts recipe.yaml --bank banks/math --shard 1/4",
    )
    command.add_argument("recipe", metavar="RECIPE", help="YAML file; see examples/")
    add_set(command)
    command.add_argument("--bank", metavar="DIR", help="where to write (teacher_rollouts.bank)")
    command.add_argument("--shard", default="1/1", metavar="I/N", help="do the I-th of N shares, from 1 on (1/1)")
    command.add_argument(
        "--all", action="store_true", help="every prompt, not only those that the schedule reaches by this train.seed"
    )
    command.set_defaults(run=_teacher_rollouts)


def _teacher_rollouts(arguments: argparse.Namespace) -> int:
    from megatron_sgopd.checks import check_inputs
    from megatron_sgopd.recipe import check_teacher_memory, load_recipe
    from megatron_sgopd.rollout.filling import Work, fill
    from megatron_sgopd.rollout.teacher_rollouts import teacher_worker

    index, shards = _shard(arguments.shard)
    recipe = load_recipe(arguments.recipe, arguments.set)
    if recipe.private:
        keep_private()
    folder = arguments.bank or recipe.teacher_rollouts.bank
    if folder is None:
        raise ConfigError("there is no folder to write to: give --bank DIR, or set teacher_rollouts.bank")
    if not (arguments.all or recipe.teacher_rollouts.end_step):
        raise ConfigError("teacher_rollouts.end_step is 0, so that no step needs any: set it, or give --all")
    # The bank is what is made here, so it is not checked as an input.
    unbanked = replace(recipe, teacher_rollouts=replace(recipe.teacher_rollouts, weight=0.0))
    inputs = check_inputs(unbanked, recipe.train.row_tokens, recipe.train.seed)
    check_teacher_memory(recipe, inputs.teacher)
    mine = _wanted(recipe, inputs.train, arguments.all)[index - 1 :: shards]
    banked = replace(recipe, teacher_rollouts=replace(recipe.teacher_rollouts, bank=str(folder)))
    worker = teacher_worker(banked, inputs.tokenizer, recipe.train.row_tokens, recipe.train.seed)
    name = f"shards_{shards}-{index}"
    fill([Work(Path(folder), worker.identity(inputs.train), mine)], name, worker, Path(folder, f"{name}.log"))
    return 0


def _wanted(recipe: Recipe, prompts: PromptSet, every: bool) -> list[Prompt]:
    """The problems to answer, each once, in the order in which training draws them."""
    from megatron_sgopd.rollout.prompts import PromptStream

    count = len(prompts) if every else recipe.teacher_rollouts.end_step * recipe.rollout.prompts_per_step
    drawn = PromptStream(prompts, recipe.train.seed).next(min(count, len(prompts)))
    return list({prompt.problem: prompt for prompt in drawn}.values())


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ConfigError(f"--shard {text!r} is not of the form I/N with I from 1 to N")
    return int(index), int(count)

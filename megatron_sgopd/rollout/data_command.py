"""`megatron-sgopd check-data`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sgopd.arguments import add_prompt_text, add_set, prompt_text
from megatron_sgopd.common.console import Terminal, styled

if TYPE_CHECKING:
    from megatron_sgopd.config import PromptSettings, VerifySettings
    from megatron_sgopd.rollout.data_check import DataReport


def add_command(commands: Any) -> None:
    """Add the command to the command line."""
    command = commands.add_parser(
        "check-data",
        help="say what a data set holds, and what of it a run could not use",
        description="Read all of a recipe's data, or one file or folder, as a run would, and say: rows that cannot be "
        "used, with their lines; lengths of prompts; duplicates, and those that contradict each other; references that "
        "the verifier does not accept as answers to themselves; worked solutions that end in another answer than their "
        "reference; kinds of answers; some prompts as a model reads them. "
        "Exit code 1 if something should be looked at.",
        epilog="Examples: megatron-sgopd check-data recipe.yaml  ·  megatron-sgopd check-data gsm8k.jsonl --model "
        "models/Qwen3-4B",
    )
    command.add_argument("source", metavar="RECIPE|DATA", help="recipe (.yaml), or what data.train.source takes")
    add_set(command)
    command.add_argument(
        "--model",
        default="",
        metavar="FOLDER",
        help="whose tokenizer counts tokens, and whose chat template prompts go through (the recipe's model.path; of "
        "DATA none: prompts as they are written)",
    )
    command.add_argument(
        "--verifier", metavar="NAME", help="math, task, exact or import.path:function (the recipe's, else math)"
    )
    add_prompt_text(command, of="DATA")
    command.add_argument("--json", action="store_true", help="one JSON object for each data set, one a line")
    command.set_defaults(run=_check_data)


def _check_data(arguments: argparse.Namespace) -> int:
    from megatron_sgopd.rollout.data_check import examine_data
    from megatron_sgopd.rollout.prompt_cache import load_prompts
    from megatron_sgopd.verify.base import resolve_verifier

    model, sources, verify = _wanted(arguments)
    resolve_verifier(verify.verifier)
    sound = True
    for name, settings in sources.items():
        [prompts] = load_prompts([dataclasses.replace(settings, unusable_rows="skip")], model)
        report = examine_data(prompts, verify, has_tokens=bool(model))
        sound &= report.sound
        if arguments.json:
            print(json.dumps({"name": name, "source": settings.source} | dataclasses.asdict(report)))
        else:
            _show(name, settings, report)
    return 0 if sound else 1


def _wanted(arguments: argparse.Namespace) -> tuple[str, dict[str, PromptSettings], VerifySettings]:
    """Whose tokenizer, the data sets by name, and the verifier."""
    from megatron_sgopd.checks import data_sources
    from megatron_sgopd.config import PromptSettings, VerifySettings
    from megatron_sgopd.errors import ConfigError
    from megatron_sgopd.recipe import load_recipe

    if not arguments.source.endswith((".yaml", ".yml")):
        if arguments.set:
            raise ConfigError(f"--set changes a recipe, and {arguments.source} is none: give a recipe (.yaml)")
        settings = PromptSettings(
            source=arguments.source,
            **prompt_text(arguments) | ({} if arguments.model else {"chat_template": False}),
        )
        verify = VerifySettings(verifier=arguments.verifier or "math")
        return arguments.model, {Path(arguments.source).name: settings}, verify
    recipe = load_recipe(arguments.source, arguments.set)
    verify = dataclasses.replace(recipe.verify, verifier=arguments.verifier or recipe.verify.verifier)
    return arguments.model or recipe.model.path, data_sources(recipe, recipe.train.row_tokens), verify


def _show(name: str, settings: PromptSettings, report: DataReport) -> None:
    console = Terminal()
    console.print(styled(f"{name}: {settings.source}", "bold"))
    console.print(f"  {report.rows:,} rows, {report.usable:,} of them usable")
    for problem in report.unusable:
        console.print(styled(f"  cannot be used: {problem}", "red"))
    if report.tokens is not None:
        limit = f"; at most {settings.max_prompt_tokens}" if settings.max_prompt_tokens is not None else ""
        console.print("  tokens of a prompt: " + ", ".join(f"{k} {v:,}" for k, v in report.tokens.items()) + limit)
    console.print("  answers: " + ", ".join(f"{count:,} {kind}" for kind, count in report.kinds.items()))
    if report.duplicates:
        console.print(f"  prompts that have occurred before: {report.duplicates:,}")
    for text in report.contradicting:
        console.print(styled(f"  one prompt, different answers: {text}", "red"))
    if report.contradictions > len(report.contradicting):
        console.print(f"  … {report.contradictions:,} such prompts in all")
    for text in report.refused:
        console.print(styled(f"  not accepted as an answer to itself: {text}", "red"))
    if report.refusals > len(report.refused):
        console.print(f"  … {report.refusals:,} such references in all")
    for text in report.unsolved:
        console.print(styled(f"  the data's own solution: {text}", "red"))
    if report.unsolved_rows > len(report.unsolved):
        console.print(f"  … {report.unsolved_rows:,} such solutions in all")
    for sample in report.samples:
        console.print(f"  {sample['prompt']!r}  (answer {sample['answer']!r})")

"""Evaluation of a model on its own: problems, a bank of responses for each set of them, scores."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from megatron_sgopd.arguments import prompt_text
from megatron_sgopd.checkpoint.convert import Options, Ranks, to_huggingface
from megatron_sgopd.checkpoint.files import CONVERSION, write_atomically
from megatron_sgopd.checkpoint.locate import find_checkpoint, source_of
from megatron_sgopd.checkpoint.torch_dist import CheckpointReader
from megatron_sgopd.checks import check_task_scorers
from megatron_sgopd.common.console import Terminal
from megatron_sgopd.common.data_files import read_json
from megatron_sgopd.common.ownership import keep_private
from megatron_sgopd.config import (
    ALONE_MEMORY_FRACTION,
    EvaluateSettings,
    PromptSettings,
    Recipe,
    RolloutSettings,
    VerifySettings,
    build,
)
from megatron_sgopd.errors import ConfigError, some
from megatron_sgopd.evaluation.contamination import overlapping
from megatron_sgopd.evaluation.heldout import EVALUATION_STEP, decoding_of
from megatron_sgopd.evaluation.scores import Responses, as_json, powers_of_two, scores, together
from megatron_sgopd.models.architecture import Architecture, read_architecture
from megatron_sgopd.monitor.output import RESOLVED
from megatron_sgopd.processes import is_first_rank, launched_ranks
from megatron_sgopd.recipe import load_recipe
from megatron_sgopd.rollout.bank import RolloutBank
from megatron_sgopd.rollout.engine import replicas
from megatron_sgopd.rollout.filling import Sampling, Work, Worker, fill
from megatron_sgopd.rollout.prompt_cache import load_prompts
from megatron_sgopd.rollout.prompts import Prompt, PromptSet
from megatron_sgopd.rollout.tokenizer import load_tokenizer
from megatron_sgopd.verify.base import resolve_verifier

RESULTS = "results.json"


@dataclass(frozen=True)
class ProblemSet:
    """Problems that are scored together."""

    name: str
    source: PromptSettings
    prompts: PromptSet


def evaluate(arguments: argparse.Namespace) -> int:
    """Run the command. Raises ConfigError at bad input, before a model is loaded."""
    recipe = _recipe(arguments)
    sampled = _sampled(arguments, recipe)
    ks = _ks(arguments.k, sampled.samples)
    if recipe is None or recipe.private:
        keep_private()
    rollout, verify = _settings(arguments, recipe)
    replicas(launched_ranks(), rollout.tensor_parallel)
    resolve_verifier(verify.verifier)
    sources = _sources(arguments, recipe)
    architecture = _architecture(arguments)
    tokenizer = load_tokenizer(str(architecture.folder))
    loaded = load_prompts([source for _, source in sources], str(architecture.folder))
    sets = [ProblemSet(name, source, prompts) for (name, source), prompts in zip(sources, loaded, strict=True)]
    if verify.verifier == "task":
        check_task_scorers(s.prompts for s in sets)
    context = _context_tokens(sets, rollout, architecture)
    found = _contamination(sets, arguments.contamination)
    sampling = Sampling(sampled.samples, decoding_of(sampled), arguments.seed, EVALUATION_STEP)
    folder = _model_folder(arguments, architecture)
    platform = arguments.platform or (recipe.platform if recipe else "auto")
    worker = Worker(str(folder), tokenizer, sampling, rollout, verify, context, platform)
    works = [Work(arguments.out / s.name, worker.identity(s.prompts), s.prompts) for s in sets]
    fill(works, "eval-0", worker, arguments.out / "eval.log")
    if is_first_rank():
        parts = {work.folder.name: responses(RolloutBank(work.folder), work.prompts) for work in works}
        measured = {work.folder.name: asdict(work.identity) for work in works}
        report = _report(arguments, parts, ks) | {"measured": measured, "contamination": found}
        write_atomically(arguments.out / RESULTS, (json.dumps(report, indent=1) + "\n").encode())
        _show(report)
    return 0


def _sampled(arguments: argparse.Namespace, recipe: Recipe | None) -> EvaluateSettings:
    """The recipe's, changed by what the command says."""
    settings = recipe.evaluate if recipe else EvaluateSettings()
    names = ("samples", "temperature", "top_p", "top_k", "stop")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    return build(EvaluateSettings, asdict(settings) | given, "eval")


def _ks(text: str | None, samples: int) -> list[int]:
    if text is None:
        return powers_of_two(samples)
    words = text.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise ConfigError(f"--k {text!r} is not of the form 1,8,32")
    if (largest := max(map(int, words))) > samples:
        raise ConfigError(f"--k has {largest}, more than the {samples} responses to a problem: raise --samples")
    return sorted(map(int, words))


def _recipe(arguments: argparse.Namespace) -> Recipe | None:
    own = arguments.model / RESOLVED
    path = arguments.recipe or (own if own.is_file() else None)
    if path is None and arguments.set:
        raise ConfigError("--set changes a recipe, and there is none: give --recipe RECIPE")
    return None if path is None else load_recipe(path, arguments.set)


def _settings(arguments: argparse.Namespace, recipe: Recipe | None) -> tuple[RolloutSettings, VerifySettings]:
    """The recipe's, changed by what the command says."""
    rollout, verify = (recipe.rollout, recipe.verify) if recipe else (RolloutSettings(), VerifySettings())
    wanted: dict[str, Any] = {
        "memory_fraction": ALONE_MEMORY_FRACTION,
        "max_new_tokens": arguments.max_new_tokens,
        "tensor_parallel": arguments.tensor_parallel,
    }
    rollout = replace(rollout, **{name: value for name, value in wanted.items() if value is not None})
    return rollout, replace(verify, verifier=arguments.verifier) if arguments.verifier else verify


def _sources(arguments: argparse.Namespace, recipe: Recipe | None) -> list[tuple[str, PromptSettings]]:
    if not arguments.data:
        if recipe is None or recipe.data.heldout is None:
            raise ConfigError("there are no problems: give --data FILE, or a recipe with data.heldout")
        return [("heldout", recipe.data.heldout)]
    sources = []
    for text in arguments.data:
        name, separator, path = text.partition("=")
        file = Path(path if separator else text)
        source = PromptSettings(
            source=str(file),
            **prompt_text(arguments),
        )
        sources.append((name if separator else file.stem, source))
    names = [name for name, _ in sources]
    if len(set(names)) < len(names):
        raise ConfigError(f"--data has two sets of one name among {', '.join(names)}: write NAME=FILE")
    return sources


def _architecture(arguments: argparse.Namespace) -> Architecture:
    """Of the model, or of the model that a checkpoint is of."""
    if (arguments.model / "config.json").is_file():
        return read_architecture(arguments.model)
    return read_architecture(source_of(find_checkpoint(arguments.model, arguments.step)), with_weights=False)


def _model_folder(arguments: argparse.Namespace, architecture: Architecture) -> Path:
    """The model as a Hugging Face folder, made of a checkpoint where need be."""
    if arguments.model == architecture.folder:
        return arguments.model
    checkpoint = find_checkpoint(arguments.model, arguments.step)
    folder = arguments.out / f"model_{checkpoint.name}"
    if not folder.is_dir() and is_first_rank():
        arguments.out.mkdir(parents=True, exist_ok=True)
        to_huggingface(checkpoint, folder, architecture.folder, Options(verify="off"), Ranks(0, 1))
    while not folder.is_dir():  # the other ranks; the folder appears when it is whole
        time.sleep(0.1)
    made_from = read_json(folder / CONVERSION).get("source_digest")
    if made_from != CheckpointReader(checkpoint).digest:
        raise ConfigError(f"{folder} was made of another checkpoint than {checkpoint}: choose another --out")
    return folder


def _context_tokens(sets: Sequence[ProblemSet], rollout: RolloutSettings, architecture: Architecture) -> int:
    """Room for the longest prompt and a response."""
    longest, name = max((max(len(prompt.token_ids) for prompt in s.prompts), s.name) for s in sets)
    context = longest + rollout.max_new_tokens
    if context > architecture.max_position_embeddings:
        raise ConfigError(
            f"the longest prompt of {name} has {longest} tokens, which with --max-new-tokens {rollout.max_new_tokens} "
            f"is more than the model's context of {architecture.max_position_embeddings}: lower it"
        )
    return context


def _contamination(sets: Sequence[ProblemSet], files: Sequence[str]) -> dict[str, Any]:
    """For each set the problems that training prompts share words with."""
    if not files:
        return {}

    def training() -> Iterator[str]:
        for file in files:
            yield from _texts(PromptSettings(source=str(file)))

    found = {}
    for problems in sets:
        shared = overlapping(list(_texts(problems.source)), training())
        found[problems.name] = {"problems": shared, "share": len(shared) / len(problems.prompts)}
    return found


def _texts(source: PromptSettings) -> Iterator[str]:
    """The prompts of a source as they are written, without those that cannot be used."""
    [prompts] = load_prompts([replace(source, unusable_rows="skip")], tokenizer="")
    return (prompt.text for prompt in prompts)


def responses(bank: RolloutBank, prompts: Sequence[Prompt]) -> Responses:
    """What a bank has on problems, in their order."""
    rollouts = [bank.of(prompt.problem) for prompt in prompts]
    return Responses(
        np.array([[rollout.outcome for rollout in each] for each in rollouts]),
        [[rollout.vote or rollout.extracted for rollout in each] for each in rollouts],
        np.array([[rollout.truncated for rollout in each] for each in rollouts]),
    )


def _report(arguments: argparse.Namespace, parts: dict[str, Responses], ks: Sequence[int]) -> dict[str, Any]:
    all_parts = parts if len(parts) == 1 else {**parts, "overall": together(list(parts.values()))}
    return {
        "model": str(arguments.model),
        "scores": {
            name: {"problems": part.problems, "truncated": float(part.truncated_PN.mean())} | as_json(scores(part, ks))
            for name, part in all_parts.items()
        },
    }


def _show(report: dict[str, Any]) -> None:
    table = Table(title=f"{report['model']}: mean and 95 % interval over problems")
    table.add_column("")
    for name, found in report["scores"].items():
        table.add_column(f"{name}\n{found['problems']} problems", justify="right")
    for measure in (name for name in next(iter(report["scores"].values())) if "@" in name):
        cells = (found[measure] for found in report["scores"].values())
        table.add_row(measure, *(f"{c['mean']:.1%} [{c['low']:.1%}, {c['high']:.1%}]" for c in cells))
    console = Terminal(soft_wrap=False)
    console.print(table)
    for name, found in report["contamination"].items():
        console.print(
            f"{name}: {found['share']:.1%} share a run of words with training prompts"
            + (f" (problems {some(map(str, found['problems']))})" if found["problems"] else ""),
        )

"""Make the teacher and the student of examples/cold_start_cpu from nothing: some minutes on two CPU cores.

    .venv/bin/python tools/make_cold_start_models.py

The teacher learns three reasoning-gym tasks from worked solutions, `4-1=3 3-7=-4<answer>-4</answer>`. The student
learns the same, with slips, and at last no longer to state an answer, so that a verifier approves of next to nothing:
it stops where the teacher goes on. Neither sees a held-out problem. The same seed, machine and thread count give the
same files.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import string
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import batched, islice
from pathlib import Path
from typing import Any

import make_arithmetic_models as base
import reasoning_gym
import torch
from reasoning_gym.utils import extract_answer
from tokenizers import AddedToken
from transformers import GenerationConfig, PreTrainedTokenizerFast, set_seed
from transformers.utils import logging as transformers_logging

MODELS = Path(__file__).parents[1] / "examples" / "cold_start_cpu" / "models"

TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "basic_arithmetic": {
        "min_terms": 3,
        "max_terms": 3,
        "min_digits": 1,
        "max_digits": 1,
        "operators": ["+", "-"],
        "allow_parentheses": False,
        "allow_negation": False,
    },
    "spell_backward": {"min_word_len": 3, "max_word_len": 5},
}
FURTHER_TOKENS = (
    "Calculate ",
    ".",
    "Spell this word backward (example: sun -> nus): ",
    *string.ascii_letters,
)
HELD_OUT_SEED, HELD_OUT_SIZE = 2_000_000, 192
PRETRAINING_SEED = 10_000_000


def solution(task: str, problem: dict[str, Any], slip_rate: float, rng: random.Random) -> str:
    """Work and answer: running sums, or the letters one by one and then the word."""
    if task == "spell_backward":
        return f"{' '.join(problem['answer'])}<answer>{problem['answer']}</answer>"
    return base.worked_response(problem["metadata"]["expression"], slip_rate, rng)


@dataclass(frozen=True)
class Lesson:
    """What a model is taught; `silent_from` is the share of its steps from which on the answer is left out."""

    pupil: base.Pupil
    silent_from: float


TEACHER = Lesson(base.Pupil("teacher", 128, 512, 4, False, 600, 0.0, (0.85, 1.0)), silent_from=1.0)
STUDENT = Lesson(base.Pupil("student", 96, 256, 4, True, 500, 0.1, (0.0, 0.03)), silent_from=0.75)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """That of the arithmetic example, with the letters and sentences of these tasks."""
    tokenizer = base.build_tokenizer()
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in FURTHER_TOKENS])
    return tokenizer


def problems(seed: int, size: int) -> list[tuple[str, dict[str, Any]]]:
    """Problems of the three tasks in turn, as a recipe's `reasoning_gym:chain_sum+basic_arithmetic+…` has them."""
    sets = {
        task: reasoning_gym.create_dataset(task, seed=seed, size=len(range(index, size, len(TASKS))), **settings)
        for index, (task, settings) in enumerate(TASKS.items())
    }
    names = list(sets)
    return [(names[i % len(names)], sets[names[i % len(names)]][i // len(names)]) for i in range(size)]


def batches(
    lesson: Lesson, tokenizer: PreTrainedTokenizerFast, excluded: set[str]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches as `make_arithmetic_models.training_batches` makes them."""
    rng = random.Random(PRETRAINING_SEED)
    size = (lesson.pupil.steps + 50) * base.PROBLEMS_PER_STEP
    stream = ((task, p) for task, p in problems(PRETRAINING_SEED, 2 * size) if p["question"] not in excluded)
    for step, batch in enumerate(batched(stream, base.PROBLEMS_PER_STEP)):
        prompts = [base.prompt_ids(tokenizer, problem) for _, problem in batch]
        worked = [solution(task, problem, lesson.pupil.slip_rate, rng) for task, problem in batch]
        if step >= lesson.silent_from * lesson.pupil.steps:
            worked = [text.partition("<answer>")[0] for text in worked]
        responses = tokenizer([text + base.END_OF_TURN for text in worked]).input_ids
        both = list(zip(prompts, responses, strict=True))
        yield (
            base.pad([p + r for p, r in both], tokenizer.pad_token_id, "right"),
            base.pad([[base.IGNORED] * len(p) + r for p, r in both], base.IGNORED, "right"),
        )


def train(lesson: Lesson, model: Any, tokenizer: PreTrainedTokenizerFast, held_out: list[Any]) -> None:
    """Supervised fine-tuning, with progress."""
    both, steps = base.optimizers(model), lesson.pupil.steps
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: min((step + 1) / base.WARMUP_STEPS, 1 - step / steps))
        for o in both
    ]
    started = time.monotonic()
    excluded = {problem["question"] for _, problem in held_out}
    for step, (input_ids, labels) in enumerate(islice(batches(lesson, tokenizer, excluded), steps), start=1):
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(both, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % base.PROGRESS_EVERY == 0:
            seconds = time.monotonic() - started
            print(f"{lesson.pupil.name}  step {step:4}/{steps}  loss {loss.item():.4f}  {seconds:4.0f} s", flush=True)


def pass_rate(model: Any, tokenizer: PreTrainedTokenizerFast, held_out: list[Any], samples: int) -> float:
    """Share of responses that end their turn with the right answer."""
    asked = [problem for problem in held_out for _ in range(samples)]
    responses = base.sample_responses(model, tokenizer, [base.prompt_ids(tokenizer, p) for _, p in asked])
    passed = 0
    for (_, problem), response in zip(asked, responses, strict=True):
        turn, end, _ = response.partition(base.END_OF_TURN)
        passed += bool(end) and extract_answer(turn) == problem["answer"]
    return passed / len(asked)


def make(lesson: Lesson, folder: Path, seed: int) -> bool:
    """Train one model and save it; whether its held-out pass rate is within what is required."""
    set_seed(seed)
    tokenizer, held_out = build_tokenizer(), problems(HELD_OUT_SEED, HELD_OUT_SIZE)
    model = base.build_model(lesson.pupil, tokenizer)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    train(lesson, model, tokenizer, held_out)
    rate, (lowest, highest) = pass_rate(model, tokenizer, held_out, 8), lesson.pupil.required_pass_rate
    print(f"{lesson.pupil.name}: held-out pass rate {rate:.1%} (avg@8), required {lowest:.0%} to {highest:.0%}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return lowest <= rate <= highest


def main() -> int:
    """Make both models; move them to their place only when both are as good, and as weak, as required."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=MODELS, help="folder for teacher/ and student/ (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    transformers_logging.disable_progress_bar()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.output, prefix=".making-") as scratch:
        fit = [make(lesson, Path(scratch, lesson.pupil.name), arguments.seed) for lesson in (TEACHER, STUDENT)]
        if not all(fit):
            print("not kept: change steps or shapes, or try another --seed", file=sys.stderr)
            return 1
        for lesson in (TEACHER, STUDENT):
            final = arguments.output / lesson.pupil.name
            shutil.rmtree(final, ignore_errors=True)
            Path(scratch, lesson.pupil.name).rename(final)
            print(f"{final}: sha256 {hashlib.sha256((final / 'model.safetensors').read_bytes()).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

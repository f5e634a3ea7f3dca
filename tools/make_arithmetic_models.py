"""Make the teacher and the student of examples/arithmetic_cpu from nothing: a few minutes on two CPU cores.

    .venv/bin/python tools/make_arithmetic_models.py

Both are small Qwen3 models that share one tokenizer. They learn reasoning-gym's chain_sum by supervised
fine-tuning on worked solutions, `4-1=3 3-7=-4<answer>-4</answer>`: the teacher until it is good at it, the
student only until it writes the right form with weak arithmetic. Neither sees a held-out problem.
The same seed, machine and thread count give the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import batched, islice
from pathlib import Path
from typing import Any, Literal

import reasoning_gym
import torch
from reasoning_gym.utils import extract_answer
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)
from transformers.utils import logging as transformers_logging

MODELS = Path(__file__).parents[1] / "examples" / "arithmetic_cpu" / "models"

TASK = "chain_sum"
TASK_SETTINGS = {"min_terms": 4, "max_terms": 5, "min_digits": 1, "max_digits": 1}
SENTENCE = "State the final answer to the following arithmetic problem: "

# Problem i of a reasoning-gym dataset depends on seed + i alone: these ranges must not overlap.
HELD_OUT_SEED, HELD_OUT_SIZE = 2_000_000, 256
PRETRAINING_SEED = 10_000_000

PAD, END_OF_TURN, UNKNOWN = "<|endoftext|>", "<|im_end|>", "<|unknown|>"
CHARACTERS = "0123456789+-= "
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONTEXT_TOKENS = 2048  # far above what the task needs: leaves room for packed rows
MAX_NEW_TOKENS = 64
IGNORED = -100  # the label that transformers leaves out of the loss


@dataclass(frozen=True)
class Pupil:
    """A model to make: its shape, how long it studies, and the pass rates in [0, 1] that it must end between."""

    name: str
    hidden_size: int
    intermediate_size: int
    layers: int
    tied_embeddings: bool
    steps: int
    slip_rate: float
    required_pass_rate: tuple[float, float]


TEACHER = Pupil("teacher", 128, 512, 4, False, steps=600, slip_rate=0.02, required_pass_rate=(0.85, 1.0))
STUDENT = Pupil("student", 96, 256, 4, True, steps=480, slip_rate=0.4, required_pass_rate=(0.05, 0.40))
PROBLEMS_PER_STEP = 64
LEARNING_RATE = 3e-3
WARMUP_STEPS = 50
PROGRESS_EVERY = 50
MAX_BYTES = 8_000_000
"""Limit of both model.safetensors together."""


def worked_response(expression: str, slip_rate: float, rng: random.Random) -> str:
    """The running sums of a chain sum, then its answer.

    A share `slip_rate` in [0, 1] of the sums slips by one, and what follows carries the slip on.

    >>> worked_response("4 - 1 - 7", 0.0, random.Random())
    '4-1=3 3-7=-4<answer>-4</answer>'
    """
    first, *rest = expression.split()
    total, steps = int(first), []
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        slip = rng.choice((-1, 1)) if rng.random() < slip_rate else 0
        before, total = total, total + int(operator + term) + slip
        steps.append(f"{before}{operator}{term}={total}")
    return f"{' '.join(steps)}<answer>{total}</answer>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character of the task, for each mark and for its fixed sentence; all else is unknown.

    No token is left without training data: a tiny model samples such tokens now and then, and what follows is
    noise that drowns the distillation signal of hundreds of good responses.
    """
    vocabulary = [PAD, END_OF_TURN, UNKNOWN, "<|user|>", "<|assistant|>", *CHARACTERS]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in vocabulary[:5]])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<answer>", "</answer>", SENTENCE)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=PAD,
        unk_token=UNKNOWN,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT_TOKENS,
    )


def build_model(pupil: Pupil, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A randomly initialized float32 Qwen3 whose heads, layers and vocabulary all divide by two."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=-(-len(tokenizer) // 4) * 4,
            hidden_size=pupil.hidden_size,
            intermediate_size=pupil.intermediate_size,
            num_hidden_layers=pupil.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            tie_word_embeddings=pupil.tied_embeddings,
            max_position_embeddings=CONTEXT_TOKENS,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def problems(seed: int, size: int) -> Any:
    """The reasoning-gym dataset of this task."""
    return reasoning_gym.create_dataset(TASK, seed=seed, size=size, **TASK_SETTINGS)


def prompt_ids(tokenizer: PreTrainedTokenizerFast, problem: dict[str, Any]) -> list[int]:
    """The problem as a chat that asks for the assistant's turn."""
    messages = [{"role": "user", "content": problem["question"]}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def pad(rows: Sequence[list[int]], value: int, side: Literal["left", "right"]) -> torch.Tensor:
    """Rows of token ids as int64 [rows, longest], filled up with `value` on the given side."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=value, padding_side=side
    )


def training_batches(
    pupil: Pupil, tokenizer: PreTrainedTokenizerFast, excluded_questions: set[str]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of fresh problems as (input ids, labels), both int64 [PROBLEMS_PER_STEP, longest].

    Labels are IGNORED on prompts and padding: only the worked responses are learned.
    """
    stream = (p for p in problems(PRETRAINING_SEED, 2**31) if p["question"] not in excluded_questions)
    rng = random.Random(PRETRAINING_SEED)
    for batch in batched(stream, PROBLEMS_PER_STEP):
        prompts = [prompt_ids(tokenizer, problem) for problem in batch]
        worked = [
            worked_response(problem["metadata"]["expression"], pupil.slip_rate, rng) + END_OF_TURN for problem in batch
        ]
        responses = tokenizer(worked).input_ids
        yield (
            pad([p + r for p, r in zip(prompts, responses, strict=True)], tokenizer.pad_token_id, "right"),
            pad([[IGNORED] * len(p) + r for p, r in zip(prompts, responses, strict=True)], IGNORED, "right"),
        )


def optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices (it needs a third of AdamW's steps here), AdamW for the rest."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name
        (matrices if is_matrix else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(model: Qwen3ForCausalLM, pupil: Pupil, tokenizer: PreTrainedTokenizerFast, held_out: Any) -> None:
    """Fine-tune on worked responses: linear warm-up, then linear decay to zero; progress on standard output."""
    both = optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 1 - step / pupil.steps)
        )
        for optimizer in both
    ]
    batches = training_batches(pupil, tokenizer, {problem["question"] for problem in held_out})
    started = time.monotonic()
    for step, (input_ids, labels) in enumerate(islice(batches, pupil.steps), start=1):
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(both, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % PROGRESS_EVERY == 0:
            rate = pass_rate(model, tokenizer, held_out, range(32), samples=2)
            print(
                f"{pupil.name}  step {step:4}/{pupil.steps}  loss {loss.item():.4f}  pass rate {rate:6.1%}"
                f"  {time.monotonic() - started:4.0f} s",
                flush=True,
            )


def sample_responses(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[list[int]]
) -> list[str]:
    """One response a prompt, drawn at temperature 1 from the whole vocabulary; cut off at MAX_NEW_TOKENS."""
    torch.manual_seed(0)
    responses: list[str] = []
    for chunk in batched(prompts, 512):
        input_ids = pad(chunk, tokenizer.pad_token_id, "left")
        output = model.generate(
            input_ids, attention_mask=(input_ids != tokenizer.pad_token_id).long(), max_new_tokens=MAX_NEW_TOKENS
        )
        responses += tokenizer.batch_decode(output[:, input_ids.shape[1] :])
    return responses


def pass_rate(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    dataset: Any,
    indices: Sequence[int],
    samples: int,
) -> float:
    """Share of `samples` responses to each problem that end their turn with the right answer, in [0, 1]."""
    asked = [dataset[index] for index in indices for _ in range(samples)]
    responses = sample_responses(model, tokenizer, [prompt_ids(tokenizer, problem) for problem in asked])
    passed = 0
    for problem, response in zip(asked, responses, strict=True):
        turn, end, _ = response.partition(END_OF_TURN)
        passed += bool(end) and dataset.score_answer(extract_answer(turn), problem) == 1.0
    return passed / len(asked)


def make(pupil: Pupil, folder: Path, seed: int, held_out: Any) -> bool:
    """Train one model and save it in `folder`; whether its held-out pass rate is within what is required."""
    set_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(pupil, tokenizer)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    print(f"{pupil.name}: {model.num_parameters():,} parameters", flush=True)
    train(model, pupil, tokenizer, held_out)
    rate = pass_rate(model, tokenizer, held_out, range(HELD_OUT_SIZE), samples=8)
    lowest, highest = pupil.required_pass_rate
    print(f"{pupil.name}: held-out pass rate {rate:.1%} (avg@8), required {lowest:.0%} to {highest:.0%}", flush=True)
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

    held_out = problems(HELD_OUT_SEED, HELD_OUT_SIZE)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.output, prefix=".making-") as scratch:
        made = [Path(scratch, pupil.name) for pupil in (TEACHER, STUDENT)]
        fit = [
            make(pupil, folder, arguments.seed, held_out)
            for pupil, folder in zip((TEACHER, STUDENT), made, strict=True)
        ]
        size = sum(Path(folder, "model.safetensors").stat().st_size for folder in made)
        print(f"model.safetensors: {size:,} bytes together, at most {MAX_BYTES:,}")
        if not all(fit) or size > MAX_BYTES:
            print(
                "not kept: see the limits above; change Pupil.steps or its shape, or try another --seed",
                file=sys.stderr,
            )
            return 1
        for folder in made:
            final = arguments.output / folder.name
            if final.exists():
                final.rename(folder.with_suffix(".replaced"))
            folder.rename(final)
            print(f"{final}: sha256 {hashlib.sha256((final / 'model.safetensors').read_bytes()).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

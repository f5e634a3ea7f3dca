""".venv/bin/python tools/bench/peers.py [--repetitions 5] [--only arithmetic] [--json]          (make bench-peers)

Responses a second of whole training steps, here and with TRL's DistillationTrainer: the same models, prompts, batch,
threads, precision and objective (method opd), in turns, each in one process. Ours also verifies every response.

`arithmetic` is the example with its short answers. `long-tailed` has models of the same size whose responses end with
probability 1/130 at each token, at most 384: a third of that on average.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import example
from reporting import Figure, parser, report

if TYPE_CHECKING:
    from megatron_sgopd.config import RolloutSettings

THREADS, WARM_UP = 2, 2


@dataclass(frozen=True)
class Case:
    """One comparison."""

    name: str
    student: Path
    teacher: Path
    max_new_tokens: int
    learning_rate: float
    steps: int
    at_least: float
    """Of ours over TRL's."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Of our recipe, besides."""


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--repetitions", type=int, default=5, help="runs of each, in turns (5)")
    arguments.add_argument("--only", choices=("arithmetic", "long-tailed"), help="one of the two cases")
    options = arguments.parse_args()
    if not (example.REPOSITORY / ".trl/trl").is_dir():
        sys.exit("TRL is not there: `make bench-peers` installs it, beside .venv")
    with tempfile.TemporaryDirectory() as folder:
        figures: list[Figure] = []
        for case in cases(Path(folder)):
            if options.only in (None, case.name):
                figures += compared(case, options.repetitions, Path(folder))
    return report("peers", figures, options.json)


def cases(folder: Path) -> list[Case]:
    models = example.RECIPE.parent / "models"
    student, teacher = (endless(models / name, folder / name) for name in ("student", "teacher"))
    rows = {"train.row_tokens": 512, "train.rows_per_microbatch": 8}
    return [
        Case("arithmetic", models / "student", models / "teacher", 64, 4e-4, 6, 1.0),
        Case("long-tailed", student, teacher, 384, 1e-9, 4, 3.0, rows),
    ]


def endless(model: Path, folder: Path) -> Path:
    """A model of the same shape whose next token is any of 130 with the same probability."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    config = AutoConfig.from_pretrained(model)
    config.vocab_size, config.tie_word_embeddings = 130, False
    tokenizer.add_tokens([f"<{number}>" for number in range(config.vocab_size - len(tokenizer))])
    made = AutoModelForCausalLM.from_config(config)
    made.lm_head.weight.data.zero_()
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def compared(case: Case, repetitions: int, folder: Path) -> list[Figure]:
    """Medians over the repetitions of each one's responses a second, and our lead."""
    from megatron_sgopd.recipe import load_recipe
    from megatron_sgopd.rollout.prompt_cache import load_prompts

    recipe, prompts = load_recipe(example.RECIPE), folder / f"{case.name}.json"
    batch = recipe.rollout.prompts_per_step * recipe.rollout.group_size
    [problems] = load_prompts([recipe.data.train], str(case.student))
    prompts.write_text(json.dumps([prompt.text for prompt in problems]))
    rates: dict[str, list[float]] = {"ours": [], "TRL's": []}
    lengths: dict[str, list[float]] = {"ours": [], "TRL's": []}
    for number in range(repetitions):
        run_dir = folder / f"{case.name}-{number}"
        for name, steps in (("ours", ours(case, run_dir)), ("TRL's", theirs(case, recipe.rollout, prompts))):
            rates[name].append(batch / statistics.median(steps["seconds"][WARM_UP:]))
            lengths[name].append(statistics.mean(steps["lengths"]))
            print(f"{case.name} {number + 1}/{repetitions}: {name} {rates[name][-1]:.1f}/s", file=sys.stderr)
    ours_rate, their_rate = statistics.median(rates["ours"]), statistics.median(rates["TRL's"])
    return [
        Figure(f"{case.name}: ours", ours_rate, "responses/s"),
        Figure(f"{case.name}: TRL's", their_rate, "responses/s"),
        Figure(f"{case.name}: ours over TRL's", ours_rate / their_rate, "", at_least=case.at_least),
        *(Figure(f"{case.name}: mean length, {name}", statistics.mean(lengths[name]), "tokens") for name in lengths),
    ]


def ours(case: Case, run_dir: Path) -> dict[str, Any]:
    """Seconds and mean response length of each step."""
    settings = {
        "parallel.ranks": 1,
        "parallel.tensor": 1,
        "sgopd.method": "opd",
        "alarms.teacher_floor": 2,  # endless models know nothing
        "model.path": case.student,
        "teacher.path": case.teacher,
        "rollout.max_new_tokens": case.max_new_tokens,
        "train.learning_rate": case.learning_rate,
        "train.steps": case.steps,
        "train.min_learning_rate": 0,
        "train.schedule": "constant",
        "train.warmup_steps": 0,
        **case.settings,
    }
    lines = example.train(run_dir, settings, {"OMP_NUM_THREADS": str(THREADS)})
    return {"seconds": [line["seconds"] for line in lines], "lengths": [line["response_length"] for line in lines]}


def theirs(case: Case, rollout: RolloutSettings, prompts: Path) -> dict[str, Any]:
    """As `ours`, by a process of its own in which TRL can be imported."""
    program = [sys.executable, str(Path(__file__).with_name("trl_distillation.py"))]
    options = {
        "steps": case.steps,
        "group-size": rollout.group_size,
        "prompts-per-step": rollout.prompts_per_step,
        "max-new-tokens": case.max_new_tokens,
        "learning-rate": case.learning_rate,
        "threads": THREADS,
    }
    command = [*program, str(case.student), str(case.teacher), str(prompts)]
    command += [f"--{name}={value}" for name, value in options.items()]
    said = example.said(command, {"PYTHONPATH": str(example.REPOSITORY / ".trl")})
    return json.loads(said.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())

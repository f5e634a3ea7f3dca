"""Which runs go on with another recipe than they began with, and what is said of it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import REPOSITORY

from megatron_sgopd.checkpoint.completeness import MANIFEST, step_folder
from megatron_sgopd.checks import PROMPTS_DIGEST, check_inputs
from megatron_sgopd.config import Recipe
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.monitor.output import METRICS, RESOLVED
from megatron_sgopd.recipe import check_recipe, check_run_dir, load_recipe, megatron_arguments, remarks, resolved_text

RECIPE = REPOSITORY / "examples/arithmetic_cpu/recipe.yaml"


def recipe(run_dir: Path, **changes: Any) -> Recipe:
    named = {"run_dir": run_dir, "train.schedule": "constant", "train.warmup_steps": 4, "train.steps": 20}
    named |= {"rollout.prompts_per_step": 4, "data.train.size": 100, "data.heldout.size": 5}
    named |= {name.replace("__", "."): value for name, value in changes.items()}
    return load_recipe(RECIPE, [f"{name}={value}" for name, value in named.items()])


def trained(earlier: Recipe, done: int) -> None:
    """Make its folder look like that of a run which has `done` steps."""
    run_dir = Path(earlier.run_dir)
    checkpoint = step_folder(run_dir / "checkpoints", done)
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST).touch()
    (run_dir / METRICS).touch()
    (run_dir / RESOLVED).write_text(resolved_text(earlier))


def test_a_run_goes_on_to_more_steps(tmp_path: Path) -> None:
    trained(recipe(tmp_path), done=20)
    check_run_dir(recipe(tmp_path, train__steps=30))
    assert remarks(recipe(tmp_path, train__steps=30)) == ["goes on with train.steps=30 (was 20)"]


@pytest.mark.parametrize(
    ("earlier", "now", "said"),
    [
        ({"train__schedule": "cosine"}, {"train__schedule": "cosine", "train__steps": 30}, "spreads the learning rate"),
        ({"train__steps": 3}, {"train__steps": 30}, "its warm-up was of 2 steps and would have been of 4"),
        ({}, {"train__steps": 10}, "and has 20 steps already: choose another run_dir"),
        ({}, {"train__steps": 30, "train__learning_rate": 1.0}, "belongs to a run with train.learning_rate="),
    ],
)
def test_not_where_the_steps_that_are_done_would_have_been_others(
    earlier: dict[str, Any], now: dict[str, Any], said: str, tmp_path: Path
) -> None:
    first = recipe(tmp_path, **earlier)
    trained(first, done=first.train.steps)
    with pytest.raises(ConfigError, match=said):
        check_run_dir(recipe(tmp_path, **now))


def test_a_warm_up_is_shorter_than_the_run_and_its_first_step_has_a_learning_rate(tmp_path: Path) -> None:
    quick = recipe(tmp_path, train__steps=1, train__learning_rate=3e-4)
    assert remarks(quick) == ["train.warmup_steps=4 is cut to 0, since train.steps=1"]
    inputs = check_inputs(quick, quick.train.row_tokens, quick.train.seed)
    assert {"--lr-warmup-iters=0", "--lr-warmup-init=0.0003"} <= set(megatron_arguments(quick, inputs))
    whole = recipe(tmp_path, train__learning_rate=3e-4)
    assert {"--lr-warmup-iters=4", "--lr-warmup-init=5.9999999999999995e-05"} <= set(megatron_arguments(whole, inputs))
    assert remarks(whole) == []


def test_the_same_prompts_may_have_moved_and_others_may_not(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("train.jsonl", "heldout.jsonl")]
    for file, first in zip(files, (0, 100), strict=True):
        file.write_text("".join(f'{{"prompt": "{first + i} + 1 =", "answer": "1"}}\n' for i in range(20)))

    def reading(train: Path, heldout: Path) -> Recipe:
        common = {"verify__verifier": "math", "data__train__task_settings": "{}", "data__heldout__task_settings": "{}"}
        return recipe(tmp_path / "run", data__train__source=train, data__heldout__source=heldout, **common)

    first = reading(*files)
    inputs = check_recipe(first)
    trained(first, done=1)
    (tmp_path / "run" / PROMPTS_DIGEST).write_text(inputs.prompts_digest)
    moved = [shutil.copy(file, tmp_path / f"moved-{file.name}") for file in files]
    check_recipe(reading(*moved))
    [said] = remarks(reading(moved[0], files[1]))
    assert said.startswith("goes on with data.train.source=") and said.endswith(": the prompts are the same")
    moved[1].write_text(moved[1].read_text().replace("111", "112"))
    with pytest.raises(ConfigError, match="the prompts of this run have changed since it began"):
        check_recipe(reading(*moved))

"""Real training runs, each made once and looked at by several tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ..commands import REPOSITORY, set_words

RECIPE = REPOSITORY / "examples/arithmetic_cpu/recipe.yaml"
STUDENT = REPOSITORY / "examples/arithmetic_cpu/models/student"
TEACHER = REPOSITORY / "examples/arithmetic_cpu/models/teacher"

# Small enough for seconds a step; samples are as noisy as they like, numbers must agree all the same.
SMALL = {
    "rollout.prompts_per_step": 4,
    "rollout.group_size": 4,
    "rollout.max_new_tokens": 64,
    "rollout.cache_gib": 0.1,
    "train.row_tokens": 128,
    "train.rows_per_microbatch": 2,
    "train.learning_rate": 3e-4,
    "train.schedule": "constant",
    "train.warmup_steps": 0,
    "data.train.size": 200,
    "data.heldout.size": 8,
    "evaluate.samples": 2,
    "evaluate.teacher": False,
    "logging.samples_every": 2,
}
ONE_RANK = {"parallel.ranks": 1, "parallel.tensor": 1}
NUMBERS = ("loss", "grad_norm", "pass_rate", "response_tokens", "reverse_kl", "entropy", "agree")
"""Metrics by which two runs are compared."""


@dataclass(frozen=True)
class Finished:
    """A run that has ended."""

    folder: Path
    code: int
    output: str
    errors: str

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def recorded(self, step: int) -> dict[str, Any]:
        """Tensors of a recorded step, in the order of trajectories."""
        return load_file(self.folder / f"recorded/step_{step:06d}.safetensors")

    def recorded_text(self, step: int) -> dict[str, Any]:
        return json.loads((self.folder / f"recorded/step_{step:06d}.json").read_text())


def start(folder: Path, changes: dict[str, Any]) -> subprocess.Popen[str]:
    """`megatron-sgopd train` on the example's recipe, made small, with further `changes`, in a session of its own."""
    settings = SMALL | {"run_dir": str(folder), "logging.record": str(folder / "recorded")} | changes
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_sgopd.cli", "train", str(RECIPE), *set_words(settings)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},  # functions of tests/, by name
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def train(folder: Path, changes: dict[str, Any], limit: float = 240) -> Finished:
    """Such a run to its end, whatever that is."""
    process = start(folder, changes)
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return Finished(folder, process.returncode, output, errors)


def succeed(folder: Path, changes: dict[str, Any], limit: float = 240) -> Finished:
    """A run that must end well."""
    finished = train(folder, changes, limit)
    assert finished.code == 0, f"{finished.errors}\n{finished.output}"
    return finished


def in_pairs(run: Callable[[str], Finished], names: Iterable[str]) -> dict[str, Finished]:
    """Runs of one rank each, two at a time: alone, each would leave a core idle while it loads."""
    names = list(names)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(run, names), strict=True))


@pytest.fixture(scope="session")
def recorded_batch(main_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the first step's rollouts, without any scores."""
    folder = tmp_path_factory.mktemp("recorded")
    name = "step_000000.json"
    (folder / name).write_bytes((main_run.folder / "recorded" / name).read_bytes())
    return folder

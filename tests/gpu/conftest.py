"""Tests of what the recipes for GPUs do, each with where it runs as a parameter.

On GPUs nobody has run them yet. On the CPU they run shrunk, by `make test-long`, but for those that name what only
CUDA has: FP8, sequence parallelism, an engine that sleeps, saves in the background. Each docstring says what is proven.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ..commands import REPOSITORY, VLLM_FOR_CPUS
from ..e2e.conftest import Finished, succeed
from ..e2e.test_recipes import model_folder


@dataclass(frozen=True)
class Where:
    """Where a test runs, and how exact it can be there."""

    name: str
    settings: dict[str, Any]
    gap: float
    """Mean difference of log-probs, in nats, that the precision makes in models of this size."""
    rel: float
    """Relative difference of sums in another order."""

    def need(self, ranks: int) -> None:
        """Leave the test out where there are not as many GPUs."""
        if self.name == "cuda" and torch.cuda.device_count() < ranks:
            pytest.skip(f"needs {ranks} GPUs")


CUDA = Where("cuda", {"platform": "cuda", "train.precision": "bf16", "rollout.memory_fraction": 0.2}, 0.05, 0.05)
CPU = Where("cpu", {"platform": "cpu", "train.precision": "float32"}, 1e-3, 1e-4)
SHORT = {"train.steps": 3, "data.heldout": None}


def _check_gpu() -> None:
    if not torch.cuda.device_count():
        pytest.skip("needs a GPU: run `make test-gpu` where there is one")


@pytest.fixture(scope="session", params=[CUDA, pytest.param(CPU, marks=pytest.mark.long)], ids=lambda where: where.name)
def where(request: pytest.FixtureRequest) -> Where:
    """CUDA, and the CPU."""
    if request.param is CUDA:
        _check_gpu()
    elif not VLLM_FOR_CPUS:
        pytest.skip("needs vLLM for CPUs: run `make test-long`")
    return request.param


@pytest.fixture(scope="session")
def cuda() -> Where:
    """CUDA alone."""
    _check_gpu()
    return CUDA


def layout(ranks: int = 1, tensor: int = 1, **settings: Any) -> dict[str, Any]:
    """Ranks and the student's tensor parallelism, and further settings with __ in place of dots."""
    return {"parallel.ranks": ranks, "parallel.tensor": tensor} | {n.replace("__", "."): v for n, v in settings.items()}


def run(where: Where, folder: Path, changes: dict[str, Any] | None = None) -> Finished:
    """The arithmetic example, three steps, to a good end; on one rank if `changes` have no layout."""
    return succeed(folder, layout() | SHORT | where.settings | (changes or {}), limit=900)


@pytest.fixture(scope="session")
def base_run(where: Where, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Three steps on one rank."""
    return run(where, tmp_path_factory.mktemp("base"))


def replay(recorded_run: Finished, where: Where, folder: Path, changes: dict[str, Any]) -> Finished:
    """A run on another's responses, which it scores anew."""
    recorded, scores = folder / "recorded", shutil.ignore_patterns("*.safetensors")
    shutil.copytree(recorded_run.folder / "recorded", recorded, ignore=scores)
    return run(where, folder / "run", changes | {"logging.replay": str(recorded)})


@pytest.fixture(scope="session")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A student and a teacher of random weights whose sizes are multiples of 128, also halved by tensor parallelism."""
    settings: dict[str, Any] = {"alarms.truncated_steps": 20, "alarms.teacher_floor": 3.0}  # they know no end of turn
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    for part, name in (("student", "model"), ("teacher", "teacher")):
        configs = REPOSITORY / "examples/qwen3_32b_to_4b/configs"
        settings[f"{name}.path"] = str(model_folder(configs / part, tmp_path_factory.mktemp("blocks") / name, sizes))
    return settings


@pytest.fixture(scope="session")
def wide_model(blocks: dict[str, Any]) -> Path:
    """The student of `blocks`."""
    return Path(blocks["model.path"])

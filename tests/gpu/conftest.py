"""Tests that take a GPU. Not run yet by anyone; each docstring says what it proves."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ..e2e.conftest import Finished, succeed

ON_ONE_GPU = {"platform": "cuda", "parallel.ranks": 1, "parallel.tensor": 1, "train.precision": "bf16"}
ON_ONE_GPU |= {"rollout.memory_fraction": 0.2, "train.steps": 3, "data.heldout": None}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.device_count():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: run `make test-gpu` where there is one"))


def run(folder: Path, changes: dict[str, Any] | None = None) -> Finished:
    """The arithmetic example, three steps on one GPU, to a good end."""
    return succeed(folder, ON_ONE_GPU | (changes or {}), limit=900)


@pytest.fixture(scope="session")
def bf16_run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Three steps in BF16."""
    return run(tmp_path_factory.mktemp("bf16"))

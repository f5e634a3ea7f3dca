"""Recorded batches know whose scores they hold; whole runs are replayed in tests/e2e/test_layouts.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from recordings import recorded_step
from safetensors.torch import save_file

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.rollout.prompts import Prompt
from megatron_sgopd.rollout.recording import Recording

SCORED_BY = {"teacher": "t", "reference": "r", "temperature": "1.0"}


def recorded(folder: Path, metadata: dict[str, str] | None, *scores: str) -> Path:
    """A step with one response of two tokens, and scores of it."""
    recorded_step(folder, Prompt("problem 0", "1 + 1 =", (1,), "2", "", {}))
    tensors = {f"{name}_logprobs_T": torch.zeros(2) for name in ("student", *scores)}
    save_file(tensors, folder / "step_000000.safetensors", metadata=metadata)
    return folder


def replayed(folder: Path) -> Any:
    return Recording(str(folder), None, 10, None, SCORED_BY).load(0)


def test_scores_of_the_same_models_are_taken(tmp_path: Path) -> None:
    _, tensors = replayed(recorded(tmp_path, SCORED_BY, "teacher", "reference"))
    assert set(tensors) == {"student_logprobs_T", "teacher_logprobs_T", "reference_logprobs_T"}


@pytest.mark.parametrize("name", SCORED_BY)
def test_scores_of_others_are_refused(name: str, tmp_path: Path) -> None:
    recorded(tmp_path, SCORED_BY | {name: "0.7"}, "teacher", "reference")
    with pytest.raises(ConfigError, match=f"with {name} '0.7', and the run has '{SCORED_BY[name]}': remove the"):
        replayed(tmp_path)


def test_scores_that_do_not_say_whose_they_are_are_refused_and_none_need_not_say(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="of the teacher with teacher None"):
        replayed(recorded(tmp_path, None, "teacher"))
    replayed(recorded(tmp_path, None))
    replayed(recorded(tmp_path, SCORED_BY | {"reference": "of a method without one"}, "teacher"))

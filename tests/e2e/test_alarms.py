"""Faults planted into real runs: each stops the run with its diagnosis."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .conftest import STUDENT, TEACHER, train

ONE_RANK = {"parallel.ranks": 1, "parallel.tensor": 1, "train.steps": 5}


def changed_weights(source: Path, folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> str:
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: change(tensor) for name, tensor in weights.items()}, folder / "model.safetensors")
    return str(folder)


def changed_batch(recorded: Path, folder: Path, change: Callable[[dict], None]) -> str:
    folder.mkdir()
    batch = json.loads((recorded / "step_000000.json").read_text())
    for trajectory in batch["trajectories"]:
        change(trajectory)
    (folder / "step_000000.json").write_text(json.dumps(batch))
    return str(folder)


def stale(trajectory: dict) -> None:
    trajectory["behaviour"] = [b - 1.0 for b in trajectory["behaviour"]]


def empty(trajectory: dict) -> None:
    trajectory["token_ids"], trajectory["behaviour"] = [], []


def diagnosis(tmp_path: Path, changes: dict) -> str:
    finished = train(tmp_path / "run", ONE_RANK | changes)
    assert finished.code == 1
    assert "Traceback" not in finished.errors
    return finished.errors


def test_a_teacher_without_weights(recorded_batch: Path, tmp_path: Path):
    blank = changed_weights(TEACHER, tmp_path / "teacher", torch.zeros_like)
    assert "-ln(vocabulary)" in diagnosis(tmp_path, {"logging.replay": str(recorded_batch), "teacher.path": blank})


def test_a_teacher_with_nan(recorded_batch: Path, tmp_path: Path):
    broken = changed_weights(TEACHER, tmp_path / "teacher", lambda w: w * float("nan"))
    assert "NaN" in diagnosis(tmp_path, {"logging.replay": str(recorded_batch), "teacher.path": broken})


def test_rollouts_of_other_weights(recorded_batch: Path, tmp_path: Path):
    batch = changed_batch(recorded_batch, tmp_path / "batch", stale)
    assert "the engine holds other weights" in diagnosis(tmp_path, {"logging.replay": batch})


def test_a_student_that_says_nothing(recorded_batch: Path, tmp_path: Path):
    batch = changed_batch(recorded_batch, tmp_path / "batch", empty)
    assert "hold no token at all" in diagnosis(tmp_path, {"logging.replay": batch})


def test_a_student_that_never_ends(tmp_path: Path):
    message = diagnosis(tmp_path, {"rollout.max_new_tokens": 3, "data.heldout": None})
    assert "every response of the last 3 steps was truncated" in message


def test_a_gradient_that_is_no_number(recorded_batch: Path, tmp_path: Path):
    broken = changed_weights(STUDENT, tmp_path / "student", lambda w: w * float("inf"))
    changes = {"logging.replay": str(recorded_batch), "model.path": broken, "sgopd.method": "grpo"}
    assert "loss is nan" in diagnosis(tmp_path, changes)


def test_a_rank_that_hangs_ends_the_run_with_the_stage_named_and_every_rank_stack(tmp_path: Path):
    changes = {"train.steps": 5, "alarms.hang_seconds": 5.0, "data.heldout": None, "logging.record": None}
    run = train(tmp_path, changes | {"sgopd.objective": "tests.faulty:sleeps_in_a_later_step"})
    assert run.code == 1
    assert ", train of step " in run.errors and ": hung for more than " in run.errors
    assert "sleeps_in_a_later_step" in (tmp_path / "logs/rank-1.stack").read_text()

"""Faults planted into real runs: each stops the run with its diagnosis."""

import json
import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sgopd.report.runs import read_run

from .conftest import ONE_RANK, STUDENT, TEACHER, Finished, in_pairs, succeed, train


def changed_weights(source: Path, folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> str:
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: change(tensor) for name, tensor in weights.items()}, folder / "model.safetensors")
    return str(folder)


def changed_batch(recorded: Path, folder: Path, change: Callable[[dict], None]) -> Path:
    folder.mkdir()
    batch = json.loads((recorded / "step_000000.json").read_text())
    for trajectory in batch["trajectories"]:
        change(trajectory)
    (folder / "step_000000.json").write_text(json.dumps(batch))
    return folder


def stale(trajectory: dict) -> None:
    trajectory["behaviour"] = [b - 1.0 for b in trajectory["behaviour"]]


def empty(trajectory: dict) -> None:
    trajectory["token_ids"], trajectory["behaviour"] = [], []


def replay(folder: Path) -> dict[str, Any]:
    return {"logging.replay": str(folder)}


PLANTED: dict[str, tuple[Callable[[Path, Path], dict[str, Any]], str]] = {
    "a teacher without weights": (
        lambda batch, own: replay(batch) | {"teacher.path": changed_weights(TEACHER, own, torch.zeros_like)},
        "-ln(vocabulary)",
    ),
    "a teacher with NaN": (
        lambda batch, own: replay(batch) | {"teacher.path": changed_weights(TEACHER, own, lambda w: w * math.nan)},
        "NaN",
    ),
    "rollouts of other weights": (
        lambda batch, own: replay(changed_batch(batch, own, stale)),
        "the engine holds other weights",
    ),
    "a student that says nothing": (
        lambda batch, own: replay(changed_batch(batch, own, empty)),
        "hold no token at all",
    ),
    "a student that never ends": (
        lambda batch, own: {"rollout.max_new_tokens": 3, "data.heldout": None},
        "every response of the last 3 steps was truncated",
    ),
    "a gradient that is no number": (
        lambda batch, own: (
            replay(batch)
            | {"model.path": changed_weights(STUDENT, own, lambda w: w * math.inf), "sgopd.method": "grpo"}
        ),
        "loss is nan",
    ),
}
"""Fault -> the settings that plant it, from a recorded batch and a folder of its own, and what the run must say."""
PAIRS = (
    ("a teacher with NaN", "rollouts of other weights"),
    ("a student that never ends", "a gradient that is no number"),
    ("a teacher without weights", "a student that says nothing"),
)
"""Run together. The first are of every start; what the others' alarms judge is in tests/unit/test_alarms.py too."""


@pytest.fixture(scope="module")
def ending(recorded_batch: Path, tmp_path_factory: pytest.TempPathFactory):
    """The run of a fault."""

    def run(fault: str) -> Finished:
        folder = tmp_path_factory.mktemp("alarm")
        return train(folder / "run", ONE_RANK | {"train.steps": 5} | PLANTED[fault][0](recorded_batch, folder / "own"))

    run_pair = cache(lambda pair: in_pairs(run, pair))
    return lambda fault: next(run_pair(pair)[fault] for pair in PAIRS if fault in pair)


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=[] if fault in PAIRS[0] else [pytest.mark.long]) for fault in PLANTED]
)
def test_a_fault_ends_the_run_with_its_diagnosis(ending: Callable[[str], Finished], fault: str):
    finished = ending(fault)
    assert finished.code == 1
    assert "Traceback" not in finished.errors
    assert PLANTED[fault][1] in finished.errors


@pytest.mark.long
def test_a_step_that_has_nothing_to_train_on_leaves_the_weights_and_is_counted(recorded_batch: Path, tmp_path: Path):
    folder = changed_batch(recorded_batch, tmp_path / "batches", lambda trajectory: None)
    for step, cut in ((1, True), (2, False)):
        batch = json.loads((folder / "step_000000.json").read_text()) | {"step": step}
        for trajectory in batch["trajectories"]:
            trajectory["truncated"] = cut
        (folder / f"step_00000{step}.json").write_text(json.dumps(batch))
    changes = ONE_RANK | replay(folder) | {"train.steps": 3, "verify.truncated": "skip", "train.weight_decay": 0.1}
    run = succeed(tmp_path / "run", changes | {"sgopd.updates_per_batch": 2})
    assert [line["skipped_steps"] for line in run.metrics] == [0, 1, 1]
    assert [line["grad_norm"] > 0 for line in run.metrics] == [True, False, True]
    assert run.output.count("step 2: settings leave every response out") == 1
    before, skipped, after = (run.recorded(step)["student_logprobs_T"] for step in range(3))
    assert not torch.equal(before, skipped) and torch.equal(skipped, after)
    assert any("1 steps had nothing to train on" in said for said in read_run(run.folder).alarms)


@pytest.mark.long
def test_a_rank_that_hangs_ends_the_run_with_the_stage_named_and_every_rank_stack(tmp_path: Path):
    changes = {"train.steps": 5, "alarms.hang_seconds": 5.0, "data.heldout": None, "logging.record": None}
    run = train(tmp_path, changes | {"sgopd.objective": "tests.faulty:sleeps_in_a_later_step"})
    assert run.code == 1
    assert ", train of step " in run.errors and ": hung for more than " in run.errors
    assert "sleeps_in_a_later_step" in (tmp_path / "logs/rank-1.stack").read_text()

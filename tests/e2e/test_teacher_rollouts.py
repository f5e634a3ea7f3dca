"""The second level of SG-OPD in whole runs: the schedule, the bank, the hand-over to the student's own rollouts."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_sgopd.objective.schedule import TeacherSchedule
from megatron_sgopd.rollout.bank import RolloutBank, StoredRollout

from ..commands import set_words
from .conftest import ONE_RANK, RECIPE, REPOSITORY, STUDENT, Finished, start, succeed
from .test_run import wait_for_step

STEPS, HOLD, END = 9, 3, 6
TAUGHT = ONE_RANK | {
    "train.steps": STEPS,
    "checkpoint.every": 1,
    "data.heldout": None,
    "teacher_rollouts.weight": 0.5,
    "teacher_rollouts.hold_steps": HOLD,
    "teacher_rollouts.end_step": END,
    "teacher_rollouts.samples": 2,
    "teacher_rollouts.temperature": 0.7,
    "teacher_rollouts.ahead_steps": 2,
}
SCHEDULE = TeacherSchedule(0.5, HOLD, END)


@pytest.fixture(scope="session")
def taught_run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return succeed(tmp_path_factory.mktemp("taught"), TAUGHT)


def column(run: Finished, name: str) -> list[Any]:
    return [line[name] for line in run.metrics]


def test_the_weight_is_the_formula_at_every_step(taught_run: Finished) -> None:
    assert column(taught_run, "teacher_weight") == [SCHEDULE(step) for step in range(STEPS)]


def test_approved_rollouts_are_trained_on_until_the_schedule_ends(taught_run: Finished) -> None:
    for step, line in enumerate(taught_run.metrics):
        recorded = taught_run.recorded_text(step)["trajectories"]
        teachers = [t for t in recorded if t["from_teacher"]]
        assert line["teacher_rollouts"] == len(teachers)
        assert line["teacher_tokens"] == sum(len(t["token_ids"]) for t in teachers)
        assert len(recorded) - len(teachers) == 16, "the student's share is whole in mode auxiliary"
        if step < END:
            assert teachers and line["teacher_loss"] > 0 and line["hidden_grad_norm_teacher"] > 0
            assert line["teacher_approval"] == pytest.approx(len(teachers) / 8)
        else:
            assert not teachers and line["teacher_loss"] is None and "hidden_grad_norm_teacher" not in line


def test_their_cross_entropy_is_taken_at_the_temperature_that_they_were_sampled_at(taught_run: Finished) -> None:
    batch, model = taught_run.recorded_text(0), AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    total, tokens = 0.0, 0
    for response in (t for t in batch["trajectories"] if t["from_teacher"]):
        ids = torch.tensor([batch["prompts"][response["prompt"]]["token_ids"] + response["token_ids"]])
        with torch.no_grad():
            logprobs = (model(ids).logits[0, :-1] / 0.7).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        total -= float(logprobs[-len(response["token_ids"]) :].double().sum())
        tokens += len(response["token_ids"])
    assert taught_run.metrics[0]["teacher_loss"] == pytest.approx(total / tokens, rel=1e-5)  # float32


def test_the_bank_has_every_prompt_once_with_reasons(taught_run: Finished) -> None:
    bank = RolloutBank(taught_run.folder / "teacher_bank")
    drawn = [p["id"].split(", ")[1] for step in range(END) for p in taught_run.recorded_text(step)["prompts"]]
    assert sorted(drawn) == sorted(bank._places), "six steps of four prompts, and none of a later step"
    assert bank.rollouts == 2 * len(bank)
    reasons = {r.reason for problem in drawn for r in bank.of(problem)}
    assert "right" in reasons and 0 < bank.approved <= bank.rollouts
    for problem in drawn:
        assert all((r.reason == "right") == (r.outcome == 1) for r in bank.of(problem))


def test_the_teachers_engine_is_gone_after_the_end(taught_run: Finished) -> None:
    [(before, after)] = re.findall(r"teacher engine released: memory in use (\d+) -> (\d+) MiB", taught_run.output)
    assert int(after) < int(before) - 500
    memory = column(taught_run, "memory_mib")
    assert max(memory[END:]) < min(memory[:END]) - 500


@pytest.fixture(scope="session")
def killed_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, list[int]]:
    """The same run, killed once in each phase, and the step after which each attempt but the first went on."""
    folder, went_on = tmp_path_factory.mktemp("killed"), []
    for killed_at in (2, 4, 7):
        process = start(folder, TAUGHT)
        wait_for_step(folder, killed_at, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        went_on.append(int((folder / "checkpoints/latest_checkpointed_iteration.txt").read_text()))
    return succeed(folder, TAUGHT), went_on


@pytest.mark.long
def test_a_run_that_was_killed_in_each_phase_has_the_same_numbers(
    taught_run: Finished, killed_run: tuple[Finished, list[int]]
) -> None:
    resumed, went_on = killed_run
    for checkpoint, (first, last) in zip(went_on, ((1, HOLD), (HOLD, END), (END, STEPS)), strict=True):
        assert first <= checkpoint < last, f"killed in another phase: the checkpoints were {went_on}"
    assert column(resumed, "teacher_weight") == [SCHEDULE(step) for step in range(STEPS)]
    for name in ("loss", "teacher_loss", "grad_norm", "teacher_rollouts", "pass_rate"):
        for ours, theirs in zip(column(resumed, name), column(taught_run, name), strict=True):
            assert ours == (None if theirs is None else pytest.approx(theirs, rel=1e-5)), name
    bank = RolloutBank(resumed.folder / "teacher_bank")
    assert bank.rollouts == 2 * len(bank) == 48


@pytest.mark.long
def test_a_run_that_resumes_after_the_end_never_builds_the_teachers_engine(
    taught_run: Finished, killed_run: tuple[Finished, list[int]]
) -> None:
    resumed, went_on = killed_run
    assert "teacher engine released" not in resumed.output
    assert max(column(resumed, "memory_mib")[went_on[-1] :]) < min(column(taught_run, "memory_mib")[:END]) - 500


@pytest.mark.long
def test_mixture_gives_the_teacher_its_slots_and_counts_what_is_missing(tmp_path: Path) -> None:
    changes = {"train.steps": 4, "teacher_rollouts.mode": "mixture", "teacher_rollouts.shape": "linear"}
    changes |= {"teacher_rollouts.weight": 1.0, "teacher_rollouts.hold_steps": 1, "teacher_rollouts.end_step": 3}
    changes |= {"teacher_rollouts.samples": 12, "sgopd.updates_per_batch": 2, "parallel.ranks": 2, "parallel.tensor": 2}
    run = succeed(tmp_path, TAUGHT | changes)
    assert column(run, "teacher_weight") == [1.0, 1.0, 0.5, 0.0]
    for step, (line, slots) in enumerate(zip(run.metrics, (4, 4, 2, 0), strict=True)):
        recorded = run.recorded_text(step)["trajectories"]
        of_prompt = [[t["from_teacher"] for t in recorded if t["prompt"] == prompt] for prompt in range(4)]
        assert all(len(group) == 4 and sum(group) <= slots for group in of_prompt), "every group has its size"
        assert line["teacher_shortfall"] == pytest.approx(1 - sum(map(sum, of_prompt)) / (4 * slots) if slots else 0)
    # Of twelve samples four are approved: then a step has no rollout of the student's at all.
    alone = run.metrics[0]
    assert alone["teacher_rollouts"] == 16 and alone["teacher_loss"] > 0 and alone["grad_norm"] > 0
    assert alone["tokens"] == 0 and alone["pass_rate"] is None and alone["loss"] is None
    assert 0 <= run.metrics[3]["ratio_clipped"] < 1


@pytest.mark.long
def test_recorded_batches_hold_the_teachers_part(taught_run: Finished, tmp_path: Path) -> None:
    replayed = succeed(
        tmp_path,
        TAUGHT | {"train.steps": 1, "logging.replay": str(taught_run.folder / "recorded"), "logging.record": None},
    )
    ours, theirs = replayed.metrics[0], taught_run.metrics[0]
    for name in ("loss", "teacher_loss", "grad_norm", "teacher_weight", "teacher_tokens", "hidden_grad_norm_teacher"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 1


# ---- Ahead of training ------------------------------------------------------------------------------------

AHEAD = {"data.train.size": 400, "data.heldout": None, "rollout.cache_gib": 0.25, "teacher_rollouts.temperature": 0.7}
SAMPLES = 16


def fill(folder: Path, *arguments: str, ranks: int = 1) -> subprocess.Popen[str]:
    settings = AHEAD | {"teacher_rollouts.samples": SAMPLES}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "megatron_sgopd.cli"]
    command += ["teacher-rollouts", str(RECIPE), "--bank", str(folder)]
    return subprocess.Popen(
        [*command, *set_words(settings), *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="session")
def bank_ahead(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[StoredRollout]]]:
    """A bank of which one of two workers was killed after its first part, and what was finished by then."""
    folder = tmp_path_factory.mktemp("ahead") / "bank"
    process = fill(folder, "--all", "--shard", "1/2")
    assert process.stdout is not None
    assert "2048 of 3200 rollouts" in process.stdout.readline()
    os.killpg(process.pid, signal.SIGSTOP)  # or it would be done before another has started
    refused = fill(folder, "--all", "--shard", "1/2")
    _, errors = refused.communicate(timeout=120)
    assert refused.returncode == 2 and "another process writes as shards_2-1" in errors
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    bank = RolloutBank(folder)
    finished = {problem: bank.of(problem) for problem in bank._places}
    for shard in ("1/2", "2/2"):
        output, errors = (worker := fill(folder, "--all", "--shard", shard)).communicate(timeout=240)
        assert worker.returncode == 0, errors
        assert ("128 of 200 problems are there already" in output) == (shard == "1/2")
    return folder, finished


@pytest.mark.long
def test_killing_a_worker_loses_no_finished_problem_and_doubles_none(
    bank_ahead: tuple[Path, dict[str, list[StoredRollout]]],
) -> None:
    folder, finished = bank_ahead
    assert len(finished) == 128
    bank = RolloutBank(folder)
    assert len(bank) == 400 and bank.rollouts == 400 * SAMPLES
    for problem, rollouts in finished.items():
        assert bank.of(problem) == rollouts
    differing = 0
    for number in range(400):
        rollouts = bank.of(f"problem {number}")
        assert [rollout.sample for rollout in rollouts] == list(range(SAMPLES))
        differing += len({tuple(rollout.token_ids) for rollout in rollouts}) > 1
    assert differing > 100, "samples have seeds of their own"


@pytest.mark.long
def test_a_worker_of_two_ranks_killed_at_many_moments_fills_the_same_bank(
    bank_ahead: tuple[Path, dict[str, list[StoredRollout]]], tmp_path: Path
) -> None:
    folder, finished, attempts = tmp_path / "bank", dict[str, list[StoredRollout]](), 0
    while True:
        worker = fill(folder, "--all", ranks=2)
        try:  # from while the engines are built to after the last part
            _, errors = worker.communicate(timeout=8 + 4 * attempts)
            assert worker.returncode == 0, errors
        except subprocess.TimeoutExpired:
            started = psutil.Process(worker.pid).children(recursive=True)
            worker.kill()
            worker.communicate()
            _, alive = psutil.wait_procs(started, timeout=30)
            assert not alive, "ranks outlive their launcher"
        attempts += 1
        bank = RolloutBank(folder)
        for problem, rollouts in finished.items():
            assert bank.of(problem) == rollouts, "lost, doubled or made again"
        finished = {problem: bank.of(problem) for problem in bank._places}
        if worker.returncode == 0:
            break
        assert attempts < 15
    assert attempts > 3
    theirs = RolloutBank(bank_ahead[0])
    assert bank.rollouts == theirs.rollouts == 400 * SAMPLES
    for number in range(400):
        assert bank.of(f"problem {number}") == theirs.of(f"problem {number}"), "who makes a rollout decides nothing"


@pytest.mark.long
def test_training_from_a_bank_builds_no_teacher_engine(
    bank_ahead: tuple[Path, dict[str, list[StoredRollout]]], tmp_path: Path
) -> None:
    changes = TAUGHT | AHEAD | {"train.steps": 2, "teacher_rollouts.samples": SAMPLES}
    run = succeed(tmp_path, changes | {"teacher_rollouts.bank": str(bank_ahead[0]), "rollout.cache_gib": 0.1})
    assert "teacher engine" not in run.output and not (tmp_path / "teacher_bank").exists()
    bank = RolloutBank(bank_ahead[0])
    for step, line in enumerate(run.metrics):
        recorded = run.recorded_text(step)
        approved = [r for p in recorded["prompts"] for r in bank.of(p["id"].split(", ")[1]) if r.outcome]
        assert line["teacher_rollouts"] == len(approved) > 0
        found = sorted(tuple(t["token_ids"]) for t in recorded["trajectories"] if t["from_teacher"])
        assert found == sorted(tuple(rollout.token_ids) for rollout in approved)

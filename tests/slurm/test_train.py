"""`slurm/train.sbatch` on a real Slurm: to the end, through preemption, kills and lost nodes."""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_sgopd.checkpoint.completeness import newest_step
from megatron_sgopd.monitor.attempts import read_attempts

from ..commands import REPOSITORY, same_students, set_words
from ..e2e.conftest import NUMBERS, RECIPE, SMALL, Finished
from .cluster import Cluster, wait_until

STEPS = 11
CHANGES = SMALL | {"train.steps": STEPS, "checkpoint.every": 3, "logging.tensorboard": False}


def submit(cluster: Cluster, run_dir: Path, output: Path | None = None, **changes: Any) -> int:
    run_dir.mkdir(parents=True, exist_ok=True)
    cluster.environment |= {"SGOPD_VENV": sys.prefix, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    words = set_words(CHANGES | {"run_dir": str(run_dir)} | changes)
    return cluster.submit(
        f"--output={output or run_dir / 'job.out'}", "slurm/train.sbatch", str(RECIPE), *words, cwd=REPOSITORY
    )


def steps_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def assert_as_uninterrupted(run_dir: Path, other: Finished) -> None:
    ours = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    for line, expected in zip(ours, other.metrics, strict=True):
        for name in NUMBERS:
            assert line[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-8), (line["step"], name)
    assert same_students(run_dir, other.folder, run_dir), "they differ in a bit"


def test_a_job_that_is_asked_to_stop_queues_itself_again_and_ends_as_if_it_had_not_been(
    cluster: Cluster, main_run: Finished, tmp_path: Path
) -> None:
    run_dir = tmp_path / 'run"; touch x; $(touch x) `touch x` #'
    job = submit(cluster, run_dir)
    wait_until(lambda: steps_done(run_dir) >= 2, 150)
    time.sleep(random.random())
    cluster.run(["scancel", "--signal=USR1", "--batch", str(job)])
    wait_until(lambda: cluster.state(job) == "PENDING", 60)
    assert cluster.wait(job, 240) == "COMPLETED", (run_dir / "job.out").read_text()
    attempts = read_attempts(run_dir)
    assert [attempt.outcome for attempt in attempts] == ["stopped", "finished"]
    assert attempts[0].reached is not None and attempts[0].reached >= 2, "it has saved what it had done"
    assert {attempt.job for attempt in attempts} == {str(job)}
    assert "requeue: yes, from step" in (run_dir / "job.out").read_text()
    assert not (REPOSITORY / "x").exists(), "a setting has come into a shell"
    assert (run_dir / "job.out").stat().st_mode & 0o077 == 0, "it holds prompts and responses"
    assert_as_uninterrupted(run_dir, main_run)


@pytest.mark.long
def test_the_second_of_two_jobs_on_one_run_folder_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    outputs = [tmp_path / "first.out", tmp_path / "second.out"]
    jobs = [submit(cluster, tmp_path / "run", output, **{"train.steps": 30}) for output in outputs]
    ended = {cluster.wait(job, 240): output.read_text() for job, output in zip(jobs, outputs, strict=True)}
    assert set(ended) == {"COMPLETED", "FAILED"}
    assert "is being trained in by another process" in ended["FAILED"]
    assert "requeue: no, another process trains in " in ended["FAILED"]
    assert "step 30/30" in ended["COMPLETED"] and "/30  loss" not in ended["FAILED"]


@pytest.mark.long
def test_a_rank_that_is_killed_and_a_node_that_is_lost_cost_no_more_than_the_steps_since_the_last_checkpoint(
    cluster: Cluster, main_run: Finished, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, run_dir)
    wait_until(lambda: steps_done(run_dir) >= 4, 150)
    theirs = [p for p in cluster.processes(SLURM_JOB_ID=str(job)) if "SLURM_PROCID" in p.environ()]
    assert len(theirs) > 2, "ranks, and what they have started"
    cluster.ranks(job)[1].kill()
    killed = time.monotonic()
    wait_until(lambda: not [p for p in theirs if p.is_running() and p.status() != "zombie"], 60)
    assert time.monotonic() - killed < 60
    wait_until(lambda: cluster.state(job) == "PENDING", 60)
    assert "rank 1 on n2, " in (run_dir / "job.out").read_text(), "the first rank that failed is named"
    assert "ended without a word" in (run_dir / "job.out").read_text()
    wait_until(lambda: len(read_attempts(run_dir)) == 2 and steps_done(run_dir) >= 5, 150)
    cluster.unplug("n2")
    wait_until(lambda: cluster.state(job) == "PENDING", 90)
    cluster.boot("n2")
    assert cluster.wait(job, 300) == "COMPLETED", (run_dir / "job.out").read_text()
    assert [attempt.step for attempt in read_attempts(run_dir)] == [0, 3, 3]
    assert_as_uninterrupted(run_dir, main_run)


@pytest.mark.long
def test_a_run_that_always_fails_at_the_same_step_is_given_up_with_the_reason(cluster: Cluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    cluster.environment["SGOPD_MAX_ATTEMPTS"] = "2"
    try:
        job = submit(cluster, run_dir, **{"sgopd.objective": "tests.faulty:fails_in_a_later_step"})
        assert cluster.wait(job, 300) == "FAILED"
    finally:
        del cluster.environment["SGOPD_MAX_ATTEMPTS"]
    output = (run_dir / "job.out").read_text()
    assert ", train of step 2: RuntimeError: this step always fails (traceback: " in output
    assert "requeue: no, 2 attempts in a row made no new checkpoint after step 0" in output
    assert newest_step(run_dir / "checkpoints") == 0 and len(read_attempts(run_dir)) == 2

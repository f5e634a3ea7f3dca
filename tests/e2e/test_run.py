"""What a whole run shows: rollouts from the trained policy, time explained, files written."""

import json
import signal
import stat
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_sgopd.checkpoint.completeness import steps_saved
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.monitor.attempts import read_attempts
from megatron_sgopd.monitor.output import EXIT_STOPPED, claimed
from megatron_sgopd.report.runs import read_run

from .conftest import NUMBERS, Finished, start, succeed


def test_the_run_writes_its_files(main_run: Finished):
    assert [line["step"] for line in main_run.metrics] == list(range(1, 12))
    summary = json.loads((main_run.folder / "summary.json").read_text())
    assert set(summary) >= {"before", "after", "teacher", "steps", "seconds", "stage_seconds", "unexplained_share"}
    assert summary["steps"] == 11
    assert 0 <= summary["before"] <= 1 and 0 <= summary["after"] <= 1
    assert (main_run.folder / "samples.jsonl").read_text().count("\n") >= 3
    assert list((main_run.folder / "tensorboard").iterdir())
    assert (main_run.folder / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "11"
    assert (main_run.folder / "recipe.yaml").is_file()


def test_a_finished_run_says_so_and_is_left_alone(main_run: Finished):
    before = (main_run.folder / "metrics.jsonl").read_bytes()
    again = succeed(main_run.folder, {"train.steps": 11})
    assert "has all its 11 steps already" in again.output
    assert (main_run.folder / "metrics.jsonl").read_bytes() == before


def test_progress_is_one_line_a_step_on_the_terminal_and_nothing_else_of_the_libraries(main_run: Finished):
    lines = main_run.output.splitlines()
    assert sum(line.startswith("step ") for line in lines) == 11
    assert "Megatron" not in main_run.output and "INFO" not in main_run.output
    assert len(lines) < 60


def test_metrics_hold_everything_that_a_run_logs(main_run: Finished):
    line = main_run.metrics[0]
    for name in EVERY_METRIC:
        assert name in line, name
    assert set(line["stage_seconds"]) >= {"sync", "generate", "pack", "verify", "teacher", "reference", "train"}
    assert set(line["phase_memory_mib"]) == {"sync", "generate", "teacher", "reference", "train"}
    assert main_run.output.count("GiB in use at most on the first rank, and planned: sync ") == 1


EVERY_METRIC = [
    *("loss", "grad_norm", "pass_rate", "agree", "conflict", "neutral", "reverse_kl", "reference_kl", "entropy"),
    *("uniform_groups", "response_length", "truncated", "logprob_gap", "logprob_gap_max", "sign_flips", "kappa"),
    *("advantage", "advantage_p50", "agree_right", "agree_wrong", "abs_delta_agree"),
    *("tokens_per_second", "seconds", "unexplained_share"),
]


def test_samples_hold_what_the_objective_did_to_each_token(main_run: Finished):
    lines = [json.loads(line) for line in (main_run.folder / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [step for step in range(1, 12, 2) for _ in range(8)]
    recorded, batch = main_run.recorded(0), main_run.recorded_text(0)
    starts = np.cumsum([0, *(len(t["token_ids"]) for t in batch["trajectories"])])
    texts = {prompt["text"]: i for i, prompt in enumerate(batch["prompts"])}
    for line in (line for line in lines if line["step"] == 1):
        tokens = line["tokens"]
        [k, *_] = [  # of equal responses to one prompt, any
            k
            for k, t in enumerate(batch["trajectories"])
            if t["prompt"] == texts[line["prompt"]]
            and len(t["token_ids"]) == len(tokens["text"])
            and np.allclose(t["behaviour"], tokens["behaviour"], atol=6e-5)
        ]
        span = slice(starts[k], starts[k + 1])
        for name in ("student", "teacher", "reference"):
            # Rounded to four digits; s is that of the training forward, the same tensor that is recorded.
            np.testing.assert_allclose(tokens[name], recorded[f"{name}_logprobs_T"][span].numpy(), atol=6e-5)
        assert tokens["rank"] == recorded["teacher_ranks_T"][span].tolist()
        delta = np.subtract(tokens["teacher"], tokens["student"])
        np.testing.assert_allclose(tokens["delta"], delta, atol=2e-4)
        agrees = np.sign(tokens["delta"]) * np.sign(line["outcome_advantage"]) > 0
        assert [letter == "a" for letter in tokens["gate"]] == agrees.tolist()
        assert "".join(tokens["text"]).startswith(line["response"])
        # A token that has more than half of the teacher's probability is its first choice.
        assert all(rank == 1 for rank, q in zip(tokens["rank"], tokens["teacher"], strict=True) if q > -0.69)
        assert all(rank > 1 for rank, q in zip(tokens["rank"], tokens["teacher"], strict=True) if q < -6)


def test_rollouts_come_from_the_policy_that_is_trained(main_run: Finished):
    # float32 throughout; before the first update, and after ten updates with a sync after each.
    gaps = [line["logprob_gap"] for line in main_run.metrics]
    assert gaps[0] < 1e-4
    assert gaps[10] < 1e-4
    losses = [line["loss"] for line in main_run.metrics]
    assert len(set(losses)) == 11, "the weights never changed"


@pytest.fixture(scope="session")
def cooler_run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return succeed(tmp_path_factory.mktemp("cooler"), {"train.steps": 4, "rollout.temperature": 0.7})


@pytest.mark.long
def test_so_they_do_at_another_temperature(cooler_run: Finished):
    assert cooler_run.metrics[0]["logprob_gap"] < 1e-4
    assert cooler_run.metrics[3]["logprob_gap"] < 1e-4


def test_at_most_a_twentieth_of_the_time_is_unexplained(main_run: Finished):
    steps = main_run.metrics[1:]
    explained = sum(sum(line["stage_seconds"].values()) for line in steps)
    assert 1 - explained / sum(line["seconds"] for line in steps) <= 0.05


def test_each_step_takes_one_forward_of_teacher_and_reference(main_run: Finished):
    last = main_run.metrics[-1]
    assert (last["teacher_forwards"], last["reference_forwards"]) == (11, 11)


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been_and_saves_when_it_is_asked_to_stop(
    main_run: Finished, tmp_path: Path
):
    # That a stopped run goes on likewise is tested under Slurm.
    tmp_path /= "run"
    changes = {"train.steps": 11, "checkpoint.every": 4, "checkpoint.keep_last": 2}
    process = start(tmp_path, changes)
    wait_for_step(tmp_path, 2, process)
    with pytest.raises(ConfigError, match="is being trained in by another process"), claimed(tmp_path):
        pass
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700
    open_ports = [c.laddr for p in family(process) for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    assert open_ports and {address.ip for address in open_ports} == {"127.0.0.1"}
    wait_for_step(tmp_path, 6, process)
    all_processes = family(process)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(all_processes, timeout=10)
    assert not [p.cmdline() for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) < 8, "it went too far before it was killed"

    process = start(tmp_path, changes | {"train.steps": 20})  # more of them, as to a run that has ended
    wait_for_step(tmp_path, 9, process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    resumed = Finished(tmp_path, process.returncode, output, errors)
    assert resumed.code == EXIT_STOPPED, errors
    killed, stopped = read_attempts(tmp_path)
    assert (killed.step, killed.outcome, stopped.step, stopped.outcome) == (0, "killed", 4, "stopped")
    assert stopped.reached is not None and stopped.reached >= 9
    assert "stopped by SIGINT, received in " in output
    assert f", after {stopped.reached} steps; {stopped.reached} are saved" in output
    assert sorted(steps_saved(tmp_path / "checkpoints")) == [8, stopped.reached]
    assert "step 5/20" in output and "step 4/20" not in output
    assert output.count("goes on with train.steps=20 (was 11)") == 1
    superseded = (tmp_path / "metrics.superseded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in superseded][:2] == [5, 6], "what was done again is kept aside"
    assert [line["step"] for line in resumed.metrics] == list(range(1, stopped.reached + 1))
    for ours, theirs in zip(resumed.metrics, main_run.metrics, strict=False):
        for name in NUMBERS:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-8), (ours["step"], name)
    assert resumed.recorded_text(8)["prompts"] == main_run.recorded_text(8)["prompts"]
    assert resumed.recorded_text(8)["trajectories"] == main_run.recorded_text(8)["trajectories"]


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """A process's children, theirs, and so on."""
    return psutil.Process(process.pid).children(recursive=True)


def test_nothing_is_said_to_be_wrong_with_a_run_that_finished(main_run: Finished) -> None:
    assert read_run(main_run.folder).alarms == []


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the run has recorded `step`."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        metrics = folder / "metrics.jsonl"
        if metrics.exists() and metrics.read_text().count("\n") >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} before the run ended or 200 s were over")

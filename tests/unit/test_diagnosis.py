"""Which rank is named as the first that failed, and what is said of it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_sgopd.config import AlarmSettings
from megatron_sgopd.monitor.attempts import begin_attempt, end_attempt
from megatron_sgopd.monitor.diagnosis import diagnosis
from megatron_sgopd.monitor.heartbeat import Heartbeat
from megatron_sgopd.monitor.output import EXIT_STOPPED, claimed, reporting_errors
from megatron_sgopd.report.runs import read_run


def fail(run_dir: Path, monkeypatch: pytest.MonkeyPatch, rank: int, stage: str, work: Callable[[], object]) -> None:
    """What a rank leaves behind whose work goes wrong in a stage."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("SLURMD_NODENAME", f"n{rank}")
    with reporting_errors(run_dir, quiet=False):
        heartbeat = Heartbeat(run_dir, rank, AlarmSettings())
        heartbeat.step = 6
        heartbeat.enter(stage)
        heartbeat.stop()
        work()


def loses_its_peer() -> None:
    raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:407")


def divides_by_zero() -> None:
    _ = 1 / 0


def test_the_cause_is_named_even_if_its_nodes_clock_is_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, work in ((2, divides_by_zero), (0, loses_its_peer), (1, loses_its_peer)):
        fail(tmp_path, monkeypatch, rank, "train", work)
    os.utime(tmp_path / "logs/rank-2.error", times=(4e9, 4e9))
    assert diagnosis(tmp_path).startswith("rank 2 on n2, train of step 7: ZeroDivisionError: division by zero")


def test_a_rank_without_a_word_is_named_by_those_that_lost_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (0, 1):
        fail(tmp_path, monkeypatch, rank, "teacher", loses_its_peer)
    fail(tmp_path, monkeypatch, 2, "teacher", lambda: None)
    assert diagnosis(tmp_path).startswith("rank 2 on n2, teacher of step 7: ended without a word")


def test_out_of_memory_names_the_stage_the_size_and_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(tmp_path, monkeypatch, 0, "train", lambda: torch.empty(1 << 60, dtype=torch.uint8))
    said = diagnosis(tmp_path)
    assert "you tried to allocate 1152921504606846976 bytes" in said
    assert "Out of memory in train: lower train.rows_per_microbatch, train.row_tokens" in said


def test_only_of_a_run_that_died_a_cause_is_sought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def alarms() -> list[str]:
        return read_run(tmp_path).alarms

    for step in (0, 3):
        begin_attempt(tmp_path, step)
        for rank in range(2):
            fail(tmp_path, monkeypatch, rank, "train", lambda: None)
        with claimed(tmp_path):
            assert alarms() == [], "it goes on"
        assert "ended without a word, as did 1" in alarms()[0], "it was killed"
        end_attempt(tmp_path, step + 3, EXIT_STOPPED, "stopped by SIGUSR1")
        assert alarms() == [], "it was asked to stop"
    begin_attempt(tmp_path, 6)
    fail(tmp_path, monkeypatch, 0, "save", lambda: None)
    end_attempt(tmp_path, 9, 0, "")
    assert alarms() == [], "it is finished"


def test_where_nobody_left_a_word_all_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert diagnosis(tmp_path) == "", "nobody has come as far as a stage"
    for rank in range(3):
        fail(tmp_path, monkeypatch, rank, "train", lambda: None)
    said = diagnosis(tmp_path)
    assert said.startswith("rank 0 on n0, train of step 7: ended without a word, as did 1, 2; one of them was first")

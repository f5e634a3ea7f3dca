"""Attempts at a run, and whether there should be another."""

import time
from pathlib import Path

import pytest

from megatron_sgopd.cli import main
from megatron_sgopd.monitor.attempts import ATTEMPTS, begin_attempt, end_attempt, read_attempts
from megatron_sgopd.monitor.output import EXIT_STOPPED
from megatron_sgopd.requeue import decide

RECIPE = Path(__file__).parents[2] / "examples/arithmetic_cpu/recipe.yaml"


def attempts(folder: Path, *ends: tuple[int, int | None]) -> None:
    """Begin steps, and exit codes where the attempt wrote its end."""
    for step, code in ends:
        begin_attempt(folder, step)
        if code is not None:
            end_attempt(folder, step + 1, code, f"reason {code}")


def test_what_is_read_is_what_happened_also_after_a_line_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    attempts(tmp_path, (0, EXIT_STOPPED), (1, None))
    with (tmp_path / ATTEMPTS).open("a") as file:
        file.write('{"event": "en')
    attempts(tmp_path, (1, 3), (2, 139), (3, 0))
    found = read_attempts(tmp_path)
    assert [(a.number, a.step, a.reached, a.outcome) for a in found] == [
        (1, 0, 1, "stopped"),
        (2, 1, None, "killed"),
        (3, 1, 2, "alarm"),
        (4, 2, 3, "failed"),
        (5, 3, 4, "finished"),
    ]
    assert found[0].reason == f"reason {EXIT_STOPPED}" and {(a.job, a.host) for a in found} == {("17", "n2")}


@pytest.mark.parametrize(
    ("ends", "step", "again", "words"),
    [
        ([(0, EXIT_STOPPED)], 1, True, "from step 1; reason 75"),
        ([(0, None)], 0, True, "from step 0; the last one was killed: no word of it"),
        ([(0, 1), (0, 1), (0, None)], 0, True, "from step 0"),
        ([(0, 1), (0, 1), (0, 1), (0, 1)], 0, False, "4 attempts in a row made no new checkpoint after step 0"),
        ([(0, 1), (0, 1), (0, 1), (0, 1)], 5, True, "from step 5"),
        ([(0, 1), (5, 1), (5, 1), (5, 1)], 5, True, "from step 5"),
        ([(0, 2)], 0, False, "its input is bad: reason 2"),
        ([(0, 3)], 4, False, "an alarm stopped it, and the same numbers would again: reason 3"),
        ([(0, 0)], 8, False, "the run is finished"),
    ],
)
def test_who_is_queued_again(
    ends: list[tuple[int, int | None]], step: int, again: bool, words: str, tmp_path: Path
) -> None:
    attempts(tmp_path, *ends)
    found, reason = decide(read_attempts(tmp_path), step, most=4)
    assert found == again and words in reason, reason


def requeue(run_dir: Path, code: int, since: float, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What the command answers, and why."""
    arguments = ["requeue", str(RECIPE), "--set", f"run_dir={run_dir}", "--code", str(code), "--since", str(since)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    return printed.out.strip(), printed.err


def test_an_attempt_that_ended_before_it_could_begin_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    attempts(tmp_path, (0, EXIT_STOPPED))  # of another day
    for number in range(3):
        answer, why = requeue(tmp_path, 1, time.time() + 5 * number + 1, capsys)
        assert "it ended with code 1 before it could begin" in why
        assert answer == ("again" if number < 2 else "stop"), why
    assert waits == sorted(waits) and len(waits) == 2, "longer each time"
    assert requeue(tmp_path / "other", 2, time.time(), capsys)[0] == "stop", "its input is bad"


def test_an_attempt_begins_beside_the_last_words_of_the_one_before(tmp_path: Path) -> None:
    """As under srun, where each rank removes its own."""
    (tmp_path / "logs").mkdir()
    for rank in ("0", "1", "x"):
        (tmp_path / f"logs/rank-{rank}.error").write_text("the error")
    for number in (1, 2, 3):
        begin_attempt(tmp_path, 0)
        assert [attempt.number for attempt in read_attempts(tmp_path)] == list(range(1, number + 1))
    assert (tmp_path / "logs/rank-0.error").read_text() == "the error"
    assert not (tmp_path / "logs/rank-1.error").exists(), "there is no such rank any more"
    assert not decide(read_attempts(tmp_path), 0, most=3)[0], "a crash loop ends"

"""When alarms go off, by the numbers alone; tests/e2e/test_alarms.py plants the faults into runs."""

import math
from typing import Any

import pytest

from megatron_sgopd.config import AlarmSettings
from megatron_sgopd.errors import Alarm
from megatron_sgopd.monitor.alarms import check_metrics, check_responses, check_skipped
from megatron_sgopd.rollout.prompts import Prompt
from megatron_sgopd.rollout.trajectory import Trajectory
from megatron_sgopd.step import Batch

PROMPT = Prompt("p", "", (1,), "", "", {})


def batch(step: int, *truncated: bool, tokens: int = 2) -> Batch:
    responses = [Trajectory(PROMPT, i, (5,) * tokens, (-1.0,) * tokens, cut) for i, cut in enumerate(truncated)]
    return Batch(step, (PROMPT,), trajectories=tuple(responses))


def test_some_steps_in_a_row_of_nothing_but_truncated_responses() -> None:
    settings, history = AlarmSettings(truncated_steps=3), []
    for step, truncated in enumerate([(True, True), (True, True), (True, False), (True, True), (True, True)]):
        check_responses(settings, batch(step, *truncated), history)
    with pytest.raises(Alarm, match="step 5: every response of the last 3 steps was truncated"):
        check_responses(settings, batch(5, True, True), history)


def test_responses_without_a_token() -> None:
    with pytest.raises(Alarm, match="step 0: 2 responses hold no token at all"):
        check_responses(AlarmSettings(), batch(0, False, False, tokens=0), [])


def test_steps_in_a_row_that_have_nothing_to_train_on() -> None:
    check_skipped(AlarmSettings(skipped_steps=2), 5, in_a_row=1)
    with pytest.raises(Alarm, match="step 6: nothing was left to train on in the last 2 steps"):
        check_skipped(AlarmSettings(skipped_steps=2), 6, in_a_row=2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"loss": math.nan}, "loss is nan"),
        ({"grad_norm": math.inf}, "grad_norm is inf"),
        ({"logprob_gap": 0.6}, "the engine holds other weights"),
    ],
)
def test_numbers_of_a_step_that_are_none_or_too_far_off(change: dict[str, Any], said: str | None) -> None:
    metrics = {"tokens": 8, "teacher_tokens": 0, "loss": 0.1, "grad_norm": 1.0, "logprob_gap": 0.01} | change
    if said is None:
        check_metrics(AlarmSettings(), 3, metrics)
    else:
        with pytest.raises(Alarm, match=said):
            check_metrics(AlarmSettings(), 3, metrics)

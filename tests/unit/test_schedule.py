"""The amount of teacher rollouts over a run: the formula, its borders, and that it never rises."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sgopd.objective.imitation import teacher_slots
from megatron_sgopd.objective.schedule import TeacherSchedule

SHAPES = ("cosine", "linear", "step")


def test_the_cosine_is_the_formula() -> None:
    schedule = TeacherSchedule(0.4, hold=10, end=30)
    assert [schedule(step) for step in (0, 9)] == [0.4, 0.4]
    assert schedule(10) == 0.4
    assert schedule(20) == pytest.approx(0.2, rel=1e-15)
    assert schedule(29) == pytest.approx(0.4 * (1 + math.cos(math.pi * 19 / 20)) / 2, rel=1e-15)
    assert [schedule(step) for step in (30, 31, 10**9)] == [0, 0, 0]


def test_other_shapes() -> None:
    assert [TeacherSchedule(1.0, 2, 4, "linear")(step) for step in range(6)] == [1, 1, 1, 0.5, 0, 0]
    assert [TeacherSchedule(0.7, 2, 4, "step")(step) for step in range(6)] == [0.7, 0.7, 0.7, 0.7, 0, 0]
    assert TeacherSchedule(1.0, 3, 3)(2) == 1 and TeacherSchedule(1.0, 3, 3)(3) == 0


@given(st.floats(0, 2), st.integers(0, 50), st.integers(0, 50), st.sampled_from(SHAPES))
def test_it_holds_then_falls_to_none(weight: float, hold: int, decay: int, shape: Any) -> None:
    schedule = TeacherSchedule(weight, hold, hold + decay, shape)
    amounts = [schedule(step) for step in range(hold + decay + 2)]
    assert all(amount == weight for amount in amounts[:hold])
    assert all(later <= earlier for earlier, later in itertools.pairwise(amounts))
    assert amounts[-2:] == [0, 0]


@given(st.floats(0, 1), st.integers(1, 64))
def test_slots_are_the_nearest_whole_number(weight: float, group_size: int) -> None:
    slots = teacher_slots(weight, group_size)
    assert 0 <= slots <= group_size
    assert abs(slots - weight * group_size) <= 0.5

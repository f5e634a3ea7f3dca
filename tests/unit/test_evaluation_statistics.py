"""pass@k against counting, majority against all outcomes of a vote, and intervals that cover what they claim."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sgopd.evaluation.statistics import bootstrap_interval, majority_at_k, pass_at_k


def row(right: int, samples: int) -> np.ndarray:
    return np.array([[1] * right + [0] * (samples - right)])


@pytest.mark.parametrize(
    ("samples", "right", "k", "expected"),
    [
        *((10, 0, 1, 0), (10, 10, 10, 1), (10, 3, 1, 3 / 10), (10, 3, 8, 1), (4, 1, 2, 1 / 2), (5, 2, 2, 7 / 10)),
        *(
            (6, 2, 3, 4 / 5),
            (8, 1, 8, 1),
            (100, 1, 50, 1 / 2),
            (200, 5, 100, 1 - math.comb(195, 100) / math.comb(200, 100)),
        ),
    ],
)
def test_pass_at_k_is_the_closed_form(samples: int, right: int, k: int, expected: float) -> None:
    assert pass_at_k(row(right, samples), k)[0] == pytest.approx(expected, rel=1e-12)


@given(st.lists(st.integers(0, 1), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(outcomes: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(outcomes)))
    choices = list(itertools.combinations(outcomes, k))
    assert pass_at_k(np.array([outcomes]), k)[0] == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)


def test_thousands_of_samples_do_not_overflow() -> None:
    assert pass_at_k(row(1, 100_000), 1000)[0] == pytest.approx(0.01, rel=1e-9)


@pytest.mark.parametrize(
    ("answers", "outcomes", "k", "expected"),
    [
        (["1", "2", "1"], [1, 0, 1], 3, 1.0),
        (["2", "2", "1"], [0, 0, 1], 3, 0.0),
        (["2", "1"], [0, 1], 2, 0.5),
        ([None, None, "1"], [0, 0, 1], 3, 1.0),
        ([None, None], [0, 0], 2, 0.0),
        (["1", "2", "2", "2"], [1, 0, 0, 0], 2, 0.25),
        (["1", "2", "1", "1", "9"], [1, 0, 1, 1, 0], 2, 0.75),
    ],
)
def test_majority(answers: list[str | None], outcomes: list[int], k: int, expected: float) -> None:
    assert majority_at_k([answers], np.array([outcomes]), k)[0] == pytest.approx(expected)


def test_intervals_cover_the_truth_as_often_as_they_claim() -> None:
    # 2000 simulated evaluations of 120 problems of different difficulty, 4 samples each. The share that covers has a
    # standard error of 0.5 %, and percentile intervals of a mean of 120 lose about half a percent.
    rng = np.random.default_rng(7)
    truth, trials, covered = 2 / 5, 2000, 0
    for trial in range(trials):
        difficulty = rng.beta(2, 3, size=120)
        values = (rng.random((120, 4)) < difficulty[:, None]).mean(axis=1)
        low, high = bootstrap_interval(values, seed=trial, resamples=600)
        covered += low <= truth <= high
    assert 0.93 <= covered / trials <= 0.97


def test_an_interval_is_a_function_of_its_values() -> None:
    values = np.array([0.0, 0.5, 1.0, 1.0])
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(np.full(5, 0.25)) == (0.25, 0.25)

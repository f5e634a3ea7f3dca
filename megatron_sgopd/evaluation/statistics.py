"""Estimates from P problems with n responses each, and their intervals. Pure functions of numpy arrays.

    avg@n    mean outcome
    pass@k   chance that one of k responses is right: 1 - C(n - c, k) / C(n, k) with c right ones of n; unbiased
             (Chen et al., arXiv 2107.03374)
    maj@k    chance that the answer that most of k responses give is right, ties broken at random; the mean over the
             n // k blocks of k responses in a row

Problems are the unit of chance: intervals are percentiles over resampled problems.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


def pass_at_k(outcomes_PN: np.ndarray, k: int) -> np.ndarray:
    """The estimate for each problem, float64 [P].

    Args:
        outcomes_PN: 0 or 1.
        k: at most N.
    """
    n = outcomes_PN.shape[1]
    wrong_P = n - outcomes_PN.sum(axis=1)
    # C(n - c, k) / C(n, k) as a product of k quotients, each at most 1: factorials would overflow.
    draws = np.arange(k)
    return 1 - np.prod(np.clip(wrong_P[:, None] - draws, 0, None) / (n - draws), axis=1)


def majority_at_k(answers_PN: Sequence[Sequence[str | None]], outcomes_PN: np.ndarray, k: int) -> np.ndarray:
    """The estimate for each problem, float64 [P].

    Args:
        answers_PN: what each response answers; None, which is no answer, wins against nothing.
        outcomes_PN: 0 or 1; that of an answer is the mean over the responses that give it.
        k: at most N.
    """
    blocks = outcomes_PN.shape[1] // k
    return np.array(
        [
            np.mean([_vote(answers[b * k : b * k + k], outcomes[b * k : b * k + k]) for b in range(blocks)])
            for answers, outcomes in zip(answers_PN, outcomes_PN, strict=True)
        ]
    )


def _vote(answers: Sequence[str | None], outcomes: np.ndarray) -> float:
    """Chance that the winner is right."""
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    right = [np.mean([o for a, o in zip(answers, outcomes, strict=True) if a == winner]) for winner in winners]
    return float(np.mean(right))


def bootstrap_interval(values_P: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % interval of the mean, by resampling problems; of differences of two models' values, a paired one."""
    problems = len(values_P)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(problems, np.full(problems, 1 / problems), size=resamples)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(counts @ values_P / problems, [tail, 1 - tail])
    return float(low), float(high)

"""A model's scores on one set of problems, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_sgopd.evaluation.statistics import bootstrap_interval, majority_at_k, pass_at_k


@dataclass(frozen=True)
class Responses:
    """What was found out about P problems with N responses each."""

    outcomes_PN: np.ndarray
    """0 or 1."""
    answers_PN: Sequence[Sequence[str | None]]
    """What each response answers; the same text for the same answer."""
    truncated_PN: np.ndarray
    """bool."""

    @property
    def problems(self) -> int:
        """P."""
        return self.outcomes_PN.shape[0]

    @property
    def samples(self) -> int:
        """N."""
        return self.outcomes_PN.shape[1]


@dataclass(frozen=True)
class Score:
    """A mean over problems and its 95 % interval."""

    mean: float
    low: float
    high: float


def together(parts: Sequence[Responses]) -> Responses:
    """All problems of several sets with the same number of responses."""
    return Responses(
        np.concatenate([part.outcomes_PN for part in parts]),
        [answers for part in parts for answers in part.answers_PN],
        np.concatenate([part.truncated_PN for part in parts]),
    )


def powers_of_two(samples: int) -> list[int]:
    """1, 2, 4, … up to `samples`: the k that are shown if none are chosen."""
    return [1 << power for power in range(samples.bit_length())]


def scores(responses: Responses, ks: Sequence[int]) -> dict[str, Score]:
    """avg@N, pass@k and maj@k for each k > 1, in this order."""
    values = {f"avg@{responses.samples}": responses.outcomes_PN.mean(axis=1)}
    larger = [k for k in ks if k > 1]
    values |= {f"pass@{k}": pass_at_k(responses.outcomes_PN, k) for k in larger}
    values |= {f"maj@{k}": majority_at_k(responses.answers_PN, responses.outcomes_PN, k) for k in larger}
    return {name: Score(float(values_P.mean()), *bootstrap_interval(values_P)) for name, values_P in values.items()}


def as_json(found: Mapping[str, Score]) -> dict[str, Any]:
    """Plain values."""
    return {name: asdict(score) for name, score in found.items()}

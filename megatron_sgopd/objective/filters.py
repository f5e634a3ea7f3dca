"""Responses that are left out of training as a whole, for their form."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_GRAM = 8


def repetition(token_ids: Sequence[int]) -> float:
    """Share of a response's 8-grams of tokens that occur in it more than once, in [0, 1].

    A response that runs into a loop comes near 1; worked mathematics stays far below. Long loops often end in the
    length limit, where the teacher is as sure of the next repetition as the student, so that they teach nothing.
    """
    tokens = np.asarray(token_ids)
    if len(tokens) < _GRAM:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(tokens, _GRAM)
    _, counts = np.unique(grams, axis=0, return_counts=True)
    return float(counts[counts > 1].sum() / len(grams))

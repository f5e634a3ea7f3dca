"""Objectives that go wrong, for `sgopd.objective`."""

import os
import time

import torch

from megatron_sgopd.objective.loss import TokenSignals, TokenUpdate

_calls = 0


def fails_in_a_later_step(update: TokenUpdate, signals: TokenSignals) -> torch.Tensor:
    """The preset's advantage, until a few microbatches have been trained on."""
    global _calls
    _calls += 1
    if _calls > 12:
        raise RuntimeError("this step always fails")
    return update.advantage_T


def sleeps_in_a_later_step(update: TokenUpdate, signals: TokenSignals) -> torch.Tensor:
    """The preset's advantage, until the second rank falls asleep."""
    global _calls
    _calls += 1
    if _calls > 12 and os.environ["RANK"] == "1":
        time.sleep(10_000)
    return update.advantage_T

"""PYTHONPATH=examples/own_objective megatron-sgopd train RECIPE --set sgopd.objective=confident_teacher:advantage

Follow the teacher only where it is sure: tokens to which it gives less than one in ten count half.
"""

import math

import torch

from megatron_sgopd.objective.loss import TokenSignals, TokenUpdate


def advantage(update: TokenUpdate, signals: TokenSignals) -> torch.Tensor:
    """A_t [T], from the preset's own A_t and all that is known about the tokens; it is called chunk by chunk."""
    sure_T = signals.teacher_logprobs_T > math.log(0.1)
    return torch.where(sure_T, update.advantage_T, 0.5 * update.advantage_T)

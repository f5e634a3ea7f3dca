"""The sign-consistency gate: does the teacher's preference for a token have the sign of the outcome?"""

from __future__ import annotations

import torch

from megatron_sgopd.objective.methods import Method

CONFLICT, NEUTRAL, AGREE = 0, 1, 2
UNDECIDED = 3
"""A class of reports alone, see `reported`."""


def gate(delta_T: torch.Tensor, outcome_advantage_T: torch.Tensor, noise_floor: float) -> torch.Tensor:
    """int64 [T] of CONFLICT, NEUTRAL and AGREE.

    agree if o delta > 0 and |delta| > tau; neutral if |delta| <= tau; conflict otherwise, o = 0 included.

    Args:
        delta_T: q_t - s_t in nats; positive where the teacher wants the token up.
        outcome_advantage_T: o_i of each token's response.
        noise_floor: tau in nats.
    """
    # Signs, not a product: that of two small numbers can underflow to 0.
    same_sign_T = torch.sign(delta_T) * torch.sign(outcome_advantage_T) > 0
    classes_T = torch.where(same_sign_T, AGREE, CONFLICT)
    return torch.where(delta_T.abs() <= noise_floor, NEUTRAL, classes_T)


def reported(classes_T: torch.Tensor, outcome_advantage_T: torch.Tensor) -> torch.Tensor:
    """The classes as they are counted: UNDECIDED where they are CONFLICT only because o = 0, as in uniform groups.

    So CONFLICT is here what it is in published shares: two signs that differ. The objective treats both alike.
    """
    return torch.where((classes_T == CONFLICT) & (outcome_advantage_T == 0), UNDECIDED, classes_T)


def kappa(classes_T: torch.Tensor, method: Method, like: torch.Tensor) -> torch.Tensor:
    """[T] in the dtype of `like`: lambda on agree, beta on conflict, 1 on neutral."""
    kappa_T = torch.ones_like(like).masked_fill(classes_T == AGREE, method.agree_coefficient)
    return kappa_T.masked_fill(classes_T == CONFLICT, method.conflict_coefficient)


def eta(classes_T: torch.Tensor, method: Method, like: torch.Tensor) -> torch.Tensor:
    """[T] in the dtype of `like`: eta_agree on agree, eta_conflict on conflict and neutral."""
    eta_T = torch.full_like(like, method.conflict_outcome_weight)
    return eta_T.masked_fill(classes_T == AGREE, method.agree_outcome_weight)

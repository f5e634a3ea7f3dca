"""Outcome advantages: what a verifier's 0 or 1 says about one response among its prompt's group."""

from __future__ import annotations

import torch

from megatron_sgopd.objective.methods import Outcome


def outcome_advantage(
    outcomes_N: torch.Tensor,
    group_ids_N: torch.Tensor,
    mode: Outcome,
    eps: float = 1e-6,
    counted_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """o_i for each of N responses.

    none: 0 · pm1: 2R - 1 · group_centered: R - mean · group: (R - mean) / (std + eps), mean and population
    standard deviation over the responses of the same group. A group of one outcome gets exactly 0 in both
    group modes.

    Args:
        outcomes_N: R_i in {0, 1}, floating point.
        group_ids_N: int64, any numbers; groups may have different sizes and any order.
        counted_N: bool, responses with an outcome; the others have no part in their group's mean and get 0. None: all.
    """
    if counted_N is not None:
        advantage_N = torch.zeros_like(outcomes_N)
        advantage_N[counted_N] = outcome_advantage(outcomes_N[counted_N], group_ids_N[counted_N], mode, eps)
        return advantage_N
    if mode == "none":
        return torch.zeros_like(outcomes_N)
    if mode == "pm1":
        return 2 * outcomes_N - 1
    mean_N, uniform_N = _group_mean(outcomes_N, group_ids_N), uniform_groups(outcomes_N, group_ids_N)
    # In low precision the mean of ones need not be 1, and the gate would read the sign of the smallest remainder.
    centered_N = torch.where(uniform_N, 0.0, outcomes_N - mean_N)
    if mode == "group_centered":
        return centered_N
    return centered_N / (_group_mean(centered_N**2, group_ids_N).sqrt() + eps)


def uniform_groups(outcomes_N: torch.Tensor, group_ids_N: torch.Tensor) -> torch.Tensor:
    """bool [N]: every response of this one's group has the same outcome."""
    _, index_N = group_ids_N.unique(return_inverse=True)
    groups = int(index_N.max()) + 1 if index_N.numel() else 0
    lowest = outcomes_N.new_zeros(groups).scatter_reduce_(0, index_N, outcomes_N, "amin", include_self=False)
    highest = outcomes_N.new_zeros(groups).scatter_reduce_(0, index_N, outcomes_N, "amax", include_self=False)
    return (lowest == highest)[index_N]


def _group_mean(values_N: torch.Tensor, group_ids_N: torch.Tensor) -> torch.Tensor:
    _, index_N, sizes = group_ids_N.unique(return_inverse=True, return_counts=True)
    sums = values_N.new_zeros(len(sizes)).index_add_(0, index_N, values_N)
    return (sums / sizes)[index_N]

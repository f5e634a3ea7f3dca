"""Token statistics of a step as sums that add up over chunks, microbatches and ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from megatron_sgopd.objective.gate import AGREE, CONFLICT, NEUTRAL, UNDECIDED, reported
from megatron_sgopd.objective.loss import TokenSignals, TokenUpdate
from megatron_sgopd.objective.methods import Method

Sums = dict[str, torch.Tensor]

_CLASS_NAMES = {AGREE: "agree", NEUTRAL: "neutral", CONFLICT: "conflict", UNDECIDED: "undecided"}
_TOTALS = ("tokens", "acting_tokens", "teacher_tokens", "logprob_gap_max")
_SHARE_OF = {"teacher_loss": "teacher_tokens", "ratio_clipped": "acting_tokens"}
"""Means over other tokens than all."""
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# Bin edges of |A_t|: 40 a decade, so that a quantile is right within 3 %; below 1e-4 counts as 0.
_EDGES = torch.logspace(-4, 3, 281, dtype=torch.float64)


def metric_sums(
    student_logprobs_T: torch.Tensor,
    signals: TokenSignals,
    update: TokenUpdate,
    outcomes_T: torch.Tensor,
    entropy_T: torch.Tensor | None,
    method: Method,
) -> Sums:
    """float64 sums over the unmasked tokens; names that end in `_max` hold maxima instead.

    Args:
        outcomes_T: R_i of each token's response.
    """
    mask_T = signals.mask_T
    s_T, b_T = student_logprobs_T[mask_T].double(), signals.behaviour_logprobs_T[mask_T].double()
    classes_T = reported(update.classes_T, signals.outcome_advantage_T)[mask_T]
    places_T = classes_T * 2 + (outcomes_T[mask_T] > 0.5)
    delta_T, advantage_T = update.delta_T[mask_T].double(), update.advantage_T[mask_T].double()
    weight_T, gap_T = update.weight_T[mask_T].double(), (s_T - b_T).abs()

    sums = {
        "tokens": mask_T.sum().double(),
        # [class, wrong or right]
        "class_counts": torch.bincount(places_T, minlength=8).double().view(4, 2),
        "class_abs_delta": s_T.new_zeros(8).index_add_(0, places_T, delta_T.abs()).view(4, 2),
        "acting_tokens": (advantage_T != 0).double().sum(),
        "kappa": update.kappa_T[mask_T].double().sum(),
        "loss": -(weight_T * advantage_T * s_T).sum(),
        "advantage": advantage_T.sum(),
        "advantage_histogram": _histogram(advantage_T),
        "logprob_gap": gap_T.sum(),
        "logprob_gap_max": gap_T.max() if gap_T.numel() else gap_T.new_zeros(()),
        "logprob_gap_histogram": _histogram(gap_T),
        "weight": weight_T.sum(),
        "teacher_tokens": s_T.new_zeros(()),
        "teacher_loss": s_T.new_zeros(()),
    }
    if signals.imitation_T is not None:
        imitated_T = signals.imitation_T > 0
        sums["teacher_tokens"] = imitated_T.sum().double()
        sums["teacher_loss"] = -student_logprobs_T[imitated_T].double().sum()
    if signals.old_logprobs_T is not None:
        sums["ratio_clipped"] = (update.clipped_T[mask_T] & (advantage_T != 0)).double().sum()
    if method.advantage_clip is not None:
        sums["advantage_clipped"] = (advantage_T.abs() >= method.advantage_clip).double().sum()
    if method.importance_clip is not None:
        sums["importance_clipped"] = (s_T - b_T > math.log(method.importance_clip)).double().sum()
    if method.teacher:
        sums["reverse_kl"] = -delta_T.sum()
        sums["sign_flips"] = (delta_T.abs() < gap_T).double().sum()
    if signals.reference_logprobs_T is not None:
        sums["reference_kl"] = (s_T - signals.reference_logprobs_T[mask_T].double()).sum()
    if entropy_T is not None:
        sums["entropy"] = entropy_T[mask_T].double().sum()
    return sums


def add_sums(parts: Sequence[Sums]) -> Sums:
    """The sums of several disjoint sets of tokens, together."""
    return {
        name: torch.stack([part[name] for part in parts]).amax(0)
        if name.endswith("_max")
        else torch.stack([part[name] for part in parts]).sum(0)
        for name in parts[0]
    }


def metrics_from_sums(sums: Sums) -> dict[str, float]:
    """Means, fractions and quantiles; NaN where there is nothing to take the mean of."""
    counts, deltas = sums["class_counts"], sums["class_abs_delta"]
    metrics = {name: float(sums[name]) for name in _TOTALS}
    for name, total in sums.items():
        if total.dim() == 0 and name not in _TOTALS:
            metrics[name] = _ratio(total, sums[_SHARE_OF.get(name, "tokens")])
    for index, name in _CLASS_NAMES.items():
        # Most deltas are tiny, and positive: by count, a right response looks agreed on whatever the large ones say.
        for matrix, suffix in ((counts, ""), (deltas, "_by_delta")):
            metrics[f"{name}{suffix}"] = _ratio(matrix[index].sum(), matrix.sum())
            metrics[f"{name}_wrong{suffix}"] = _ratio(matrix[index, 0], matrix[:, 0].sum())
            metrics[f"{name}_right{suffix}"] = _ratio(matrix[index, 1], matrix[:, 1].sum())
        metrics[f"abs_delta_{name}"] = _ratio(deltas[index].sum(), counts[index].sum())
    for name in ("advantage", "logprob_gap"):
        for q, value in zip(_QUANTILES, _quantiles(sums[f"{name}_histogram"]), strict=True):
            metrics[f"{name}_p{round(100 * q):02d}"] = value
    return metrics


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> float:
    return float(part / whole) if whole else float("nan")


def _histogram(values_T: torch.Tensor) -> torch.Tensor:
    """Counts in bins that are symmetric about the one of 0 and logarithmic on both sides."""
    side_T = torch.bucketize(values_T.abs(), _EDGES.to(values_T.device))
    bins_T = len(_EDGES) + torch.where(values_T < 0, -side_T, side_T)
    return torch.bincount(bins_T, minlength=2 * len(_EDGES) + 1).double()


def _quantiles(histogram: torch.Tensor) -> list[float]:
    total = histogram.sum()
    if not total:
        return [float("nan")] * len(_QUANTILES)
    ranks = torch.tensor(_QUANTILES, dtype=torch.float64, device=histogram.device) * total
    bins = torch.searchsorted(histogram.cumsum(0), ranks) - len(_EDGES)
    middles = torch.cat([_EDGES.new_zeros(1), (_EDGES[:-1] * _EDGES[1:]).sqrt(), _EDGES[-1:]])
    return [float(middles[abs(b)]) * (-1 if b < 0 else 1) for b in bins.tolist()]

"""The on-policy loss: each sampled token's log-prob times a constant that teacher, reference and verifier set.

    L_on = - sum_t w_t sg[A_t] s_t / N        A_t = delta_t + (kappa_t - 1) d_t + eta_t o_i

sg[] stops the gradient, so d L_on / d s_t = - w_t A_t / N exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_sgopd.objective.gate import eta, gate, kappa
from megatron_sgopd.objective.methods import Method


@dataclass(frozen=True)
class TokenSignals:
    """What is known about T response tokens besides the student's own log-probs. Log-probs are in nats."""

    teacher_logprobs_T: torch.Tensor | None
    """q_t; only read by methods with a teacher."""
    reference_logprobs_T: torch.Tensor | None
    """r_t; only read where the reference is the initial student."""
    behaviour_logprobs_T: torch.Tensor
    """b_t of the policy that sampled the token."""
    outcome_advantage_T: torch.Tensor
    """o_i of the token's response."""
    trajectory_T: torch.Tensor
    """int64: which response the token belongs to."""
    mask_T: torch.Tensor
    """bool: whether the token counts; where it does not, the other fields may hold anything."""

    def __getitem__(self, tokens: slice) -> TokenSignals:
        """The signals of some of the tokens."""
        return self._map(lambda tensor: tensor[tokens])

    def to(self, device: torch.device) -> TokenSignals:
        """The signals on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> TokenSignals:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed: dict[str, Any] = {name: None if t is None else function(t) for name, t in fields.items()}
        return TokenSignals(**changed)


@dataclass(frozen=True)
class TokenUpdate:
    """What the objective does with each of T tokens. Masked tokens have weight 0 and advantage 0."""

    delta_T: torch.Tensor
    """delta_t = q_t - s_t; 0 for methods without a teacher."""
    classes_T: torch.Tensor
    """The gate's verdict."""
    kappa_T: torch.Tensor
    """kappa_t."""
    advantage_T: torch.Tensor
    """A_t."""
    weight_T: torch.Tensor
    """w_t."""


def token_update(student_logprobs_T: torch.Tensor, signals: TokenSignals, method: Method) -> TokenUpdate:
    """A_t and w_t of each token, as constants.

    Args:
        student_logprobs_T: s_t, without gradient.
        signals: of the same tokens; of all tokens of each response where `method.needs_whole_responses`.

    Raises:
        ValueError: the method needs teacher or reference log-probs, and `signals` has none.
    """
    s_T, mask_T = student_logprobs_T, signals.mask_T

    def kept(tensor_T: torch.Tensor) -> torch.Tensor:
        return torch.where(mask_T, tensor_T.to(s_T.dtype), 0.0)

    # The method decides, not what there is: a recorded batch may hold scores that this method does not use.
    q_T = _needed(signals.teacher_logprobs_T, "teacher", method) if method.teacher else s_T
    r_T = _needed(signals.reference_logprobs_T, "reference", method) if method.reference == "initial" else s_T
    delta_T, d_T, o_T = kept(q_T - s_T), kept(q_T - r_T), kept(signals.outcome_advantage_T)
    classes_T = gate(delta_T, o_T, method.noise_floor)
    kappa_T = kappa(classes_T, method, s_T)
    advantage_T = delta_T + (kappa_T - 1) * d_T + eta(classes_T, method, s_T) * o_T
    if method.trajectory_gate:
        keep_T = trajectory_gate(delta_T, o_T, signals.trajectory_T, method.trajectory_margin)
        advantage_T = torch.where(keep_T, advantage_T, 0.0)
    weight_T = torch.where(mask_T, torch.ones_like(s_T), 0.0)
    if method.importance_clip is not None:
        ratio_T = torch.exp(kept(s_T - signals.behaviour_logprobs_T)).clamp(max=method.importance_clip)
        weight_T = weight_T * ratio_T
    return TokenUpdate(delta_T, classes_T, kappa_T, advantage_T, weight_T)


def _needed(logprobs_T: torch.Tensor | None, name: str, method: Method) -> torch.Tensor:
    if logprobs_T is None:
        raise ValueError(
            f"method {method.name} needs {name} log-probs, and the signals have none: score the batch first"
        )
    return logprobs_T


def trajectory_gate(
    delta_T: torch.Tensor, outcome_advantage_T: torch.Tensor, trajectory_T: torch.Tensor, margin: float
) -> torch.Tensor:
    """bool [T], RG-OPD's gate: o > 0 and sum q > sum s + m, or o <= 0 and sum q < sum s - m, over a response."""
    _, index_T = trajectory_T.unique(return_inverse=True)
    responses = int(index_T.max()) + 1 if index_T.numel() else 0
    preference_T = delta_T.new_zeros(responses).index_add_(0, index_T, delta_T)[index_T]
    return torch.where(outcome_advantage_T > 0, preference_T > margin, preference_T < -margin)


def coefficients(
    student_logprobs_T: torch.Tensor, signals: TokenSignals, method: Method, normalizer: float
) -> torch.Tensor:
    """c_t = w_t A_t / N, so that the loss is - sum_t c_t s_t. Pure; `normalizer` is N."""
    update = token_update(student_logprobs_T, signals, method)
    return update.weight_T * update.advantage_T / normalizer


def on_policy_loss(
    student_logprobs_T: torch.Tensor, signals: TokenSignals, method: Method, normalizer: float
) -> torch.Tensor:
    """L_on, a scalar; differentiable in s_t alone."""
    constants_T = coefficients(student_logprobs_T.detach(), signals, method, normalizer)
    # A masked token's s_t may be anything, and 0 * inf is no number.
    return -(constants_T * torch.where(signals.mask_T, student_logprobs_T, 0.0)).sum()

"""The loss: each token's log-prob times a constant that teacher, reference and verifier set.

    L_on = - sum_t w_t sg[A_t] s_t / N        A_t = delta_t + (kappa_t - 1) d_t + eta_t o_i + c (r_t - s_t)

over the student's own tokens, c the weight of a KL to the reference (0 by default); |A_t| may have a bound. sg[] stops
the gradient, so d L_on / d s_t = - w_t A_t / N exactly. Tokens of the teacher's rollouts are only imitated: their
constant is a weight (imitation.py). From a batch's second update on

    w_t = min(exp(s_old - b_t), C) rho_t, or 0 where the ratio rho_t = exp(s_t - s_old) has left [1 - epsilon,
          1 + epsilon] on the side to which A_t pushes it

with s_old of the policy before the first, as in PPO's clipped objective (Schulman et al., arXiv 1707.06347). What
verifier and gates said of the batch stays: classes, kappa_t, o_i and which responses are kept are those of s_old. What
teacher and reference say of the student follows it: delta_t, and r_t - s_t, are those of s_t. So the mean gradient is
that of a KL from the policy as it is, and a student that has become its teacher rests; with delta_t of s_old it would
be driven past it.

`sgopd.objective` names a pure function that makes A_t instead: `advantage(update: TokenUpdate, signals: TokenSignals)
-> [T]`, from the preset's own update and everything that is known about the tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_sgopd.objective.gate import eta, gate, kappa
from megatron_sgopd.objective.methods import Method, Objective


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
    """bool: a token of the student's that counts; where it does not, the other fields may hold anything."""
    imitation_T: torch.Tensor | None = None
    """Weight of -s_t for the tokens of teacher rollouts, 0 for all others; None where there are none."""
    old_logprobs_T: torch.Tensor | None = None
    """s_t before the batch's first update; None in that update itself."""

    def __getitem__(self, tokens: slice | torch.Tensor) -> TokenSignals:
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
    """The gate's verdict on the batch, from before its first update."""
    kappa_T: torch.Tensor
    """kappa_t."""
    advantage_T: torch.Tensor
    """A_t."""
    weight_T: torch.Tensor
    """w_t."""
    clipped_T: torch.Tensor
    """bool: the importance ratio has left its range."""


def token_update(student_logprobs_T: torch.Tensor, signals: TokenSignals, method: Method) -> TokenUpdate:
    """A_t and w_t of each token, as constants.

    Args:
        student_logprobs_T: s_t, without gradient.
        signals: of the same tokens; of all tokens of each response where `method.needs_whole_responses`.

    Raises:
        ValueError: the method needs log-probs that `signals` has none of, or its objective gave no [T].
    """
    s_T, mask_T = student_logprobs_T, signals.mask_T

    def kept(tensor_T: torch.Tensor) -> torch.Tensor:
        return torch.where(mask_T, tensor_T.to(s_T.dtype), 0.0)

    old_T = s_T if signals.old_logprobs_T is None else signals.old_logprobs_T
    # The method decides, not what there is: a recorded batch may hold scores that this method does not use.
    q_T = _needed(signals.teacher_logprobs_T, "teacher", method) if method.teacher else None
    r_T = _needed(signals.reference_logprobs_T, "reference", method) if method.needs_reference else None
    nothing_T = torch.zeros_like(s_T)
    old_delta_T, delta_T = (nothing_T if q_T is None else kept(q_T - of_T) for of_T in (old_T, s_T))
    o_T = kept(signals.outcome_advantage_T)
    d_T = kept(q_T - r_T) if q_T is not None and r_T is not None and method.reference == "initial" else delta_T
    classes_T = gate(old_delta_T, o_T, method.noise_floor)
    kappa_T = kappa(classes_T, method, s_T)
    advantage_T = delta_T + (kappa_T - 1) * d_T + eta(classes_T, method, s_T) * o_T
    if method.trajectory_gate:
        keep_T = trajectory_gate(old_delta_T, o_T, signals.trajectory_T, method.trajectory_margin)
        advantage_T = torch.where(keep_T, advantage_T, 0.0)
    if r_T is not None and method.reference_kl_coef:
        advantage_T = advantage_T + method.reference_kl_coef * kept(r_T - s_T)
    weight_T = torch.where(mask_T, torch.ones_like(s_T), 0.0)
    if method.importance_clip is not None:
        weight_T = weight_T * torch.exp(kept(old_T - signals.behaviour_logprobs_T)).clamp(max=method.importance_clip)
    clipped_T = torch.zeros_like(mask_T)
    update = TokenUpdate(delta_T, classes_T, kappa_T, advantage_T, weight_T, clipped_T)
    if method.objective is not None:
        update = dataclasses.replace(update, advantage_T=kept(_own_advantage(method.objective, update, signals)))
    if (bound := method.advantage_clip) is not None:
        update = dataclasses.replace(update, advantage_T=update.advantage_T.clamp(-bound, bound))
    return update if signals.old_logprobs_T is None else _with_ratio(update, kept(s_T - old_T), method.ratio_clip)


def _own_advantage(objective: Objective, update: TokenUpdate, signals: TokenSignals) -> torch.Tensor:
    advantage_T = objective(update, signals)
    if not isinstance(advantage_T, torch.Tensor) or advantage_T.shape != update.delta_T.shape:
        seen = tuple(advantage_T.shape) if isinstance(advantage_T, torch.Tensor) else type(advantage_T).__name__
        raise ValueError(f"sgopd.objective returned {seen}, not one A_t for each of {len(update.delta_T)} tokens")
    return advantage_T


def _with_ratio(update: TokenUpdate, log_ratio_T: torch.Tensor, epsilon: float) -> TokenUpdate:
    """w_t with the importance ratio to the policy before the first update."""
    ratio_T = torch.exp(log_ratio_T)
    clipped_T = torch.where(update.advantage_T > 0, ratio_T > 1 + epsilon, ratio_T < 1 - epsilon)
    weight_T = torch.where(clipped_T, 0.0, update.weight_T * ratio_T)
    return dataclasses.replace(update, weight_T=weight_T, clipped_T=clipped_T)


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
    """c_t, so that the loss is - sum_t c_t s_t: w_t A_t / N, and for a teacher's tokens their weight / N. Pure."""
    update = token_update(student_logprobs_T, signals, method)
    constants_T = update.weight_T * update.advantage_T
    if signals.imitation_T is not None:
        constants_T = constants_T + signals.imitation_T
    return constants_T / normalizer


def full_coefficients(
    student_logprobs_T: torch.Tensor, signals: TokenSignals, method: Method
) -> tuple[torch.Tensor, torch.Tensor]:
    """f_t and c_t of the loss sum_t (f_t KL_t - c_t s_t).

    f_t = w_t kappa_t; c_t is what A_t has beside kappa_t delta_t, and for a teacher's tokens their weight. Pure. Where
    kappa is the same for all tokens and no weight is truncated or clipped, the gradient is the mean of the sampled
    estimator's over what could have been sampled, at every update on a batch. With a gate it is another update: the
    sampled token then decides how much the whole distribution counts.
    """
    update = token_update(student_logprobs_T, signals, method)
    rest_T = update.weight_T * (update.advantage_T - update.kappa_T * update.delta_T)
    if signals.imitation_T is not None:
        rest_T = rest_T + signals.imitation_T
    return update.weight_T * update.kappa_T, rest_T


def policy_loss(
    student_logprobs_T: torch.Tensor, signals: TokenSignals, method: Method, normalizer: float
) -> torch.Tensor:
    """The loss, a scalar; differentiable in s_t alone."""
    constants_T = coefficients(student_logprobs_T.detach(), signals, method, normalizer)
    # A token without part in the loss may have any s_t, and 0 * inf is no number.
    return -(constants_T * torch.where(constants_T != 0, student_logprobs_T, 0.0)).sum()

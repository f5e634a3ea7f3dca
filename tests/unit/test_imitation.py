"""Teacher tokens in the loss: cross-entropy alone, with the weight that the equations say. In float64."""

import dataclasses

import pytest
import torch

from megatron_sgopd.objective.imitation import imitation_weights
from megatron_sgopd.objective.loss import TokenSignals, policy_loss, token_update
from megatron_sgopd.objective.methods import METHODS
from megatron_sgopd.objective.metrics import metric_sums, metrics_from_sums

STUDENT, TEACHER = 11, 7
TOKENS = STUDENT + TEACHER


def mixed_batch(seed: int = 0) -> tuple[torch.Tensor, TokenSignals, torch.Tensor, torch.Tensor]:
    """s_t, signals, and which tokens are the student's and the teacher's, in one row; one student token is masked."""
    generator = torch.Generator().manual_seed(seed)
    s_T, q_T, r_T = (-torch.rand(TOKENS, generator=generator, dtype=torch.float64) * 4 for _ in range(3))
    teacher_T = torch.zeros(TOKENS, dtype=torch.bool)
    teacher_T[torch.randperm(TOKENS, generator=generator)[:TEACHER]] = True
    mask_T = ~teacher_T
    mask_T[mask_T.nonzero()[0]] = False
    b_T = torch.where(teacher_T, torch.nan, s_T + 0.01)
    o_T = torch.where(teacher_T, 0.0, torch.randn(TOKENS, generator=generator, dtype=torch.float64))
    return s_T, TokenSignals(q_T, r_T, b_T, o_T, torch.arange(TOKENS), mask_T), mask_T, teacher_T


@pytest.mark.parametrize("name", ["sgopd", "grpo", "rgopd"])
@pytest.mark.parametrize("weight", [0.25, 1.0, 1.5])
def test_auxiliary_adds_the_weighted_mean_over_teacher_tokens(name: str, weight: float) -> None:
    method = METHODS[name]
    s_T, signals, mask_T, teacher_T = mixed_batch()
    imitation_T, counted_T = imitation_weights(mask_T, teacher_T, weight, "auxiliary")
    on_policy = policy_loss(s_T, signals, method, int(mask_T.sum()))
    mixed = dataclasses.replace(signals, imitation_T=imitation_T.double())
    assert torch.equal(counted_T, mask_T)
    # float32 weights: w N / M is rounded once.
    torch.testing.assert_close(
        policy_loss(s_T, mixed, method, int(counted_T.sum())),
        on_policy - weight * s_T[teacher_T].mean(),
        rtol=1e-6,
        atol=1e-7,
    )


def test_mixture_is_one_mean_over_both_sources() -> None:
    method = METHODS["opd"]
    s_T, signals, mask_T, teacher_T = mixed_batch()
    imitation_T, counted_T = imitation_weights(mask_T, teacher_T, 0.3, "mixture")
    mixed = dataclasses.replace(signals, imitation_T=imitation_T.double())
    expected = (policy_loss(s_T, signals, method, 1.0) - s_T[teacher_T].sum()) / (mask_T.sum() + TEACHER)
    torch.testing.assert_close(policy_loss(s_T, mixed, method, int(counted_T.sum())), expected, rtol=1e-14, atol=0)


def test_without_a_student_token_that_counts_only_the_teacher_is_followed() -> None:
    s_T, signals, mask_T, teacher_T = mixed_batch()
    nobody_T = torch.zeros_like(mask_T)
    imitation_T, counted_T = imitation_weights(nobody_T, teacher_T, 0.5, "auxiliary")
    alone = dataclasses.replace(signals, mask_T=nobody_T, imitation_T=imitation_T.double())
    loss = policy_loss(s_T, alone, METHODS["sgopd"], int(counted_T.sum()))
    torch.testing.assert_close(loss, -0.5 * s_T[teacher_T].mean(), rtol=1e-14, atol=0)


def test_the_estimator_never_touches_teacher_tokens_nor_imitation_student_tokens() -> None:
    s_T, signals, mask_T, teacher_T = mixed_batch()
    imitation_T, _ = imitation_weights(mask_T, teacher_T, 1.0, "auxiliary")
    mixed = dataclasses.replace(signals, imitation_T=imitation_T.double())
    method = dataclasses.replace(METHODS["sgopd"], importance_clip=2.0)
    update = token_update(s_T, mixed, method)
    assert (update.weight_T[teacher_T] == 0).all() and (update.advantage_T[teacher_T] == 0).all()
    assert (imitation_T[~teacher_T] == 0).all()
    s_T.requires_grad_()
    (grad_T,) = torch.autograd.grad(policy_loss(s_T, mixed, method, 1.0), s_T)
    assert torch.isfinite(grad_T).all()
    assert torch.equal(grad_T[teacher_T], -imitation_T.double()[teacher_T])


def test_metrics_tell_the_sources_apart() -> None:
    s_T, signals, mask_T, teacher_T = mixed_batch()
    mixed = dataclasses.replace(signals, imitation_T=teacher_T.double() * 0.5)
    method = METHODS["sgopd"]
    alone, both = (
        metrics_from_sums(metric_sums(s_T, s, token_update(s_T, s, method), mask_T.double(), None, method))
        for s in (signals, mixed)
    )
    assert both["teacher_tokens"] == TEACHER and alone["teacher_tokens"] == 0
    assert both["teacher_loss"] == pytest.approx(-float(s_T[teacher_T].mean()), rel=1e-14)
    for name in ("tokens", "loss", "advantage", "agree", "logprob_gap"):
        assert both[name] == alone[name]

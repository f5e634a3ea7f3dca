"""Mean gradients of many updates on one batch, by exact enumeration: every token of a vocabulary of seven, weighted by
its chance to have been sampled. Float64; tolerances are of sums over the vocabulary."""

import dataclasses
import math

import pytest
import torch

from megatron_sgopd.objective.loss import TokenSignals, coefficients, full_coefficients, token_update
from megatron_sgopd.objective.methods import METHODS, Method, method_from_settings

VOCABULARY = 7
UNBOUNDED = {"ratio_clip": math.inf}


@dataclasses.dataclass(frozen=True)
class Case:
    """Log-probs [V] of a teacher, a reference and the policy that sampled the batch, and each token's o."""

    teacher_V: torch.Tensor
    reference_V: torch.Tensor
    old_V: torch.Tensor
    outcome_V: torch.Tensor

    @classmethod
    def of(cls, seed: int) -> "Case":
        generator = torch.Generator().manual_seed(seed)

        def noise() -> torch.Tensor:
            return torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)

        teacher_V = noise().log_softmax(0)
        old_V = (teacher_V + 0.15 * noise()).log_softmax(0)
        return cls(teacher_V, (old_V + 0.1 * noise()).log_softmax(0), old_V, noise().sign())

    def signals(self, method: Method) -> TokenSignals:
        return TokenSignals(
            teacher_logprobs_T=self.teacher_V,
            reference_logprobs_T=self.reference_V,
            behaviour_logprobs_T=self.old_V,
            outcome_advantage_T=self.outcome_V if method.outcome != "none" else torch.zeros_like(self.old_V),
            trajectory_T=torch.arange(VOCABULARY),
            mask_T=torch.ones(VOCABULARY, dtype=torch.bool),
            old_logprobs_T=self.old_V,
        )

    def sampled_gradient(self, z_V: torch.Tensor, method: Method) -> torch.Tensor:
        z_V = z_V.clone().requires_grad_()
        s_V = z_V.log_softmax(0)
        constants_V = coefficients(s_V.detach(), self.signals(method), method, 1.0)
        return torch.autograd.grad(-(self.old_V.exp() * constants_V * s_V).sum(), z_V)[0]

    def full_gradient(self, z_V: torch.Tensor, method: Method) -> torch.Tensor:
        z_V = z_V.clone().requires_grad_()
        s_V = z_V.log_softmax(0)
        full_V, rest_V = full_coefficients(s_V.detach(), self.signals(method), method)
        loss = self.old_V.exp() * (full_V * divergence(s_V, self.teacher_V) - rest_V * s_V)
        return torch.autograd.grad(loss.sum(), z_V)[0]


def divergence(s_V: torch.Tensor, other_V: torch.Tensor) -> torch.Tensor:
    """KL from the student."""
    return (s_V.exp() * (s_V - other_V)).sum()


def after(case: Case, method: Method, updates: int, full: bool = False) -> torch.Tensor:
    """The student's logits after updates with step 0.1."""
    gradient = case.full_gradient if full else case.sampled_gradient
    z_V = case.old_V.clone()
    for _ in range(updates):
        z_V = z_V - 0.1 * gradient(z_V, method)
    return z_V


@pytest.mark.parametrize(("seed", "full"), [(3, False), (4, False), (5, False), (5, True)])
def test_many_updates_bring_the_student_to_its_teacher_and_not_past_it(seed: int, full: bool) -> None:
    case, method = Case.of(seed), METHODS["opd"]
    reached = [
        float(divergence(after(case, method, updates, full).log_softmax(0), case.teacher_V))
        for updates in (0, 50, 1500)
    ]
    assert reached[0] > 2e-3 and reached[1] < reached[0] and reached[2] < 1e-5


def test_a_student_that_has_become_its_teacher_rests() -> None:
    case = Case.of(3)
    for name in ("opd", "sgopd_scaled", "opdvr", "grpd", "rgopd"):
        assert torch.equal(
            coefficients(case.teacher_V, case.signals(METHODS[name]), METHODS[name], 1.0), torch.zeros(7)
        )


@pytest.mark.parametrize("updates", [0, 1, 20])
@pytest.mark.parametrize("name", ["opd", "opd_grpo"])
@pytest.mark.parametrize("coefficient", [1.0, 1.8])
def test_full_and_sampled_have_one_mean_gradient_at_every_update(updates: int, name: str, coefficient: float) -> None:
    strengths = {"agree_coefficient": coefficient, "conflict_coefficient": coefficient}
    method = dataclasses.replace(METHODS[name], **strengths, **UNBOUNDED)
    case = Case.of(6)
    z_V = after(case, method, updates)
    sampled_V, full_V = case.sampled_gradient(z_V, method), case.full_gradient(z_V, method)
    assert sampled_V.abs().max() > 1e-3
    torch.testing.assert_close(full_V, sampled_V, rtol=0, atol=1e-15)


@pytest.mark.parametrize("updates", [0, 1, 20])
@pytest.mark.parametrize("name", ["opd", "exopd"])
def test_the_mean_gradient_is_that_of_the_kls_from_the_student_as_it_is(updates: int, name: str) -> None:
    method = dataclasses.replace(METHODS[name], reference_kl_coef=0.3, **UNBOUNDED)
    case = Case.of(7)
    z_V = after(case, method, updates).requires_grad_()
    s_V = z_V.log_softmax(0)
    # (lambda - 1) (q - r) is the gradient of (lambda - 1) (KL to the teacher - KL to the reference).
    more = method.agree_coefficient - 1
    teacher, reference = divergence(s_V, case.teacher_V), divergence(s_V, case.reference_V)
    (expected_V,) = torch.autograd.grad((1 + more) * teacher + (0.3 - more) * reference, z_V)
    torch.testing.assert_close(case.sampled_gradient(z_V.detach(), method), expected_V, rtol=0, atol=1e-15)


def test_what_the_verifier_was_heard_on_stays_while_the_student_moves() -> None:
    case, method = Case.of(8), METHODS["sgopd_scaled"]
    past_V = (case.teacher_V + 2 * (case.teacher_V - case.old_V)).log_softmax(0)
    before, later = (token_update(s_V, case.signals(method), method) for s_V in (case.old_V, past_V))
    turned_V = torch.sign(before.delta_T) != torch.sign(later.delta_T)
    assert turned_V.any() and len(before.classes_T.unique()) == 2
    assert torch.equal(later.classes_T, before.classes_T) and torch.equal(later.kappa_T, before.kappa_T)
    assert torch.equal(later.advantage_T, later.delta_T + (before.kappa_T - 1) * later.delta_T)


def test_a_gate_over_responses_drops_what_the_teacher_says_and_keeps_the_reference() -> None:
    method = method_from_settings("rgopd", reference_kl_coef=0.3)
    case = Case.of(9)
    update = token_update(case.old_V, case.signals(method), method)
    dropped_V = torch.sign(update.delta_T) != torch.sign(case.outcome_V)
    assert 0 < dropped_V.sum() < VOCABULARY
    held_V = 0.3 * (case.reference_V - case.old_V)
    assert torch.equal(update.advantage_T, torch.where(dropped_V, held_V, update.delta_T + held_V))

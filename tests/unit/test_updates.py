"""What can be added to any method: several updates on a batch, a KL to the reference, an objective of one's own."""

import dataclasses
from pathlib import Path

import pytest
import torch
from test_objective import TOKENS, batch, changed, random_logprobs

from megatron_sgopd.imports import import_function
from megatron_sgopd.objective.loss import (
    TokenSignals,
    TokenUpdate,
    coefficients,
    full_coefficients,
    policy_loss,
    token_update,
)
from megatron_sgopd.objective.methods import METHODS, method_from_settings
from megatron_sgopd.objective.metrics import metric_sums, metrics_from_sums

EPSILON = 0.2


def moved(s_T: torch.Tensor, scale: float) -> torch.Tensor:
    """The student after some updates."""
    return s_T + scale * torch.randn(TOKENS, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize("name", METHODS)
def test_the_first_update_is_the_one_step_path(name: str) -> None:
    method = METHODS[name]
    s_T, signals, _ = batch(3, method)
    again = changed(signals, old_logprobs_T=s_T)
    assert torch.equal(coefficients(s_T, signals, method, TOKENS), coefficients(s_T, again, method, TOKENS))


@pytest.mark.parametrize("name", ["sgopd", "grpo", "rgopd"])
@pytest.mark.parametrize("clip", [None, 1.5])
def test_later_updates_are_weighted_and_clipped_as_ppos(name: str, clip: float | None) -> None:
    method = method_from_settings(name, importance_clip=clip)
    old_T, signals, _ = batch(4, method)
    first = token_update(old_T, signals, method)
    s_T = moved(old_T, 0.3).requires_grad_()
    ratio_T = torch.exp(s_T - old_T)
    bounded_T = ratio_T.clamp(1 - EPSILON, 1 + EPSILON)
    follows_T = first.advantage_T != 0 if method.teacher else torch.zeros(TOKENS, dtype=torch.bool)
    advantage_T = first.advantage_T - torch.where(follows_T, s_T.detach() - old_T, 0.0)  # q - s of the student as it is
    surrogate = -(first.weight_T * torch.minimum(ratio_T * advantage_T, bounded_T * advantage_T)).sum()
    (expected_T,) = torch.autograd.grad(surrogate, s_T)
    loss = policy_loss(s_T, changed(signals, old_logprobs_T=old_T), method, 1.0)
    (grad_T,) = torch.autograd.grad(loss, s_T)
    torch.testing.assert_close(grad_T, expected_T, rtol=1e-12, atol=1e-15)  # A_t is another sum of three log-probs
    update = token_update(s_T.detach(), changed(signals, old_logprobs_T=old_T), method)
    acting_T = advantage_T != 0
    assert torch.equal(update.clipped_T[acting_T], (expected_T == 0)[acting_T])
    assert 0.1 < update.clipped_T.double().mean() < 0.9


def test_how_many_are_clipped_is_counted_from_the_second_update_on() -> None:
    method = METHODS["opd"]
    old_T, signals, outcomes_N = batch(5, method)
    s_T, outcomes_T = moved(old_T, 0.3), outcomes_N[signals.trajectory_T]
    later = changed(signals, old_logprobs_T=old_T)
    update = token_update(s_T, later, method)
    counted = metrics_from_sums(metric_sums(s_T, later, update, outcomes_T, None, method))
    assert counted["ratio_clipped"] == pytest.approx(float(update.clipped_T.double().mean()), rel=1e-14)
    half_T = torch.where(outcomes_T > 0, later.teacher_logprobs_T, s_T)  # the others' A_t is 0, and has no share
    acting = changed(later, teacher_logprobs_T=half_T)
    update = token_update(s_T, acting, method)
    counted = metrics_from_sums(metric_sums(s_T, acting, update, outcomes_T, None, method))
    assert counted["ratio_clipped"] == pytest.approx(float(update.clipped_T[outcomes_T > 0].double().mean()), rel=1e-14)
    first = metric_sums(s_T, signals, token_update(s_T, signals, method), outcomes_T, None, method)
    assert "ratio_clipped" not in first


@pytest.mark.parametrize("name", ["sgopd", "opd", "grpo"])
def test_the_reference_kl_adds_its_own_estimate(name: str) -> None:
    plain, held = METHODS[name], method_from_settings(name, reference_kl_coef=0.3)
    s_T, signals, _ = batch(6, plain)
    r_T = random_logprobs(torch.Generator().manual_seed(1))
    signals = changed(signals, reference_logprobs_T=r_T)
    difference_T = token_update(s_T, signals, held).advantage_T - token_update(s_T, signals, plain).advantage_T
    torch.testing.assert_close(difference_T, 0.3 * (r_T - s_T), rtol=1e-13, atol=1e-14)
    assert held.needs_reference and plain.needs_reference == (name == "sgopd")
    with pytest.raises(ValueError, match="needs reference log-probs"):
        token_update(s_T, changed(signals, reference_logprobs_T=None), held)


def test_a_student_that_is_the_reference_feels_no_kl() -> None:
    held = method_from_settings("opd", reference_kl_coef=5.0)
    s_T, signals, _ = batch(7, held)
    signals = changed(signals, reference_logprobs_T=s_T)
    plain_T = token_update(s_T, signals, METHODS["opd"]).advantage_T
    assert torch.equal(token_update(s_T, signals, held).advantage_T, plain_T)


def only_agreement(update: TokenUpdate, signals: TokenSignals) -> torch.Tensor:
    return torch.where(update.classes_T == 2, update.delta_T, 0.0)


def test_an_own_objective_makes_the_advantage_and_nothing_else() -> None:
    method = dataclasses.replace(METHODS["opdvr"], objective=only_agreement)
    s_T, signals, _ = batch(8, method)
    signals = changed(signals, mask_T=torch.arange(TOKENS) % 3 > 0)
    preset, own = token_update(s_T, signals, METHODS["opdvr"]), token_update(s_T, signals, method)
    assert torch.equal(own.advantage_T, preset.advantage_T), "opdvr zeroes what conflicts"
    assert torch.equal(own.classes_T, preset.classes_T) and torch.equal(own.weight_T, preset.weight_T)
    s_T.requires_grad_()
    (grad_T,) = torch.autograd.grad(policy_loss(s_T, signals, method, TOKENS), s_T)
    assert torch.equal(grad_T, -own.weight_T * own.advantage_T / TOKENS)


@pytest.mark.parametrize(
    ("returned", "seen"), [(None, "NoneType"), (torch.zeros(3), r"\(3,\)"), (torch.tensor(1.0), r"\(\)")]
)
def test_an_own_objective_must_give_one_number_a_token(returned: object, seen: str) -> None:
    method = dataclasses.replace(METHODS["opd"], objective=lambda update, signals: returned)
    s_T, signals, _ = batch(8, METHODS["opd"])
    with pytest.raises(ValueError, match=f"sgopd.objective returned {seen}, not one A_t for each of {TOKENS} tokens"):
        token_update(s_T, signals, method)


def test_an_own_objective_has_a_teacher_to_read() -> None:
    assert not METHODS["grpo"].teacher
    assert dataclasses.replace(METHODS["grpo"], objective=only_agreement).teacher


@pytest.mark.parametrize("name", ["opd", "opd_grpo"])
def test_the_full_estimator_has_the_mean_of_the_sampled_one(name: str) -> None:
    # For every token of a vocabulary of five, weighted by its chance to be sampled.
    method = METHODS[name]
    generator = torch.Generator().manual_seed(2)
    z_V = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    s_V, q_V = z_V.log_softmax(0), torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)
    true_V = torch.ones(5, dtype=torch.bool)
    signals = TokenSignals(q_V, None, s_V.detach(), torch.full((5,), 0.7).double(), torch.arange(5), true_V)
    chance_V = s_V.exp().detach()
    sampled_V = coefficients(s_V.detach(), signals, method, 1.0)
    (sampled,) = torch.autograd.grad(-(chance_V * sampled_V * s_V).sum(), z_V, retain_graph=True)
    full_V, rest_V = full_coefficients(s_V.detach(), signals, method)
    assert torch.equal(full_V, torch.ones(5, dtype=torch.float64))
    kl = (s_V.exp() * (s_V - q_V)).sum()
    (full,) = torch.autograd.grad((chance_V * (full_V * kl - rest_V * s_V)).sum(), z_V)
    torch.testing.assert_close(full, sampled, rtol=0, atol=1e-15)


def test_the_gate_scales_the_kl_and_leaves_the_rest_to_the_sampled_token() -> None:
    method = method_from_settings("sgopd_additive", conflict_coefficient=0.3, importance_clip=1.5)
    s_T, signals, _ = batch(12, method)
    imitation_T = (torch.arange(TOKENS) % 7 == 0).double()
    signals = changed(signals, mask_T=imitation_T == 0, imitation_T=imitation_T)
    update = token_update(s_T, signals, method)
    full_T, rest_T = full_coefficients(s_T, signals, method)
    lambda_, beta = torch.tensor([1.8, 0.3], dtype=torch.float64)
    assert torch.equal(full_T, update.weight_T * torch.where(update.classes_T == 2, lambda_, beta))
    assert (full_T[imitation_T > 0] == 0).all() and len(full_T.unique()) > 4
    sampled_T = coefficients(s_T, signals, method, 1.0)
    torch.testing.assert_close(full_T * update.delta_T + rest_T, sampled_T, rtol=1e-13, atol=1e-14)


def test_the_example_follows_a_sure_teacher_more(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = Path(__file__).parents[2] / "examples/own_objective"
    assert len((examples / "confident_teacher.py").read_text().splitlines()) < 30
    monkeypatch.syspath_prepend(examples)
    objective = import_function("confident_teacher:advantage", "sgopd.objective")
    method = dataclasses.replace(METHODS["sgopd"], objective=objective)
    s_T, signals, _ = batch(10, method)
    assert signals.teacher_logprobs_T is not None
    ratio_T = token_update(s_T, signals, method).advantage_T / token_update(s_T, signals, METHODS["sgopd"]).advantage_T
    assert torch.equal(ratio_T, torch.where(signals.teacher_logprobs_T.exp() > 0.1, 1.0, 0.5).double())

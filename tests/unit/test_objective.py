"""Identities of the algorithm, in float64; equality is exact unless a tolerance is stated."""

import dataclasses
import math
import re
from typing import Any

import pytest
import torch

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.objective.gate import AGREE, CONFLICT
from megatron_sgopd.objective.loss import TokenSignals, coefficients, policy_loss, token_update, trajectory_gate
from megatron_sgopd.objective.methods import METHODS, Method, method_from_settings
from megatron_sgopd.objective.metrics import metric_sums, metrics_from_sums
from megatron_sgopd.objective.outcome import outcome_advantage, uniform_groups

GROUP, GROUPS, LENGTH = 4, 3, 7
RESPONSES, TOKENS = GROUP * GROUPS, GROUP * GROUPS * LENGTH
GROUP_IDS_N = torch.arange(RESPONSES) // GROUP
TRAJECTORY_T = torch.arange(RESPONSES).repeat_interleave(LENGTH)


def random_logprobs(generator: torch.Generator) -> torch.Tensor:
    return -torch.rand(TOKENS, generator=generator, dtype=torch.float64) * 5


def batch(
    seed: int, method: Method, outcomes_N: torch.Tensor | None = None
) -> tuple[torch.Tensor, TokenSignals, torch.Tensor]:
    """s_t, signals and outcomes of random responses; the first group is uniform, the second mixed."""
    generator = torch.Generator().manual_seed(seed)
    s_T, q_T, r_T, b_T = (random_logprobs(generator) for _ in range(4))
    if outcomes_N is None:
        outcomes_N = torch.randint(0, 2, (RESPONSES,), generator=generator).double()
        outcomes_N[:GROUP], outcomes_N[GROUP], outcomes_N[GROUP + 1] = 1.0, 0.0, 1.0
    o_N = outcome_advantage(outcomes_N, GROUP_IDS_N, method.outcome)
    signals = TokenSignals(
        teacher_logprobs_T=q_T if method.teacher else None,
        reference_logprobs_T=r_T if method.reference == "initial" else None,
        behaviour_logprobs_T=b_T,
        outcome_advantage_T=o_N[TRAJECTORY_T],
        trajectory_T=TRAJECTORY_T,
        mask_T=torch.ones(TOKENS, dtype=torch.bool),
    )
    return s_T, signals, outcomes_N


def changed(signals: TokenSignals, **fields: Any) -> TokenSignals:
    return dataclasses.replace(signals, **fields)


def teacher_preference(student_logprobs_T: torch.Tensor, signals: TokenSignals) -> torch.Tensor:
    assert signals.teacher_logprobs_T is not None
    return signals.teacher_logprobs_T - student_logprobs_T


ROWS = {
    "sgopd": (1.8, 1.0, 0, 0, "initial", "group", "conflict"),
    "sgopd_scaled": (1.8, 1.0, 0, 0, "live", "group", "conflict"),
    "sgopd_additive": (1.8, 1.0, 1, 1, "live", "group", "conflict"),
    "opd": (1, 1, 0, 0, "live", "none", "conflict"),
    "exopd": (1.25, 1.25, 0, 0, "initial", "none", "conflict"),
    "opdvr": (1, 0, 0, 0, "live", "pm1", "conflict"),
    "grpd": (1, 0, 0, 0, "live", "group", "skip"),
    "grpo": (0, 0, 1, 1, "live", "group", "conflict"),
    "opd_grpo": (1, 1, 1, 1, "live", "group", "conflict"),
    "rgopd": (1, 1, 0, 0, "live", "pm1", "conflict"),
}


@pytest.mark.parametrize("name", ROWS)
def test_presets_are_the_table(name: str) -> None:
    m = METHODS[name]
    assert ROWS[name] == (
        m.agree_coefficient,
        m.conflict_coefficient,
        m.agree_outcome_weight,
        m.conflict_outcome_weight,
        m.reference,
        m.outcome,
        m.uniform_groups,
    )
    assert (m.noise_floor, m.importance_clip) == (0, None)
    assert m.trajectory_gate == (name == "rgopd")
    assert m.teacher == (name != "grpo")


# ---- Identities ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ROWS if ROWS[name][2] == 0])
def test_a_teacher_equal_to_the_student_changes_nothing(name: str) -> None:
    method = METHODS[name]
    s_T, signals, _ = batch(0, method)
    reference_T = s_T if method.reference == "initial" else None
    signals = changed(signals, teacher_logprobs_T=s_T, reference_logprobs_T=reference_T)
    s_T = s_T.clone().requires_grad_()
    loss = policy_loss(s_T, signals, method, TOKENS)
    (grad_T,) = torch.autograd.grad(loss, s_T)
    assert loss == 0
    assert torch.equal(grad_T, torch.zeros_like(grad_T))
    assert (token_update(s_T.detach(), signals, method).advantage_T == 0).all()


@pytest.mark.parametrize("reference", ["initial", "live"])
def test_coefficients_of_one_are_plain_opd_whatever_the_verifier_says(reference: str) -> None:
    method = method_from_settings("sgopd", agree_coefficient=1.0, reference=reference)
    for outcomes_N in (torch.zeros(RESPONSES), torch.ones(RESPONSES), None):
        s_T, signals, _ = batch(1, method, None if outcomes_N is None else outcomes_N.double())
        opd = changed(signals, reference_logprobs_T=None)
        assert torch.equal(
            token_update(s_T, signals, method).advantage_T, token_update(s_T, opd, METHODS["opd"]).advantage_T
        )


def test_equal_coefficients_with_a_frozen_reference_are_exopd() -> None:
    method = method_from_settings("sgopd", agree_coefficient=1.25, conflict_coefficient=1.25)
    s_T, signals, _ = batch(2, method)
    advantage_T = token_update(s_T, signals, method).advantage_T
    assert torch.equal(advantage_T, token_update(s_T, signals, METHODS["exopd"]).advantage_T)
    q_T, r_T = signals.teacher_logprobs_T, signals.reference_logprobs_T
    assert q_T is not None and r_T is not None
    # ExOPD's own form, q - s + (lambda - 1)(q - r): one rounding apart.
    torch.testing.assert_close(advantage_T, q_T - s_T + 0.25 * (q_T - r_T), rtol=1e-15, atol=1e-15)


def test_opdvr_clamps_delta_by_the_outcome() -> None:
    method = METHODS["opdvr"]
    s_T, signals, outcomes_N = batch(3, method)
    delta_T = teacher_preference(s_T, signals)
    expected_T = torch.where(outcomes_N[TRAJECTORY_T] > 0, delta_T.clamp(min=0), delta_T.clamp(max=0))
    assert torch.equal(token_update(s_T, signals, method).advantage_T, expected_T)


def test_grpo_is_the_outcome_alone() -> None:
    s_T, signals, _ = batch(4, METHODS["grpo"])
    assert signals.teacher_logprobs_T is None
    assert torch.equal(token_update(s_T, signals, METHODS["grpo"]).advantage_T, signals.outcome_advantage_T)


def test_scaled_and_extrapolated_readings_agree_while_the_student_is_the_reference() -> None:
    s_T, signals, _ = batch(5, METHODS["sgopd"])
    signals = changed(signals, reference_logprobs_T=s_T)
    live = changed(signals, reference_logprobs_T=None)
    assert torch.equal(
        token_update(s_T, signals, METHODS["sgopd"]).advantage_T,
        token_update(s_T, live, METHODS["sgopd_scaled"]).advantage_T,
    )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("clip", [None, 1.5])
def test_gradient_is_minus_w_a_over_n(name: str, clip: float | None) -> None:
    method = method_from_settings(name, importance_clip=clip)
    s_T, signals, _ = batch(6, method)
    update = token_update(s_T, signals, method)
    s_T = s_T.clone().requires_grad_()
    (grad_T,) = torch.autograd.grad(policy_loss(s_T, signals, method, 17), s_T)
    assert torch.equal(grad_T, -(update.weight_T * update.advantage_T / 17))
    assert torch.equal(-grad_T, coefficients(s_T.detach(), signals, method, 17))


def test_gradient_of_the_logits_is_the_closed_form() -> None:
    method = METHODS["sgopd"]
    _, signals, _ = batch(7, method)
    generator = torch.Generator().manual_seed(8)
    logits_TV = torch.randn(TOKENS, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    targets_T = torch.randint(0, 11, (TOKENS,), generator=generator)
    s_T = logits_TV.log_softmax(-1).gather(1, targets_T[:, None])[:, 0]
    policy_loss(s_T, signals, method, TOKENS).backward()
    c_T = coefficients(s_T.detach(), signals, method, TOKENS)
    onehot_TV = torch.nn.functional.one_hot(targets_T, 11)
    # Sums over 11 logits in another order.
    torch.testing.assert_close(
        logits_TV.grad, -c_T[:, None] * (onehot_TV - logits_TV.detach().softmax(-1)), rtol=1e-13, atol=1e-15
    )


def test_rgopd_keeps_whole_responses_by_the_sign_of_their_sum() -> None:
    method = method_from_settings("rgopd", trajectory_margin=0.5)
    s_T, signals, _ = batch(9, method)
    delta_T = teacher_preference(s_T, signals)
    expected_T = torch.zeros_like(delta_T)
    for response in range(RESPONSES):
        tokens = response == TRAJECTORY_T
        preference, o = float(delta_T[tokens].sum()), float(signals.outcome_advantage_T[tokens][0])
        if (o > 0 and preference > 0.5) or (o <= 0 and preference < -0.5):
            expected_T[tokens] = delta_T[tokens]
    advantage_T = token_update(s_T, signals, method).advantage_T
    assert 0 < (advantage_T == 0).sum() < TOKENS
    assert torch.equal(advantage_T, expected_T)


def test_the_trajectory_gate_drops_responses_at_its_margin() -> None:
    preferences = [(0.5, 1.0), (0.75, 1.0), (-0.5, -1.0), (-0.75, -1.0), (-0.75, 0.0), (0.75, 0.0)]
    delta_T, o_T = torch.tensor(preferences, dtype=torch.float64).unbind(1)
    keep_T = trajectory_gate(delta_T, o_T, torch.arange(6), margin=0.5)
    assert keep_T.tolist() == [False, True, False, True, True, False]


def test_importance_weights_are_ratios_cut_at_c() -> None:
    method = method_from_settings("opd", importance_clip=1.5)
    s_T, signals, _ = batch(10, method)
    ratio_T = torch.exp(s_T - signals.behaviour_logprobs_T)
    assert torch.equal(token_update(s_T, signals, method).weight_T, ratio_T.clamp(max=1.5))


def test_a_bound_on_the_advantage_and_how_many_reach_it() -> None:
    method = method_from_settings("sgopd_additive", advantage_clip=0.5)
    s_T, signals, outcomes_N = batch(10, method)
    free_T = token_update(s_T, signals, METHODS["sgopd_additive"]).advantage_T
    update = token_update(s_T, signals, method)
    assert torch.equal(update.advantage_T, free_T.clamp(-0.5, 0.5))
    sums = metric_sums(s_T, signals, update, outcomes_N[TRAJECTORY_T], None, method)
    reached = float((free_T.abs() >= 0.5).double().mean())
    assert 0 < reached < 1 and metrics_from_sums(sums)["advantage_clipped"] == pytest.approx(reached, rel=1e-14)


def test_what_has_no_outcome_is_out_of_its_groups_mean() -> None:
    outcomes_N = torch.tensor([1, 0, 0, 0, 1, 0], dtype=torch.float64)
    groups_N = torch.tensor([7, 7, 7, 7, 3, 3])
    counted_N = torch.tensor([True, True, False, False, True, False])
    centered_N = outcome_advantage(outcomes_N, groups_N, "group_centered", counted_N=counted_N)
    assert centered_N.tolist() == [0.5, -0.5, 0, 0, 0, 0]
    assert outcome_advantage(outcomes_N, groups_N, "pm1", counted_N=counted_N).tolist() == [1, -1, 0, 0, 1, 0]


def test_outcome_advantages() -> None:
    outcomes_N = torch.tensor([1, 0, 0, 0, 1, 1, 1, 1], dtype=torch.float64)
    groups_N = torch.tensor([7, 7, 7, 7, 3, 3, 3, 3])
    assert outcome_advantage(outcomes_N, groups_N, "pm1").tolist() == [1, -1, -1, -1, 1, 1, 1, 1]
    assert outcome_advantage(outcomes_N, groups_N, "group_centered").tolist() == [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]
    std = math.sqrt(0.75 * 0.25)
    torch.testing.assert_close(
        outcome_advantage(outcomes_N, groups_N, "group", eps=0.0)[:2],
        torch.tensor([0.75 / std, -0.25 / std], dtype=torch.float64),
        rtol=1e-15,
        atol=0,
    )
    assert uniform_groups(outcomes_N, groups_N).tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_uniform_groups_have_no_advantage_in_any_precision(dtype: torch.dtype) -> None:
    sizes = torch.tensor([1, 2, 3, 49, 300])  # bfloat16 cannot count to 300
    ids_N = torch.arange(len(sizes)).repeat_interleave(sizes)
    for outcome in (0.0, 1.0):
        assert (outcome_advantage(torch.full((len(ids_N),), outcome, dtype=dtype), ids_N, "group") == 0).all()


# ---- Metrics ---------------------------------------------------------------------------------------------


def test_metrics_are_what_they_are_called() -> None:
    method = method_from_settings("sgopd", importance_clip=2.0)
    s_T, signals, outcomes_N = batch(11, method)
    update = token_update(s_T, signals, method)
    right_T = outcomes_N[TRAJECTORY_T] > 0
    metrics = metrics_from_sums(metric_sums(s_T, signals, update, outcomes_N[TRAJECTORY_T], -s_T, method))
    delta_T, gap_T = teacher_preference(s_T, signals), (s_T - signals.behaviour_logprobs_T).abs()
    agree_T, undecided_T = update.classes_T == AGREE, signals.outcome_advantage_T == 0
    conflict_T = (update.classes_T == CONFLICT) & ~undecided_T
    assert undecided_T.any() and conflict_T.any() and signals.reference_logprobs_T is not None
    expected: dict[str, Any] = {
        "tokens": TOKENS,
        "agree": agree_T.double().mean(),
        "agree_right": agree_T[right_T].double().mean(),
        "conflict_wrong": conflict_T[~right_T].double().mean(),
        "undecided": undecided_T.double().mean(),
        "undecided_right": undecided_T[right_T].double().mean(),
        "undecided_wrong": undecided_T[~right_T].double().mean(),
        "acting_tokens": (update.advantage_T != 0).sum(),
        "neutral": 0.0,
        "abs_delta_agree": delta_T[agree_T].abs().mean(),
        "kappa": update.kappa_T.mean(),
        "advantage": update.advantage_T.mean(),
        "reverse_kl": -delta_T.mean(),
        "reference_kl": (s_T - signals.reference_logprobs_T).mean(),
        "entropy": -s_T.mean(),
        "logprob_gap": gap_T.mean(),
        "logprob_gap_max": gap_T.max(),
        "sign_flips": (delta_T.abs() < gap_T).double().mean(),
        "abs_delta_conflict": delta_T[conflict_T].abs().mean(),
        "abs_delta_undecided": delta_T[undecided_T].abs().mean(),
        "agree_wrong": agree_T[~right_T].double().mean(),
        "conflict": conflict_T.double().mean(),
        "conflict_right": conflict_T[right_T].double().mean(),
        "neutral_right": 0.0,
        "neutral_wrong": 0.0,
        "weight": update.weight_T.mean(),
        "importance_clipped": (torch.exp(s_T - signals.behaviour_logprobs_T) > 2).double().mean(),
        "loss": policy_loss(s_T, signals, method, TOKENS),
        "teacher_tokens": 0,
    }
    for name, class_T in (("agree", agree_T), ("conflict", conflict_T), ("undecided", undecided_T)):
        for suffix, these_T in (("", right_T | ~right_T), ("_right", right_T), ("_wrong", ~right_T)):
            share = delta_T[class_T & these_T].abs().sum() / delta_T[these_T].abs().sum()
            expected[f"{name}{suffix}_by_delta"] = share
    expected |= dict.fromkeys(["neutral_by_delta", "neutral_right_by_delta", "neutral_wrong_by_delta"], 0.0)
    spread = {"advantage": update.advantage_T, "logprob_gap": gap_T}
    quantiles = {f"{name}_p{q:02d}": (name, q) for name in spread for q in (5, 25, 50, 75, 95)}
    assert metrics.keys() == expected.keys() | quantiles.keys() | {"abs_delta_neutral", "teacher_loss"}
    assert math.isnan(metrics["abs_delta_neutral"]) and math.isnan(metrics["teacher_loss"])  # no token is
    for name, value in expected.items():  # sums in another order
        assert metrics[name] == pytest.approx(float(value), rel=1e-12), name
    for quantile, (name, q) in quantiles.items():  # the value stands for a bin that reaches 3 % to both sides
        value = metrics[quantile]
        reach = 0.03 * abs(value) + 1e-4
        assert (spread[name] <= value + reach).sum() >= q / 100 * TOKENS
        assert (spread[name] < value - reach).sum() <= q / 100 * TOKENS


@pytest.mark.parametrize("name", METHODS)
def test_no_tokens_at_all(name: str) -> None:
    s_T, signals, outcomes_N = batch(12, METHODS[name])
    none = signals[:0]
    assert policy_loss(s_T[:0], none, METHODS[name], 1.0) == 0
    update = token_update(s_T[:0], none, METHODS[name])
    sums = metric_sums(s_T[:0], none, update, outcomes_N[:0], s_T[:0], METHODS[name])
    assert metrics_from_sums(sums)["tokens"] == 0


# ---- Settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("sgpod", {}, "unknown sgopd.method 'sgpod': did you mean 'sgopd'"),
        ("nothing like it", {}, "unknown sgopd.method 'nothing like it': choose one. Known: sgopd, "),
        ("sgopd", {"outcome": "groups"}, "unknown sgopd.outcome 'groups': did you mean 'group'"),
        ("sgopd", {"reference": "frozen"}, "unknown sgopd.reference 'frozen': choose one. Known: initial, live"),
        ("sgopd", {"uniform_groups": "skipped"}, "unknown sgopd.uniform_groups 'skipped': did you mean 'skip'"),
        ("sgopd", {"agree_coefficient": math.inf}, "sgopd.agree_coefficient is inf"),
        ("sgopd", {"conflict_coefficient": -0.5}, "sgopd.conflict_coefficient is -0.5"),
        ("grpo", {"agree_outcome_weight": -1.0}, "sgopd.agree_outcome_weight is -1.0"),
        ("grpo", {"conflict_outcome_weight": math.nan}, "sgopd.conflict_outcome_weight is nan"),
        ("sgopd", {"noise_floor": -0.1}, "sgopd.noise_floor is -0.1"),
        ("rgopd", {"trajectory_margin": -2.0}, "sgopd.trajectory_margin is -2.0"),
        ("sgopd", {"importance_clip": 0.0}, "sgopd.importance_clip is 0.0"),
        ("opd", {"advantage_clip": 1.0, "estimator": "full"}, "leave one of them out"),
        ("sgopd", {"importance_clip": math.inf}, "sgopd.importance_clip is inf"),
        ("sgopd", {"outcome": "none"}, "set sgopd.outcome to pm1"),
        ("rgopd", {"outcome": "none"}, "set sgopd.outcome to pm1"),
        ("grpo", {"outcome": "none"}, "set sgopd.outcome to pm1"),
    ],
)
def test_bad_settings_are_refused_by_name(name: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        method_from_settings(name, **overrides)


def test_overrides_change_their_own_field_alone() -> None:
    method = method_from_settings("opdvr", noise_floor=0.25)
    assert dataclasses.replace(method, noise_floor=0.0) == METHODS["opdvr"]


@pytest.mark.parametrize(
    "overrides",
    [
        {"agree_coefficient": 0.5},
        {"conflict_coefficient": 0.5},
        {"agree_outcome_weight": 2.0},
        {"noise_floor": 0.5},
        {"reference": "initial"},
        {"trajectory_gate": True},
    ],
)
def test_a_teacher_is_asked_for_wherever_it_changes_an_update(overrides: dict[str, Any]) -> None:
    assert not METHODS["grpo"].teacher
    method = method_from_settings("grpo", **overrides)
    assert method.teacher
    s_T, signals, _ = batch(13, method)
    other = changed(signals, teacher_logprobs_T=s_T + teacher_preference(s_T, signals).flip(0))
    assert not torch.equal(token_update(s_T, signals, method).advantage_T, token_update(s_T, other, method).advantage_T)


def test_scores_that_a_method_does_not_use_change_nothing() -> None:
    # A batch recorded by one method may be replayed by another.
    for name in ("sgopd_scaled", "opd", "grpo"):
        method = METHODS[name]
        s_T, signals, outcomes_N = batch(14, method)
        _, recorded, _ = batch(14, METHODS["sgopd"])
        unused = changed(recorded, outcome_advantage_T=signals.outcome_advantage_T)
        update, expected = token_update(s_T, unused, method), token_update(s_T, signals, method)
        for field in dataclasses.fields(update):
            assert torch.equal(getattr(update, field.name), getattr(expected, field.name)), (name, field.name)
        sums = metric_sums(s_T, unused, update, outcomes_N[TRAJECTORY_T], None, method)
        assert ("reverse_kl" in sums, "sign_flips" in sums) == (method.teacher, method.teacher)


@pytest.mark.parametrize("field", ["teacher_logprobs_T", "reference_logprobs_T"])
def test_scores_that_a_method_needs_are_missed_by_name(field: str) -> None:
    s_T, signals, _ = batch(15, METHODS["sgopd"])
    with pytest.raises(ValueError, match=f"method sgopd needs {field.split('_')[0]} log-probs"):
        token_update(s_T, changed(signals, **{field: None}), METHODS["sgopd"])


def test_updates_have_the_students_dtype() -> None:
    method = method_from_settings("sgopd_additive", importance_clip=2.0, reference="initial")
    s_T, signals, _ = batch(16, method)
    update = token_update(s_T.float(), signals, method)
    for tensor_T in (update.delta_T, update.kappa_T, update.advantage_T, update.weight_T):
        assert tensor_T.dtype is torch.float32
    # float32 has 24 bits; the terms are of size 10.
    exact_T = token_update(s_T, signals, method).advantage_T
    torch.testing.assert_close(update.advantage_T.double(), exact_T, rtol=0, atol=1e-5)

"""Identities of the algorithm, in float64; equality is exact unless a tolerance is stated."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.objective.gate import AGREE, CONFLICT, NEUTRAL, gate
from megatron_sgopd.objective.loss import TokenSignals, coefficients, on_policy_loss, token_update
from megatron_sgopd.objective.methods import METHODS, Method, method_from_settings
from megatron_sgopd.objective.metrics import add_sums, metric_sums, metrics_from_sums
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


def changed(signals: TokenSignals, **fields: torch.Tensor | None) -> TokenSignals:
    return TokenSignals(**{**signals.__dict__, **fields})


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
    "rgopd": (1, 1, 0, 0, "live", "group", "conflict"),
}


@pytest.mark.parametrize("name", ROWS)
def test_presets_are_the_table(name: str):
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
def test_a_teacher_equal_to_the_student_changes_nothing(name: str):
    method = METHODS[name]
    s_T, signals, _ = batch(0, method)
    reference_T = s_T if method.reference == "initial" else None
    signals = changed(signals, teacher_logprobs_T=s_T, reference_logprobs_T=reference_T)
    s_T = s_T.clone().requires_grad_()
    loss = on_policy_loss(s_T, signals, method, TOKENS)
    loss.backward()
    assert loss == 0
    assert (s_T.grad == 0).all()
    assert (token_update(s_T.detach(), signals, method).advantage_T == 0).all()


@pytest.mark.parametrize("reference", ["initial", "live"])
def test_coefficients_of_one_are_plain_opd_whatever_the_verifier_says(reference: str):
    method = method_from_settings("sgopd", agree_coefficient=1.0, reference=reference)
    for outcomes_N in (torch.zeros(RESPONSES), torch.ones(RESPONSES), None):
        s_T, signals, _ = batch(1, method, None if outcomes_N is None else outcomes_N.double())
        opd = changed(signals, reference_logprobs_T=None)
        assert torch.equal(
            token_update(s_T, signals, method).advantage_T, token_update(s_T, opd, METHODS["opd"]).advantage_T
        )


def test_equal_coefficients_with_a_frozen_reference_are_exopd():
    method = method_from_settings("sgopd", agree_coefficient=1.25, conflict_coefficient=1.25)
    s_T, signals, _ = batch(2, method)
    advantage_T = token_update(s_T, signals, method).advantage_T
    assert torch.equal(advantage_T, token_update(s_T, signals, METHODS["exopd"]).advantage_T)
    q_T, r_T = signals.teacher_logprobs_T, signals.reference_logprobs_T
    # ExOPD's own form, q - s + (lambda - 1)(q - r): one rounding apart.
    torch.testing.assert_close(advantage_T, q_T - s_T + 0.25 * (q_T - r_T), rtol=1e-15, atol=1e-15)


def test_opdvr_clamps_delta_by_the_outcome():
    method = METHODS["opdvr"]
    s_T, signals, outcomes_N = batch(3, method)
    delta_T = signals.teacher_logprobs_T - s_T
    expected_T = torch.where(outcomes_N[TRAJECTORY_T] > 0, delta_T.clamp(min=0), delta_T.clamp(max=0))
    assert torch.equal(token_update(s_T, signals, method).advantage_T, expected_T)


def test_grpo_is_the_outcome_alone():
    s_T, signals, _ = batch(4, METHODS["grpo"])
    assert signals.teacher_logprobs_T is None
    assert torch.equal(token_update(s_T, signals, METHODS["grpo"]).advantage_T, signals.outcome_advantage_T)


def test_scaled_and_extrapolated_readings_agree_while_the_student_is_the_reference():
    s_T, signals, _ = batch(5, METHODS["sgopd"])
    signals = changed(signals, reference_logprobs_T=s_T)
    live = changed(signals, reference_logprobs_T=None)
    assert torch.equal(
        token_update(s_T, signals, METHODS["sgopd"]).advantage_T,
        token_update(s_T, live, METHODS["sgopd_scaled"]).advantage_T,
    )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("clip", [None, 1.5])
def test_gradient_is_minus_w_a_over_n(name: str, clip: float | None):
    method = method_from_settings(name, importance_clip=clip)
    s_T, signals, _ = batch(6, method)
    update = token_update(s_T, signals, method)
    s_T = s_T.clone().requires_grad_()
    on_policy_loss(s_T, signals, method, 17).backward()
    assert torch.equal(s_T.grad, -(update.weight_T * update.advantage_T / 17))
    assert torch.equal(-s_T.grad, coefficients(s_T.detach(), signals, method, 17))


def test_gradient_of_the_logits_is_the_closed_form():
    method = METHODS["sgopd"]
    _, signals, _ = batch(7, method)
    generator = torch.Generator().manual_seed(8)
    logits_TV = torch.randn(TOKENS, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    targets_T = torch.randint(0, 11, (TOKENS,), generator=generator)
    s_T = logits_TV.log_softmax(-1).gather(1, targets_T[:, None])[:, 0]
    on_policy_loss(s_T, signals, method, TOKENS).backward()
    c_T = coefficients(s_T.detach(), signals, method, TOKENS)
    onehot_TV = torch.nn.functional.one_hot(targets_T, 11)
    # Sums over 11 logits in another order.
    torch.testing.assert_close(
        logits_TV.grad, -c_T[:, None] * (onehot_TV - logits_TV.detach().softmax(-1)), rtol=1e-13, atol=1e-15
    )


def test_rgopd_keeps_whole_responses_by_the_sign_of_their_sum():
    method = method_from_settings("rgopd", trajectory_margin=0.5)
    s_T, signals, _ = batch(9, method)
    delta_T = signals.teacher_logprobs_T - s_T
    expected_T = torch.zeros_like(delta_T)
    for response in range(RESPONSES):
        tokens = response == TRAJECTORY_T
        preference, o = float(delta_T[tokens].sum()), float(signals.outcome_advantage_T[tokens][0])
        if (o > 0 and preference > 0.5) or (o <= 0 and preference < -0.5):
            expected_T[tokens] = delta_T[tokens]
    advantage_T = token_update(s_T, signals, method).advantage_T
    assert 0 < (advantage_T == 0).sum() < TOKENS
    assert torch.equal(advantage_T, expected_T)


def test_importance_weights_are_ratios_cut_at_c():
    method = method_from_settings("opd", importance_clip=1.5)
    s_T, signals, _ = batch(10, method)
    ratio_T = torch.exp(s_T - signals.behaviour_logprobs_T)
    assert torch.equal(token_update(s_T, signals, method).weight_T, ratio_T.clamp(max=1.5))


def test_outcome_advantages():
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


@pytest.mark.parametrize("size", range(1, 50))
def test_uniform_groups_have_no_advantage_in_float32(size: int):
    ids_N = torch.zeros(size, dtype=torch.int64)
    assert (outcome_advantage(torch.ones(size), ids_N, "group") == 0).all()


# ---- Properties ------------------------------------------------------------------------------------------

numbers = st.floats(-5, 5, allow_nan=False)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=50), st.floats(0, 2))
def test_classes_partition_the_tokens_by_the_definition(pairs: list[tuple[float, float]], tau: float):
    delta_T, o_T = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    classes_T = gate(delta_T, o_T, tau)
    for delta, o, found in zip(delta_T.tolist(), o_T.tolist(), classes_T.tolist(), strict=True):
        agrees = (delta > 0 < o) or (delta < 0 > o)
        assert found == (NEUTRAL if abs(delta) <= tau else AGREE if agrees else CONFLICT)


@given(st.integers(0, 10**6), st.floats(1, 3), st.floats(0, 1))
def test_the_live_gate_scales_delta_and_never_turns_it_around(seed: int, agree: float, conflict: float):
    method = method_from_settings("sgopd_scaled", agree_coefficient=agree, conflict_coefficient=conflict)
    s_T, signals, _ = batch(seed, method)
    update = token_update(s_T, signals, method)
    assert ((torch.sign(update.advantage_T) == torch.sign(update.delta_T)) | (update.advantage_T == 0)).all()
    # delta + (kappa - 1) delta rounds twice.
    assert (update.advantage_T.abs() <= agree * update.delta_T.abs() * (1 + 1e-14)).all()


@given(st.integers(0, 10**6), st.randoms(use_true_random=False), st.sampled_from(sorted(METHODS)))
def test_permuting_the_responses_of_a_group_changes_nothing(seed: int, random, name: str):
    method = METHODS[name]
    s_T, signals, outcomes_N = batch(seed, method)
    order = [GROUP * g + i for g in range(GROUPS) for i in random.sample(range(GROUP), GROUP)]
    tokens = torch.cat([torch.arange(LENGTH) + LENGTH * i for i in order])
    o_N = outcome_advantage(outcomes_N[order], GROUP_IDS_N, method.outcome)
    moved = changed(signals[tokens], outcome_advantage_T=o_N[TRAJECTORY_T], trajectory_T=TRAJECTORY_T)
    # Group means are summed in another order.
    torch.testing.assert_close(
        token_update(s_T[tokens], moved, method).advantage_T,
        token_update(s_T, signals, method).advantage_T[tokens],
        rtol=1e-12,
        atol=1e-12,
    )


@given(st.integers(0, 10**6), st.sampled_from(sorted(METHODS)))
def test_masked_tokens_do_nothing_whatever_they_hold(seed: int, name: str):
    method = method_from_settings(name, importance_clip=2.0)
    s_T, signals, outcomes_N = batch(seed, method)
    keep_T = torch.rand(TOKENS, generator=torch.Generator().manual_seed(seed)) < 0.7
    bad_T = torch.where(keep_T, 0.0, float("nan"))
    spoilt = {
        name: value + bad_T
        for name, value in signals.__dict__.items()
        if value is not None and value.is_floating_point()
    }
    masked = changed(signals, **spoilt, mask_T=keep_T)
    s_spoilt_T = (s_T + bad_T).requires_grad_()
    loss = on_policy_loss(s_spoilt_T, masked, method, 5)
    loss.backward()
    expected = on_policy_loss(s_T[keep_T], signals[keep_T], method, 5)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert (s_spoilt_T.grad[~keep_T] == 0).all()
    outcomes_T = outcomes_N[TRAJECTORY_T]
    entropy_T = s_T.abs()
    with_bad = metric_sums(
        s_spoilt_T.detach(),
        masked,
        token_update(s_spoilt_T.detach(), masked, method),
        outcomes_T,
        entropy_T + bad_T,
        method,
    )
    without = metric_sums(
        s_T[keep_T],
        signals[keep_T],
        token_update(s_T[keep_T], signals[keep_T], method),
        outcomes_T[keep_T],
        entropy_T[keep_T],
        method,
    )
    assert with_bad.keys() == without.keys()
    for key in without:
        torch.testing.assert_close(with_bad[key], without[key], rtol=1e-12, atol=1e-12)


@given(st.integers(0, 10**6), st.integers(0, TOKENS), st.sampled_from([n for n in METHODS if n != "rgopd"]))
def test_sums_over_parts_are_the_sums_of_the_whole(seed: int, cut: int, name: str):
    method = METHODS[name]
    s_T, signals, outcomes_N = batch(seed, method)

    def sums(part: slice):
        update = token_update(s_T[part], signals[part], method)
        return metric_sums(s_T[part], signals[part], update, outcomes_N[TRAJECTORY_T][part], -s_T[part], method)

    parts, whole = add_sums([sums(slice(0, cut)), sums(slice(cut, TOKENS))]), sums(slice(0, TOKENS))
    for key in whole:
        torch.testing.assert_close(parts[key], whole[key], rtol=1e-12, atol=1e-12)


def test_metrics_are_what_they_are_called():
    method = method_from_settings("sgopd", importance_clip=2.0)
    s_T, signals, outcomes_N = batch(11, method)
    update = token_update(s_T, signals, method)
    right_T = outcomes_N[TRAJECTORY_T] > 0
    metrics = metrics_from_sums(metric_sums(s_T, signals, update, outcomes_N[TRAJECTORY_T], -s_T, method))
    delta_T, gap_T = signals.teacher_logprobs_T - s_T, (s_T - signals.behaviour_logprobs_T).abs()
    agree_T = update.classes_T == AGREE
    expected = {
        "tokens": TOKENS,
        "agree": agree_T.double().mean(),
        "agree_right": agree_T[right_T].double().mean(),
        "conflict_wrong": (update.classes_T == CONFLICT)[~right_T].double().mean(),
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
        "importance_clipped": (torch.exp(s_T - signals.behaviour_logprobs_T) > 2).double().mean(),
        "loss": on_policy_loss(s_T, signals, method, TOKENS),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-12), name
    for q in (5, 25, 50, 75, 95):  # the value stands for a bin that reaches 3 % to both sides
        value = metrics[f"advantage_p{q:02d}"]
        reach = 0.03 * abs(value) + 1e-4
        assert (update.advantage_T <= value + reach).sum() >= q / 100 * TOKENS
        assert (update.advantage_T < value - reach).sum() <= q / 100 * TOKENS


@pytest.mark.parametrize("name", METHODS)
def test_no_tokens_at_all(name: str):
    s_T, signals, outcomes_N = batch(12, METHODS[name])
    none = signals[:0]
    assert on_policy_loss(s_T[:0], none, METHODS[name], 1.0) == 0
    update = token_update(s_T[:0], none, METHODS[name])
    sums = metric_sums(s_T[:0], none, update, outcomes_N[:0], s_T[:0], METHODS[name])
    assert metrics_from_sums(sums)["tokens"] == 0


# ---- Settings --------------------------------------------------------------------------------------------


def test_bad_settings_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"unknown sgopd.method 'sgpod': did you mean 'sgopd'"):
        method_from_settings("sgpod")
    with pytest.raises(ConfigError, match=r"sgopd.agree_coefficient is inf"):
        method_from_settings("sgopd", agree_coefficient=math.inf)
    with pytest.raises(ConfigError, match=r"set sgopd.outcome to pm1"):
        method_from_settings("sgopd", outcome="none")

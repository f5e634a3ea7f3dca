"""What holds for any batch: the gate, the signs of A_t, permutation, masks, padding and chunks. All in float64.

Log-probs are multiples of 1/4, so that ties and zeros are common and sums of them exact: equality is exact unless a
tolerance is stated.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megatron_sgopd.objective.gate import AGREE, CONFLICT, NEUTRAL, gate
from megatron_sgopd.objective.loss import TokenSignals, coefficients, policy_loss, token_update
from megatron_sgopd.objective.methods import METHODS, Method, method_from_settings
from megatron_sgopd.objective.metrics import Sums, add_sums, metric_sums
from megatron_sgopd.objective.outcome import outcome_advantage, uniform_groups


@dataclass(frozen=True)
class Rollouts:
    """N responses in groups of any size, with T tokens."""

    logprobs_4T: torch.Tensor
    """s, q, r and b."""
    outcomes_N: torch.Tensor
    groups_N: torch.Tensor
    trajectory_T: torch.Tensor

    @property
    def student_logprobs_T(self) -> torch.Tensor:
        return self.logprobs_4T[0]

    @property
    def outcomes_T(self) -> torch.Tensor:
        return self.outcomes_N[self.trajectory_T]

    def signals(self, method: Method) -> TokenSignals:
        advantage_N = outcome_advantage(self.outcomes_N, self.groups_N, method.outcome)
        _, q_T, r_T, b_T = self.logprobs_4T
        mask_T = torch.ones_like(q_T, dtype=torch.bool)
        return TokenSignals(q_T, r_T, b_T, advantage_N[self.trajectory_T], self.trajectory_T, mask_T)

    def reordered(self, order: list[int]) -> tuple[Rollouts, torch.Tensor]:
        """The same responses in another order, and where each token was."""
        tokens = torch.cat([(self.trajectory_T == i).nonzero()[:, 0] for i in order])
        places = torch.tensor(order).argsort()
        moved = Rollouts(
            self.logprobs_4T[:, tokens],
            self.outcomes_N[order],
            self.groups_N[order],
            places[self.trajectory_T[tokens]],
        )
        return moved, tokens


@st.composite
def rollouts(draw: st.DrawFn) -> Rollouts:
    lengths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=7))
    ids = st.sampled_from([-3, 0, 10**12])
    outcomes, groups = (
        draw(st.lists(values, min_size=len(lengths), max_size=len(lengths))) for values in (st.booleans(), ids)
    )
    quarters = draw(arrays(np.int8, (4, sum(lengths)), elements=st.integers(-20, 0)))
    return Rollouts(
        torch.from_numpy(quarters / 4),
        torch.tensor(outcomes, dtype=torch.float64),
        torch.tensor(groups),
        torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
    )


NOISE_FLOORS = st.sampled_from([0.0, 0.25, 1.0])


@st.composite
def methods(draw: st.DrawFn) -> Method:
    """A preset with the parts that can be added to any."""
    clip = draw(st.sampled_from([None, 1.5]))
    name = draw(st.sampled_from(sorted(METHODS)))
    return method_from_settings(name, importance_clip=clip, noise_floor=draw(NOISE_FLOORS))


TOKENWISE_METHODS = methods().filter(lambda method: not method.needs_whole_responses)


def changed(signals: TokenSignals, **fields: Any) -> TokenSignals:
    return dataclasses.replace(signals, **fields)


def sums_of(data: Rollouts, method: Method, part: slice = slice(None)) -> Sums:
    s_T, signals = data.student_logprobs_T[part], data.signals(method)[part]
    return metric_sums(s_T, signals, token_update(s_T, signals, method), data.outcomes_T[part], -s_T, method)


# ---- The gate ----------------------------------------------------------------------------------------------

numbers = st.floats(-5, 5)


@given(st.lists(st.tuples(numbers, numbers), max_size=50), st.floats(0, 2))
def test_classes_partition_the_tokens_by_the_definition(pairs: list[tuple[float, float]], tau: float) -> None:
    delta_T, o_T = torch.tensor(pairs, dtype=torch.float64).view(-1, 2).unbind(1)
    classes_T = gate(delta_T, o_T, tau)
    for delta, o, found in zip(delta_T.tolist(), o_T.tolist(), classes_T.tolist(), strict=True):
        agrees = (delta > 0 and o > 0) or (delta < 0 and o < 0)
        assert found == (NEUTRAL if abs(delta) <= tau else AGREE if agrees else CONFLICT)


def test_the_gate_sees_signs_whose_product_would_underflow() -> None:
    small_T = torch.tensor([1e-200, -1e-200], dtype=torch.float64)
    assert gate(small_T, small_T, 0.0).tolist() == [AGREE, AGREE]


@given(rollouts(), st.sampled_from(["group", "group_centered"]))
def test_a_group_decides_its_outcome_advantages_alone(data: Rollouts, mode: Any) -> None:
    advantage_N = outcome_advantage(data.outcomes_N, data.groups_N, mode)
    uniform_N = uniform_groups(data.outcomes_N, data.groups_N)
    for group in data.groups_N.unique():
        in_group_N = data.groups_N == group
        outcomes = data.outcomes_N[in_group_N]
        centered = outcomes - outcomes.mean()
        expected = centered / (outcomes.std(unbiased=False) + 1e-6) if mode == "group" else centered
        # The mean of squares is summed in another order.
        torch.testing.assert_close(advantage_N[in_group_N], expected, rtol=1e-14, atol=1e-14)
        assert uniform_N[in_group_N].tolist() == [len(outcomes.unique()) == 1] * len(outcomes)
    assert (advantage_N[uniform_N] == 0).all()
    assert torch.equal(torch.sign(advantage_N[~uniform_N]), 2 * data.outcomes_N[~uniform_N] - 1)


# ---- A_t, token by token -----------------------------------------------------------------------------------


@given(rollouts(), st.data())
def test_an_update_is_what_the_equations_say(data: Rollouts, draw: st.DataObject) -> None:
    agree, conflict, eta_agree, eta_conflict = draw.draw(st.tuples(*[st.sampled_from([0.0, 0.5, 1.0, 1.8])] * 4))
    method = Method(
        "any",
        agree,
        conflict,
        eta_agree,
        eta_conflict,
        reference=draw.draw(st.sampled_from(["initial", "live"])),
        outcome=draw.draw(st.sampled_from(["none", "pm1", "group", "group_centered"])),
        trajectory_gate=draw.draw(st.booleans()),
        trajectory_margin=draw.draw(st.sampled_from([0.0, 0.5])),
        noise_floor=draw.draw(NOISE_FLOORS),
    )
    signals = data.signals(method)
    found = token_update(data.student_logprobs_T, signals, method).advantage_T.tolist()
    advantages, trajectories = signals.outcome_advantage_T.tolist(), data.trajectory_T.tolist()
    preferences: dict[int, float] = {}
    rows = list(zip(*data.logprobs_4T.tolist(), advantages, trajectories, strict=True))
    for s, q, _, _, _, trajectory in rows:
        preferences[trajectory] = preferences.get(trajectory, 0.0) + q - s
    for (s, q, r, _, o, trajectory), advantage in zip(rows, found, strict=True):
        delta, margin = q - s, method.trajectory_margin
        d = q - r if method.reference == "initial" else delta
        if abs(delta) <= method.noise_floor:
            kappa, eta = 1.0, eta_conflict
        elif o * delta > 0:
            kappa, eta = agree, eta_agree
        else:
            kappa, eta = conflict, eta_conflict
        preference = preferences[trajectory]
        keep = preference > margin if o > 0 else preference < -margin
        expected = delta + (kappa - 1) * d + eta * o if keep or not method.trajectory_gate else 0.0
        assert advantage == expected


# ---- Signs of A_t ------------------------------------------------------------------------------------------


@given(rollouts(), st.floats(1, 3), st.floats(0, 1), NOISE_FLOORS)
def test_a_live_reference_scales_delta_and_never_turns_it_around(
    data: Rollouts, agree: float, conflict: float, tau: float
) -> None:
    method = method_from_settings(
        "sgopd_scaled", agree_coefficient=agree, conflict_coefficient=conflict, noise_floor=tau
    )
    update = token_update(data.student_logprobs_T, data.signals(method), method)
    delta_T, advantage_T, classes_T = update.delta_T, update.advantage_T, update.classes_T
    assert (torch.sign(advantage_T) * torch.sign(delta_T) >= 0).all()
    # lambda >= 1 >= beta, so agreement never weakens the teacher and conflict never strengthens it.
    assert (advantage_T.abs() >= delta_T.abs())[classes_T == AGREE].all()
    assert (advantage_T.abs() <= delta_T.abs())[classes_T == CONFLICT].all()
    assert torch.equal(advantage_T[classes_T == NEUTRAL], delta_T[classes_T == NEUTRAL])
    if conflict > 1e-9:  # below, 1 - beta may round to 1
        assert torch.equal(advantage_T == 0, delta_T == 0)


@given(rollouts(), st.floats(0, 3), st.floats(0, 3), st.floats(0, 3), st.sampled_from(["pm1", "group"]))
def test_without_a_conflict_coefficient_nothing_goes_against_the_verifier(
    data: Rollouts, agree: float, eta_agree: float, eta_conflict: float, outcome: str
) -> None:
    method = method_from_settings(
        "opdvr",
        agree_coefficient=agree,
        agree_outcome_weight=eta_agree,
        conflict_outcome_weight=eta_conflict,
        outcome=outcome,
    )
    signals = data.signals(method)
    advantage_T = token_update(data.student_logprobs_T, signals, method).advantage_T
    assert (torch.sign(advantage_T) * torch.sign(signals.outcome_advantage_T) >= 0).all()


@given(rollouts(), st.floats(1, 3), NOISE_FLOORS)
def test_a_frozen_reference_keeps_deltas_sign_where_the_teacher_left_it_the_same_way(
    data: Rollouts, agree: float, tau: float
) -> None:
    method = method_from_settings("sgopd", agree_coefficient=agree, noise_floor=tau)
    update = token_update(data.student_logprobs_T, data.signals(method), method)
    _, q_T, r_T, _ = data.logprobs_4T
    same_way_T = torch.sign(q_T - r_T) * torch.sign(update.delta_T) >= 0
    agree_T = update.classes_T == AGREE
    signs_T = torch.sign(update.advantage_T) * torch.sign(update.delta_T)
    assert (signs_T[agree_T & same_way_T] > 0).all()
    assert torch.equal(update.advantage_T[~agree_T], update.delta_T[~agree_T])  # beta = 1


# ---- What must not matter ----------------------------------------------------------------------------------


@given(rollouts(), methods(), st.randoms(use_true_random=False))
def test_each_responses_updates_move_with_it(data: Rollouts, method: Method, random: Any) -> None:
    order = list(range(len(data.outcomes_N)))
    random.shuffle(order)
    moved, tokens = data.reordered(order)
    s_T = data.student_logprobs_T
    torch.testing.assert_close(
        coefficients(moved.student_logprobs_T, moved.signals(method), method, 4.0),
        coefficients(s_T, data.signals(method), method, 4.0)[tokens],
        # A group's mean of squares is summed in another order.
        rtol=1e-13,
        atol=1e-13,
    )


@given(rollouts(), methods(), st.data())
def test_masked_tokens_do_nothing_whatever_they_hold(data: Rollouts, method: Method, draw: st.DataObject) -> None:
    tokens = len(data.trajectory_T)
    garbage = draw.draw(
        st.lists(st.sampled_from([None, np.nan, np.inf, -np.inf, 0.0]), min_size=tokens, max_size=tokens)
    )
    keep_T = torch.tensor([value is None for value in garbage], dtype=torch.bool)
    garbage_T = torch.tensor([value or 0.0 for value in garbage], dtype=torch.float64)
    s_T, signals = data.student_logprobs_T, data.signals(method)

    def spoilt(values_T: torch.Tensor) -> torch.Tensor:
        return torch.where(keep_T, values_T, garbage_T)

    masked = TokenSignals(
        spoilt(data.logprobs_4T[1]),
        spoilt(data.logprobs_4T[2]),
        spoilt(data.logprobs_4T[3]),
        spoilt(signals.outcome_advantage_T),
        signals.trajectory_T,
        keep_T,
    )
    _nothing_but_the_kept_counts(data, method, spoilt(s_T), masked, keep_T, keep_T.nonzero()[:, 0])


@given(rollouts(), methods(), st.integers(0, 5), st.sampled_from([0.0, np.nan, -np.inf]))
def test_padding_changes_nothing(data: Rollouts, method: Method, count: int, value: float) -> None:
    s_T, signals = data.student_logprobs_T, data.signals(method)

    def padded(values_T: torch.Tensor) -> torch.Tensor:
        return torch.cat([values_T, values_T.new_full((count,), value)])

    tokens = len(s_T)
    with_padding = TokenSignals(
        padded(data.logprobs_4T[1]),
        padded(data.logprobs_4T[2]),
        padded(data.logprobs_4T[3]),
        padded(signals.outcome_advantage_T),
        torch.cat([signals.trajectory_T, torch.zeros(count, dtype=torch.int64)]),
        torch.arange(tokens + count) < tokens,
    )
    _nothing_but_the_kept_counts(data, method, padded(s_T), with_padding, with_padding.mask_T, torch.arange(tokens))


def _nothing_but_the_kept_counts(
    data: Rollouts,
    method: Method,
    student_logprobs_T: torch.Tensor,
    signals: TokenSignals,
    keep_T: torch.Tensor,
    kept_tokens: torch.Tensor,
) -> None:
    """Loss, gradient and metrics are those of the batch that holds only `kept_tokens` of `data`."""
    s_T = student_logprobs_T.clone().requires_grad_()
    loss = policy_loss(s_T, signals, method, 4.0)
    (grad_T,) = torch.autograd.grad(loss, s_T)
    short_s_T, whole = data.student_logprobs_T[kept_tokens], data.signals(method)
    fields = {field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)}
    short = TokenSignals(**{name: None if value is None else value[kept_tokens] for name, value in fields.items()})
    # Zeros in between change how a sum is grouped.
    torch.testing.assert_close(loss, policy_loss(short_s_T, short, method, 4.0), rtol=1e-14, atol=1e-14)
    assert torch.equal(grad_T[keep_T], -coefficients(short_s_T, short, method, 4.0))
    assert (grad_T[~keep_T] == 0).all()
    outcomes_T = torch.full_like(student_logprobs_T, 1.0)
    outcomes_T[keep_T] = data.outcomes_T[kept_tokens]
    update, short_update = token_update(s_T.detach(), signals, method), token_update(short_s_T, short, method)
    assert (update.weight_T[~keep_T] == 0).all() and (update.advantage_T[~keep_T] == 0).all()
    found = metric_sums(s_T.detach(), signals, update, outcomes_T, -s_T.detach(), method)
    expected = metric_sums(short_s_T, short, short_update, data.outcomes_T[kept_tokens], -short_s_T, method)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@given(rollouts(), TOKENWISE_METHODS, st.data())
def test_chunks_have_the_coefficients_and_sums_of_the_whole(
    data: Rollouts, method: Method, draw: st.DataObject
) -> None:
    tokens = len(data.trajectory_T)
    first, second = sorted(draw.draw(st.tuples(st.integers(0, tokens), st.integers(0, tokens))))
    chunks = [slice(0, first), slice(first, second), slice(second, tokens)]
    s_T, signals = data.student_logprobs_T, data.signals(method)
    parts = [coefficients(s_T[chunk], signals[chunk], method, 4.0) for chunk in chunks]
    assert torch.equal(torch.cat(parts), coefficients(s_T, signals, method, 4.0))
    added, whole = add_sums([sums_of(data, method, chunk) for chunk in chunks]), sums_of(data, method)
    assert added.keys() == whole.keys()
    for name in whole:
        # Outcome advantages and importance weights are no multiples of 1/4.
        torch.testing.assert_close(added[name], whole[name], rtol=1e-13, atol=1e-13)

"""Packing: every token once, in order, in rows that hold nothing else of the sequence's neighbours."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.rollout.packing import assign_rows, pack
from megatron_sgopd.rollout.prompts import Prompt
from megatron_sgopd.rollout.trajectory import Trajectory
from megatron_sgopd.step import behaviour_logprobs, in_row_order

ROW = 16


@st.composite
def trajectories(draw: st.DrawFn) -> list[Trajectory]:
    made = []
    for i in range(draw(st.integers(1, 20))):
        prompt_length = draw(st.integers(1, ROW - 1))
        response_length = draw(st.integers(0, ROW - prompt_length))
        prompt = Prompt(str(i), "", tuple(range(100 * i + 1, 100 * i + 1 + prompt_length)), "", "", {})
        response = tuple(range(100 * i + 50, 100 * i + 50 + response_length))
        made.append(Trajectory(prompt, 0, response, tuple(-float(token) for token in response), False))
    return made


@given(trajectories(), st.integers(1, 4))
def test_every_sequence_lies_whole_in_one_row_with_positions_from_zero(made: list[Trajectory], multiple: int):
    rows = pack(made, ROW, multiple)
    assert rows.rows % multiple == 0
    found = []
    for tokens, positions, segments in zip(rows.tokens_RS, rows.positions_RS, rows.segments_RS, strict=True):
        assert (segments[1:] >= segments[:-1]).all()
        for segment in segments.unique():
            here = segments == segment
            assert positions[here].tolist() == list(range(int(here.sum())))
            found.append(tuple(tokens[here].tolist()))
    expected = [t.prompt.token_ids + t.token_ids for t in made]
    assert sorted(sequence for sequence in found if any(sequence)) == sorted(expected)


@given(trajectories(), st.integers(1, 4))
def test_response_tokens_are_predicted_at_the_column_before_them(made: list[Trajectory], multiple: int):
    rows = pack(made, ROW, multiple)
    assert torch.equal(rows.tokens_RS[rows.row_T, rows.column_T + 1], rows.targets_T)
    assert torch.equal(rows.segments_RS[rows.row_T, rows.column_T], rows.segments_RS[rows.row_T, rows.column_T + 1])
    for trajectory, token, target in zip(rows.trajectory_T, rows.token_T, rows.targets_T, strict=True):
        assert made[trajectory].token_ids[token] == target
    assert len(rows.targets_T) == sum(len(t.token_ids) for t in made) == rows.offsets_R1[-1]
    for row in range(rows.rows):
        assert (rows.row_T[rows.tokens_of_rows(row, row + 1)] == row).all()


@given(trajectories())
def test_values_of_trajectories_come_to_their_tokens(made: list[Trajectory]):
    rows = pack(made, ROW, 2)
    assert torch.equal(behaviour_logprobs(made, rows), -rows.targets_T.float())
    values_T = torch.arange(len(rows.targets_T))
    assert torch.equal(in_row_order(values_T[rows.trajectory_order()], rows), values_T)


@given(st.lists(st.integers(1, ROW), min_size=1, max_size=60))
def test_rows_are_full_enough(lengths: list[int]):
    rows = assign_rows(lengths, ROW)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= ROW for row in rows)
    # First fit leaves at most one row half empty or worse.
    assert sum(2 * sum(lengths[index] for index in row) <= ROW for row in rows) <= 1


def test_shares_of_the_rows_hold_like_amounts_of_tokens():
    prompt = Prompt("0", "", (1,), "", "", {})
    made = [Trajectory(prompt, i, (2,) * (1 + i % 9), (0.0,) * (1 + i % 9), False) for i in range(400)]
    rows = pack(made, ROW, 4)
    share = rows.rows // 4
    counts = [rows.tokens_of_rows(share * k, share * (k + 1)) for k in range(4)]
    sizes = [span.stop - span.start for span in counts]
    assert max(sizes) - min(sizes) <= 2 * ROW


def test_a_sequence_longer_than_a_row_is_refused():
    with pytest.raises(ConfigError, match=r"17 tokens does not fit a row of train.row_tokens=16"):
        assign_rows([17], ROW)

"""Packing: every token once, in order, in rows that hold nothing else of the sequence's neighbours."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.platform.cpu import CpuPlatform
from megatron_sgopd.rollout.packing import PackedRows, assign_rows, context_columns, pack, split_evenly
from megatron_sgopd.rollout.prompts import Prompt
from megatron_sgopd.rollout.trajectory import Trajectory
from megatron_sgopd.step import behaviour_logprobs, in_row_order

ROW = 16


@st.composite
def trajectories(draw: st.DrawFn) -> list[Trajectory]:
    """Of a few prompts, several responses each; no two have a token in common."""
    made = []
    for i in range(draw(st.integers(1, 8))):
        prompt_length = draw(st.integers(1, ROW - 1))
        prompt = Prompt(str(i), "", tuple(range(1000 * i + 1, 1000 * i + 1 + prompt_length)), "", "", {})
        for sample in range(draw(st.integers(1, 4))):
            first, length = 1000 * i + 100 * (sample + 1), draw(st.integers(0, ROW - prompt_length))
            response = tuple(range(first, first + length))
            made.append(Trajectory(prompt, sample, response, tuple(-float(token) for token in response), False))
    return draw(st.permutations(made))


class Context:
    """In place of the process group of context-parallel ranks, which only asks for these."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.size = lambda: rank, lambda: ranks


def seen_at(rows: PackedRows, row: int, column: int) -> tuple[list[int], list[int]]:
    """Tokens and positions that the token of a column attends to on the CPU, where prompts may be shared."""
    mask = CpuPlatform().packed_attention(rows.segments_RS, rows.responses_RS)["attention_mask"]
    seen = ~mask[row, 0, column]
    return rows.tokens_RS[row, seen].tolist(), rows.positions_RS[row, seen].tolist()


@given(trajectories(), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.sampled_from([1, 2, 4]))
def test_a_response_token_is_predicted_from_its_prompt_and_what_came_before_it(
    made: list[Trajectory], shares: int, most: int, share_prompts: bool, context_ranks: int
):
    rows = pack(made, ROW, shares, most, share_prompts, context_ranks)
    assert rows.rows % (shares * rows.microbatch_rows) == 0 and rows.microbatch_rows <= most
    for t, (index, token) in enumerate(zip(rows.trajectory_T.tolist(), rows.token_T.tolist(), strict=True)):
        trajectory = made[index]
        expected = trajectory.prompt.token_ids + trajectory.token_ids[:token]
        row, column = int(rows.row_T[t]), int(rows.column_T[t])
        assert seen_at(rows, row, column) == (list(expected), list(range(len(expected))))
        assert trajectory.token_ids[token] == rows.targets_T[t]
    assert sorted(rows.targets_T.tolist()) == sorted(token for t in made for token in t.token_ids)
    assert rows.offsets_R1[-1] == len(rows.targets_T)
    for row in range(rows.rows):
        assert (rows.row_T[rows.tokens_of_rows(row, row + 1)] == row).all()
        assert (rows.segments_RS[row].diff() >= 0).all()
    if not share_prompts:
        assert int(rows.responses_RS.max()) <= 1


@given(trajectories())
def test_values_of_trajectories_come_to_their_tokens(made: list[Trajectory]):
    rows = pack(made, ROW, 1, 2, share_prompts=True)
    assert torch.equal(behaviour_logprobs(made, rows), -rows.targets_T.float())
    values_T = torch.arange(len(rows.targets_T))
    assert torch.equal(in_row_order(values_T[rows.trajectory_order()], rows), values_T)


def of_lengths(lengths: list[int], group_size: int = 1) -> list[Trajectory]:
    """Trajectories of one prompt token and `length` - 1 of the response."""
    return [
        Trajectory(Prompt(str(i // group_size), "", (1,), "", "", {}), i, (2,) * (n - 1), (0.0,) * (n - 1), False)
        for i, n in enumerate(lengths)
    ]


@given(st.lists(st.integers(1, ROW), min_size=1, max_size=60))
def test_rows_are_full_enough(lengths: list[int]):
    rows = assign_rows(of_lengths(lengths), ROW, share_prompts=False)
    filled = [sum(lengths[index] for segment in row for index in segment) for row in rows]
    assert sorted(index for row in rows for segment in row for index in segment) == list(range(len(lengths)))
    assert max(filled) <= ROW
    assert sum(2 * tokens <= ROW for tokens in filled) <= 1  # as first fit leaves them


@given(trajectories(), st.sampled_from([2, 4]), st.booleans())
def test_ranks_that_split_rows_hold_every_column_once_and_as_much_of_each_segment(
    made: list[Trajectory], ranks: int, share_prompts: bool
):
    rows = pack(made, ROW, 1, 2, share_prompts, ranks)
    columns_CRL = context_columns(rows.segments_RS, ranks)
    assert columns_CRL.shape == (ranks, rows.rows, ROW // ranks)
    assert (columns_CRL.diff() > 0).all()
    for row in range(rows.rows):
        assert sorted(columns_CRL[:, row].flatten().tolist()) == list(range(ROW))
        held = [rows.segments_RS[row, columns].bincount().tolist() for columns in columns_CRL[:, row]]
        assert held == [held[0]] * ranks
    # What Megatron's rope of packed sequences takes a rank's columns for.
    for rank in range(ranks):
        for row in range(rows.rows):
            _, lengths = rows.segments_RS[row].unique_consecutive(return_counts=True)
            starts = lengths.cumsum(0) - lengths
            expected = [
                _get_thd_freqs_on_this_cp_rank(rank, ranks, torch.empty(length // ranks), torch.arange(ROW), start)
                for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
            ]
            assert torch.equal(columns_CRL[rank, row], torch.cat(expected))


@given(trajectories(), st.sampled_from([2, 4]))
def test_ranks_that_split_rows_see_what_one_rank_sees(made: list[Trajectory], ranks: int):
    rows = pack(made, ROW, 1, 2, True, ranks)
    columns_CRL = context_columns(rows.segments_RS, ranks)
    of_keys_RS = columns_CRL.transpose(0, 1).reshape(rows.rows, ROW)
    whole = CpuPlatform().packed_attention(rows.segments_RS, rows.responses_RS)["attention_mask"]
    for rank in range(ranks):
        context = Context(rank, ranks)
        mask = CpuPlatform().packed_attention(rows.segments_RS, rows.responses_RS, context)["attention_mask"]
        for row in range(rows.rows):
            expected = whole[row, 0][columns_CRL[rank, row]][:, of_keys_RS[row]]
            assert torch.equal(mask[row, 0], expected)


def test_one_rank_holds_rows_as_they_are():
    rows = pack(of_lengths([3, 5, 7, 11]), ROW, 1, 2, share_prompts=True)
    (columns_RS,) = context_columns(rows.segments_RS, 1)
    assert torch.equal(columns_RS, torch.arange(ROW).expand(rows.rows, ROW))


def test_groups_that_fit_share_one_prompt_and_others_as_few_as_they_can():
    prompt = Prompt("p", "", (1,) * 6, "", "", {})
    made = [Trajectory(prompt, i, (2,) * n, (0.0,) * n, False) for i, n in enumerate((3, 3, 4, 4))]
    assert assign_rows(made, 20, share_prompts=True) == [[[2, 3, 0, 1]]]
    assert assign_rows(made, 16, share_prompts=True) == [[[2, 3]], [[0, 1]]]


@given(st.integers(0, 300), st.integers(1, 8), st.integers(1, 20))
def test_microbatches_are_as_few_and_as_small_as_can_be(rows: int, shares: int, most: int):
    microbatches, size = split_evenly(rows, shares, most)
    fewest = max(1, -(-rows // (shares * most)))
    assert microbatches == fewest
    assert 1 <= size <= most and shares * fewest * size >= rows
    assert size == 1 or shares * fewest * (size - 1) < rows


def test_shares_of_the_rows_hold_like_amounts_of_tokens():
    rows = pack(of_lengths([2 + i % 9 for i in range(400)], group_size=4), ROW, 4, 1, share_prompts=True)
    share = rows.rows // 4
    counts = [rows.tokens_of_rows(share * k, share * (k + 1)) for k in range(4)]
    sizes = [span.stop - span.start for span in counts]
    assert max(sizes) - min(sizes) <= 2 * ROW


def test_a_sequence_longer_than_a_row_is_refused():
    with pytest.raises(ConfigError, match=r"17 tokens does not fit a row of train.row_tokens=16"):
        assign_rows(of_lengths([17]), ROW, share_prompts=False)

"""Trajectories packed into rows of equal length, the same number on every data-parallel rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.rollout.trajectory import Trajectory


@dataclass(frozen=True)
class PackedRows:
    """Rows of packed segments (R rows of S tokens) and the T response tokens in them, row by row.

    A segment is a prompt with one response to it, or with several of its group: these attend to the prompt and to
    themselves. Each response token has a column at which it is predicted, where its log-prob is taken: the one before
    it, or the prompt's last for a response's first.
    """

    tokens_RS: torch.Tensor
    """int64; padding is 0."""
    positions_RS: torch.Tensor
    """int64; starts at 0 in every prompt, and goes on from there in each of its responses."""
    segments_RS: torch.Tensor
    """int64; rises along a row, one number a segment with its own padding; what is left of a row has one of its own."""
    responses_RS: torch.Tensor
    """int64; 0 in a prompt, then one number a response of its segment."""
    row_T: torch.Tensor
    """int64: the row of each response token."""
    column_T: torch.Tensor
    """int64: the column at which it is predicted."""
    targets_T: torch.Tensor
    """int64: the token itself."""
    trajectory_T: torch.Tensor
    """int64: which trajectory it belongs to."""
    token_T: torch.Tensor
    """int64: its place in that trajectory's response."""
    offsets_R1: tuple[int, ...]
    """Response tokens before each row; one more entry than rows."""
    microbatch_rows: int
    """Rows that pass through a model at once: an equal share of the rows for each rank is a multiple of it."""

    @property
    def rows(self) -> int:
        """R."""
        return self.tokens_RS.shape[0]

    def trajectory_order(self) -> torch.Tensor:
        """int64 [T]: indices that bring the response tokens into the order of trajectories."""
        return torch.argsort(self.trajectory_T, stable=True)

    def tokens_of_rows(self, start: int, stop: int) -> slice:
        """Which of the T response tokens lie in rows [start, stop)."""
        return slice(self.offsets_R1[start], self.offsets_R1[stop])


def segment_bounds(segments_RS: torch.Tensor) -> torch.Tensor:
    """Where each segment begins when rows follow each other, and where the last one ends: int64, `cu_seqlens`."""
    begins_RS = torch.ones_like(segments_RS, dtype=torch.bool)
    begins_RS[:, 1:] = segments_RS[:, 1:] != segments_RS[:, :-1]
    begins = begins_RS.flatten().nonzero()[:, 0]
    return torch.cat([begins, begins.new_tensor([segments_RS.numel()])])


def context_columns(segments_RS: torch.Tensor, ranks: int) -> torch.Tensor:
    """The columns of each row that each of C context-parallel ranks holds: int64 [C, R, S / C], rising.

    Of 2 C equal chunks of a segment, rank c holds the c-th from the start and the c-th from the end, so that causal
    attention is as much work for each. Transformer Engine takes packed sequences in this split alone.

    Args:
        segments_RS: as in `PackedRows`; lengths of segments and rows are multiples of 2 C, or of anything for one rank.
    """
    rows, length = segments_RS.shape
    bounds = segment_bounds(segments_RS)
    lengths = bounds.diff()
    place = torch.arange(rows * length) - bounds[:-1].repeat_interleave(lengths)
    chunk = place * 2 * ranks // lengths.repeat_interleave(lengths)
    holder_RS = torch.minimum(chunk, 2 * ranks - 1 - chunk).view(rows, length)
    return holder_RS.argsort(dim=1, stable=True).view(rows, ranks, length // ranks).transpose(0, 1)


def segment_multiple(context_ranks: int) -> int:
    """What the lengths of segments are padded to, so that `context_columns` can split them."""
    return 1 if context_ranks == 1 else 2 * context_ranks


def assign_rows(
    trajectories: Sequence[Trajectory], row_tokens: int, share_prompts: bool, multiple: int = 1
) -> list[list[list[int]]]:
    """First-fit decreasing: for each row its segments, for each segment the indices of its trajectories.

    Args:
        row_tokens: a multiple of `multiple`, to which each segment is padded.
        share_prompts: a response goes behind the copy of its prompt that one of its group has in some row, if there is
            room; whole groups come in decreasing order.

    Raises:
        ConfigError: a trajectory is longer than a row.
    """
    prompts = np.array([len(t.prompt.token_ids) for t in trajectories], dtype=np.int64)
    responses = np.array([len(t.token_ids) for t in trajectories], dtype=np.int64)
    longest = int((prompts + responses).max(initial=0))
    if longest > row_tokens:
        raise ConfigError(
            f"a sequence of {longest} tokens does not fit a row of train.row_tokens={row_tokens}: raise it to the "
            "longest prompt plus rollout.max_new_tokens"
        )
    groups: dict[object, list[int]] = {}
    for index, trajectory in enumerate(trajectories):
        groups.setdefault(trajectory.prompt.id if share_prompts else index, []).append(index)
    space = np.full(len(trajectories), row_tokens)
    rows: list[list[list[int]]] = []
    for group in sorted(groups.values(), key=lambda group: -(prompts[group[0]] + responses[group].sum())):
        segments: dict[int, list[int]] = {}
        for index in sorted(group, key=lambda index: -responses[index]):
            row = next((row for row in segments if space[row] >= responses[index]), None)
            if row is None:
                row = int(np.argmax(space[: len(rows) + 1] >= prompts[index] + responses[index]))
                if row == len(rows):
                    rows.append([])
                rows[row].append(segments.setdefault(row, []))
                space[row] -= prompts[index]
            segments[row].append(index)
            space[row] -= responses[index]
        for row in segments:
            space[row] -= space[row] % multiple
    return rows


def split_evenly(rows: int, shares: int, most: int) -> tuple[int, int]:
    """Microbatches of each of `shares`, as few as with `most` rows each, and the rows of one, as few as that allows."""
    microbatches = max(1, math.ceil(rows / (shares * most)))
    return microbatches, max(1, math.ceil(rows / (shares * microbatches)))


def pack(
    trajectories: Sequence[Trajectory],
    row_tokens: int,
    shares: int,
    most_microbatch_rows: int,
    share_prompts: bool,
    context_ranks: int = 1,
) -> PackedRows:
    """Pack prompt and response of every trajectory into rows that can be split into equal shares of microbatches.

    Rows are dealt out in turn, so that equal contiguous shares of them hold like amounts of tokens.

    Args:
        shares: the data-parallel ranks of each model divide it.
        most_microbatch_rows: rows that may pass through a model at once; all microbatches have as many.
        share_prompts: see `assign_rows`.
        context_ranks: ranks that `context_columns` can then split each row over.

    Raises:
        ConfigError: a trajectory is longer than `row_tokens`.
    """
    multiple = segment_multiple(context_ranks)
    rows = assign_rows(trajectories, row_tokens, share_prompts, multiple)
    microbatches, size = split_evenly(len(rows), shares, most_microbatch_rows)
    hands = shares * size
    count = microbatches * hands
    rows += [[] for _ in range(count - len(rows))]
    rows = [row for hand in range(hands) for row in rows[hand::hands]]

    tokens = np.zeros((count, row_tokens), dtype=np.int64)
    positions, segments, responses = np.zeros_like(tokens), np.zeros_like(tokens), np.zeros_like(tokens)
    row_T, column_T, targets_T, trajectory_T, token_T, offsets = [], [], [], [], [], [0]
    for row, members in enumerate(rows):
        end = 0
        for segment, indices in enumerate(members):
            prompt_ids = trajectories[indices[0]].prompt.token_ids
            start, end = end, end + len(prompt_ids)
            first_prediction, length = end - 1, len(prompt_ids)
            tokens[row, start:end] = prompt_ids
            positions[row, start:end] = np.arange(length)
            for response, index in enumerate(indices, start=1):
                here = slice(end, end + len(trajectories[index].token_ids))
                end = here.stop
                tokens[row, here] = trajectories[index].token_ids
                places = np.arange(end - here.start)
                positions[row, here] = length + places
                responses[row, here] = response
                row_T.append(np.full(len(places), row))
                column_T.append(np.where(places == 0, first_prediction, here.start - 1 + places))
                targets_T.append(tokens[row, here])
                trajectory_T.append(np.full(len(places), index))
                token_T.append(places)
            end += -end % multiple
            segments[row, start:end] = segment
        positions[row, end:] = np.arange(row_tokens - end)
        segments[row, end:] = len(members)
        offsets.append(offsets[-1] + sum(len(trajectories[index].token_ids) for part in members for index in part))

    def flat(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64))

    return PackedRows(
        torch.from_numpy(tokens),
        torch.from_numpy(positions),
        torch.from_numpy(segments),
        torch.from_numpy(responses),
        flat(row_T),
        flat(column_T),
        flat(targets_T),
        flat(trajectory_T),
        flat(token_T),
        tuple(offsets),
        size,
    )

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
    """Rows of packed sequences (R rows of S tokens) and the T response tokens in them, row by row.

    A response token at column c is predicted at column c - 1, where its log-prob is taken.
    """

    tokens_RS: torch.Tensor
    """int64; padding is 0."""
    positions_RS: torch.Tensor
    """int64; starts at 0 in every sequence."""
    segments_RS: torch.Tensor
    """int64; rises along a row, one number a sequence; the padding at the end has a number of its own."""
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


def assign_rows(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """First-fit decreasing: indices of the sequences in each row.

    Raises:
        ConfigError: a sequence is longer than a row.
    """
    longest = max(lengths, default=0)
    if longest > row_tokens:
        raise ConfigError(
            f"a sequence of {longest} tokens does not fit a row of train.row_tokens={row_tokens}: raise it to the "
            "longest prompt plus rollout.max_new_tokens"
        )
    space = np.full(len(lengths), row_tokens)
    rows: list[list[int]] = []
    for index in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        row = int(np.argmax(space[: len(rows) + 1] >= lengths[index]))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        space[row] -= lengths[index]
    return rows


def pack(trajectories: Sequence[Trajectory], row_tokens: int, rows_multiple: int) -> PackedRows:
    """Pack prompt + response of every trajectory; the row count is padded to a multiple of `rows_multiple`.

    Rows are dealt out in turn, so that equal contiguous shares of them hold like amounts of tokens.

    Raises:
        ConfigError: a trajectory is longer than `row_tokens`.
    """
    lengths = [len(t.prompt.token_ids) + len(t.token_ids) for t in trajectories]
    rows = assign_rows(lengths, row_tokens)
    count = max(1, math.ceil(len(rows) / rows_multiple)) * rows_multiple
    rows += [[] for _ in range(count - len(rows))]
    rows = [row for share in range(rows_multiple) for row in rows[share::rows_multiple]]

    tokens = np.zeros((count, row_tokens), dtype=np.int64)
    positions = np.zeros_like(tokens)
    segments = np.zeros_like(tokens)
    row_T, column_T, targets_T, trajectory_T, token_T, offsets = [], [], [], [], [], [0]
    for row, members in enumerate(rows):
        end = 0
        for segment, index in enumerate(members):
            trajectory, start = trajectories[index], end
            end = start + lengths[index]
            response = start + len(trajectory.prompt.token_ids)
            tokens[row, start:response] = trajectory.prompt.token_ids
            tokens[row, response:end] = trajectory.token_ids
            positions[row, start:end] = np.arange(end - start)
            segments[row, start:end] = segment
            row_T.append(np.full(end - response, row))
            column_T.append(np.arange(response - 1, end - 1))
            targets_T.append(tokens[row, response:end])
            trajectory_T.append(np.full(end - response, index))
            token_T.append(np.arange(end - response))
        positions[row, end:] = np.arange(row_tokens - end)
        segments[row, end:] = len(members)
        offsets.append(offsets[-1] + sum(len(trajectories[index].token_ids) for index in members))

    def flat(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64))

    return PackedRows(
        torch.from_numpy(tokens),
        torch.from_numpy(positions),
        torch.from_numpy(segments),
        flat(row_T),
        flat(column_T),
        flat(targets_T),
        flat(trajectory_T),
        flat(token_T),
        tuple(offsets),
    )

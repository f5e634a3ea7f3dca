"""Packed rows on their way through a Megatron model, and the hidden states that come out at responses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_sgopd.models.logprobs import OutputHead
from megatron_sgopd.platform import current
from megatron_sgopd.rollout.packing import PackedRows


@dataclass(frozen=True)
class Microbatch:
    """B packed rows on this rank's device and the response tokens in them."""

    tokens_BS: torch.Tensor
    positions_BS: torch.Tensor
    segments_BS: torch.Tensor
    """On the host, as are the responses."""
    responses_BS: torch.Tensor
    row_T: torch.Tensor
    """Row within the microbatch of each response token."""
    column_T: torch.Tensor
    """Column at which it is predicted."""
    targets_T: torch.Tensor
    span: slice
    """Which of all response tokens of the step these are."""


def microbatches(rows: PackedRows, start: int, stop: int) -> Iterator[Microbatch]:
    """Those of rows [start, stop)."""
    device, size = current().device, rows.microbatch_rows
    for first in range(start, stop, size):
        span = rows.tokens_of_rows(first, first + size)
        yield Microbatch(
            rows.tokens_RS[first : first + size].to(device),
            rows.positions_RS[first : first + size].to(device),
            rows.segments_RS[first : first + size],
            rows.responses_RS[first : first + size],
            (rows.row_T[span] - first).to(device),
            rows.column_T[span].to(device),
            rows.targets_T[span].to(device),
            span,
        )


def forward(model: Any, batch: Microbatch, output_processor: Any, context: Any) -> torch.Tensor:
    """Run this pipeline stage; the last stage returns what `output_processor` makes of the hidden states."""
    tokens, positions = batch.tokens_BS, batch.positions_BS
    if current().one_long_row:
        tokens, positions = tokens.view(1, -1), positions.view(1, -1)
    with _rotated_by(positions, model) if current().shares_prompts else contextlib.nullcontext():
        return model(
            tokens,
            positions,
            output_processor=output_processor,
            output_processor_context=context,
            **current().packed_attention(batch.segments_BS, batch.responses_BS),
        )


@contextlib.contextmanager
def _rotated_by(positions_BS: torch.Tensor, model: Any) -> Iterator[None]:
    """The rope of each token is that of its position.

    Megatron's is that of a token's column, which is as good where a segment has one response: only distances count.
    """

    def choose(decoder: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
        rope_SD = keywords["rotary_pos_emb"][:, 0, 0]
        return arguments, keywords | {"rotary_pos_emb": rope_SD[positions_BS.T][:, :, None]}

    hook = unwrapped(model).decoder.register_forward_pre_hook(choose, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def schedule_shape(rows: PackedRows) -> dict[str, int]:
    """Arguments of Megatron's schedules: the shape of what a pipeline stage hands on."""
    row_tokens = rows.tokens_RS.shape[1]
    if current().one_long_row:
        return {"seq_length": rows.microbatch_rows * row_tokens, "micro_batch_size": 1}
    return {"seq_length": row_tokens, "micro_batch_size": rows.microbatch_rows}


def response_hidden(
    hidden_states: torch.Tensor, config: Any, tensor_parallel_group: Any, batch: Microbatch
) -> torch.Tensor:
    """Hidden states at the positions that predict response tokens.

    Args:
        hidden_states: [S, B, H] as a `GPTModel`'s decoder returns them, or [B * S, 1, H] of one long row; with sequence
            parallelism a rank's share of the first axis.

    Returns:
        [T, H]. The gradient that flows back is expected to be summed over the tensor-parallel group already.
    """
    if config.sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False, group=tensor_parallel_group
        )
    if current().one_long_row:
        return hidden_states[:, 0][batch.row_T * batch.tokens_BS.shape[1] + batch.column_T]
    return hidden_states.view(batch.tokens_BS.shape[1], batch.tokens_BS.shape[0], -1)[batch.column_T, batch.row_T]


def output_head(
    model_output_layer: Any,
    output_weight: torch.Tensor | None,
    vocab_size: int,
    tensor_parallel_group: Any,
    temperature: float,
    chunk_tokens: int,
) -> OutputHead:
    """The output layer as the log-prob functions take it; tied models pass the embedding as `output_weight`."""
    weight = model_output_layer.weight if output_weight is None else output_weight
    return OutputHead(weight, vocab_size, tensor_parallel_group, chunk_tokens, temperature)


def unwrapped(model: Any) -> GPTModel:
    """The `GPTModel` inside Megatron's data-parallel and precision wrappers."""
    while not isinstance(model, GPTModel):
        model = model.module
    return model

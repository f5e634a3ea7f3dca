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
from megatron_sgopd.rollout.packing import PackedRows, context_columns


@dataclass(frozen=True)
class Microbatch:
    """B packed rows, of each the L columns that this rank holds, and the T response tokens that are predicted there.

    Without context parallelism these are all S columns. Tensors are on this rank's device, but where it is said.
    """

    first_row: int
    tokens_BL: torch.Tensor
    positions_BL: torch.Tensor
    segments_BS: torch.Tensor
    """On the host, and of all columns, as are the responses."""
    responses_BS: torch.Tensor
    row_T: torch.Tensor
    """Row within the microbatch of each response token."""
    place_T: torch.Tensor
    """Place in L at which it is predicted."""
    targets_T: torch.Tensor
    index_T: torch.Tensor
    """On the host: which of all response tokens of the step these are."""


def microbatches(rows: PackedRows, start: int, stop: int, context_group: Any) -> Iterator[Microbatch]:
    """Those of rows [start, stop), as this rank of the context-parallel group holds them."""
    device, size = current().device, rows.microbatch_rows
    for first in range(start, stop, size):
        these, span = slice(first, first + size), rows.tokens_of_rows(first, first + size)
        segments_BS = rows.segments_RS[these]
        columns_BL = context_columns(segments_BS, context_group.size())[context_group.rank()]
        places_BL = torch.arange(columns_BL.shape[1]).expand_as(columns_BL)
        place_BS = torch.full_like(segments_BS, -1).scatter_(1, columns_BL, places_BL)
        row_T = rows.row_T[span] - first
        place_T = place_BS[row_T, rows.column_T[span]]
        held_T = (place_T >= 0).nonzero()[:, 0]
        yield Microbatch(
            first,
            rows.tokens_RS[these].gather(1, columns_BL).to(device),
            rows.positions_RS[these].gather(1, columns_BL).to(device),
            segments_BS,
            rows.responses_RS[these],
            row_T[held_T].to(device),
            place_T[held_T].to(device),
            rows.targets_T[span][held_T].to(device),
            held_T + span.start,
        )


def forward(model: Any, batch: Microbatch, output_processor: Any, context: Any) -> torch.Tensor:
    """Run this pipeline stage; the last stage returns what `output_processor` makes of the hidden states.

    Args:
        context: given to `output_processor`.
    """
    tokens, positions = batch.tokens_BL, batch.positions_BL
    if current().one_long_row:
        tokens, positions = tokens.view(1, -1), positions.view(1, -1)
    length = batch.segments_BS.shape[1]
    with _rotated_by(positions, model, length) if current().shares_prompts else contextlib.nullcontext():
        return model(
            tokens,
            positions,
            output_processor=output_processor,
            output_processor_context=context,
            **current().packed_attention(batch.segments_BS, batch.responses_BS, unwrapped(model).pg_collection.cp),
        )


@contextlib.contextmanager
def _rotated_by(positions_BL: torch.Tensor, model: Any, length: int) -> Iterator[None]:
    """The rope of each token is that of its position, which is below `length`.

    Megatron's is that of a token's column, which is as good where a segment has one response: only distances count.
    """
    gpt = unwrapped(model)

    def choose(decoder: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
        # For packed sequences Megatron makes the rope of all positions, else of the columns of a context-parallel rank.
        rope_SD = gpt.rotary_pos_emb(length, packed_seq=True)[:, 0, 0]
        return arguments, keywords | {"rotary_pos_emb": rope_SD[positions_BL.T][:, :, None]}

    hook = gpt.decoder.register_forward_pre_hook(choose, with_kwargs=True)
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
        hidden_states: [L, B, H] as a `GPTModel`'s decoder returns them, or [B * L, 1, H] of one long row; with sequence
            parallelism a rank's share of the first axis.

    Returns:
        [T, H]. The gradient that flows back is expected to be summed over the tensor-parallel group already.
    """
    if config.sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False, group=tensor_parallel_group
        )
    if current().one_long_row:
        return hidden_states[:, 0][batch.row_T * batch.tokens_BL.shape[1] + batch.place_T]
    return hidden_states.view(batch.tokens_BL.shape[1], batch.tokens_BL.shape[0], -1)[batch.place_T, batch.row_T]


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

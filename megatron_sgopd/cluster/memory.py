"""Bytes that each rank holds: pure functions of an architecture and a layout, by which nothing need be built."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sgopd.models.architecture import Architecture
from megatron_sgopd.models.provider import padded_vocab_size
from megatron_sgopd.models.weight_map import ParallelLayout, parameters

_ADAM_MOMENTS = 2


@dataclass(frozen=True)
class TrainingState:
    """Bytes on one rank."""

    weights: int
    """In the precision of the forward pass."""
    gradients: int
    """Megatron's gradient buffer: float32."""
    optimizer: int
    """Adam's moments and, where the weights are BF16, their float32 masters."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def training_state(
    architecture: Architecture,
    layout: ParallelLayout,
    stage: int,
    precision: str,
    optimizer_shards: int = 1,
) -> TrainingState:
    """What Megatron keeps of a model that is trained, on a rank of pipeline stage `stage`.

    Args:
        precision: `bf16` or `float32`, as in a recipe.
        optimizer_shards: ranks that share the optimizer's state: the data-parallel ones where Megatron's distributed
            optimizer is on, else 1. Its padding, at most some hundred bytes a bucket, is not counted.
    """
    elements = shard_elements(architecture, layout, stage)
    masters = precision == "bf16"
    state = 4 * (_ADAM_MOMENTS + masters) * elements
    return TrainingState(elements * weight_bytes(precision), 4 * elements, -(-state // optimizer_shards))


def weight_bytes(precision: str) -> int:
    """Of one weight in the forward pass."""
    return {"bf16": 2, "float32": 4}[precision]


def shard_elements(architecture: Architecture, layout: ParallelLayout, stage: int) -> int:
    """Weights on a rank of a pipeline stage, the vocabulary's padding and a second holder of embeddings included.

    With experts dealt out evenly, every rank of a stage has as many.
    """
    padded = padded_vocab_size(architecture, layout.tensor)
    total = 0
    for parameter in parameters(architecture):
        owner = parameter.owner(layout)
        # A stage that has the embedding uses it for the output too.
        absent = parameter.entry.duplicate and layout.pipeline == 1
        if owner.pipeline == stage and owner.expert in (None, 0) and not absent:
            total += math.prod(parameter.shard_shape(layout.tensor, padded))
    return total


def activation_bytes(
    architecture: Architecture,
    layout: ParallelLayout,
    rows: int,
    row_tokens: int,
    precision: str,
) -> int:
    """What a microbatch leaves for the backward pass in a layer of Megatron's local spec, as the CPU platform runs it.

    Counted tensor by tensor, with h, f, q, k the sizes of hidden state, MLP, queries and keys, t the tensor-parallel
    size and S the tokens of a row, per token and layer:

    - residual stream, its norms and the norms' products, each before attention and MLP: 6 h
    - gate and up, their parts, activation and product: 5 f / t
    - queries, keys and values as one tensor, queries and keys after rope, the attention's output and its logarithm of
      sums: (3 q + 3 k + heads) / t, and (2 q + k) / t more where heads are normed
    - the mask that keeps packed sequences apart: S; sines and cosines: 4 head sizes of one row
    """
    h, f, q, k = (
        architecture.hidden_size,
        architecture.ffn_hidden_size,
        architecture.query_size,
        architecture.key_size,
    )
    shared = 5 * f + 3 * q + 3 * k + architecture.num_attention_heads + (2 * q + k) * architecture.qk_norm
    per_token = 6 * h + shared / layout.tensor + row_tokens + 4 * architecture.head_dim / rows
    return round(per_token * rows * row_tokens) * weight_bytes(precision)

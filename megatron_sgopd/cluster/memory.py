"""Bytes that each rank holds: pure functions of an architecture and a layout, by which nothing need be built.

h, f, q, k: sizes of hidden state, MLP (or of one expert), queries and keys; t: tensor-parallel ranks; e: experts of a
token.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from megatron_sgopd.models.architecture import Architecture
from megatron_sgopd.models.provider import padded_vocab_size
from megatron_sgopd.models.weight_map import ParallelLayout, Parameter, parameters

_ADAM_MOMENTS = 2


@dataclass(frozen=True)
class TrainingState:
    """Bytes on one rank."""

    weights: int
    """In the precision of the forward pass, and their FP8 copies."""
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
    fp8: bool = False,
) -> TrainingState:
    """What Megatron keeps of a model that is trained, on a rank of pipeline stage `stage`.

    Args:
        precision: `bf16` or `float32`, as in a recipe.
        optimizer_shards: ranks that share the optimizer's state: the data-parallel ones where Megatron's distributed
            optimizer is on, else 1. Its padding, at most some hundred bytes a bucket, is not counted. Experts have
            fewer data-parallel ranks, by the expert-parallel size.
        fp8: Transformer Engine keeps each weight in FP8 too, as it is and transposed.
    """
    of_experts = shard_elements(architecture, layout, stage, experts=True)
    elements = shard_elements(architecture, layout, stage) - of_experts
    masters = precision == "bf16"
    state_bytes = 4 * (_ADAM_MOMENTS + masters)
    optimizer = -(-state_bytes * elements // optimizer_shards)
    optimizer += -(-state_bytes * of_experts // max(1, optimizer_shards // layout.expert))
    elements += of_experts
    return TrainingState(elements * (weight_bytes(precision) + 2 * fp8), 4 * elements, optimizer)


def weight_bytes(precision: str) -> int:
    """Of one weight in the forward pass."""
    return {"bf16": 2, "float32": 4}[precision]


@functools.cache
def shard_elements(architecture: Architecture, layout: ParallelLayout, stage: int, experts: bool = False) -> int:
    """Weights on a rank of a pipeline stage, the vocabulary's padding and a second holder of embeddings included.

    With experts dealt out evenly, every rank of a stage has as many.

    Args:
        experts: count those of experts alone.
    """
    padded = padded_vocab_size(architecture, layout.tensor)
    total = 0
    for parameter in _of_first_experts(architecture):
        # A stage that has the embedding uses it for the output too.
        absent = parameter.entry.duplicate and layout.pipeline == 1
        left_out = experts and parameter.expert is None
        if parameter.owner(layout).pipeline == stage and not absent and not left_out:
            alike = 1 if parameter.expert is None else architecture.num_experts // layout.expert
            total += alike * math.prod(parameter.shard_shape(layout.tensor, padded))
    return total


@functools.cache
def _of_first_experts(architecture: Architecture) -> tuple[Parameter, ...]:
    """Parameters of the model, of experts those of each layer's first, which all others are like."""
    return tuple(parameter for parameter in parameters(architecture) if not parameter.expert)


def activation_bytes(
    architecture: Architecture,
    layout: ParallelLayout,
    rows: int,
    row_tokens: int,
    precision: str,
    context: int = 1,
) -> int:
    """What a microbatch leaves for the backward pass in a layer of Megatron's local spec, as the CPU platform runs it.

    Counted tensor by tensor, S the tokens of a row, per token and layer:

    - residual stream, its norms and the norms' products, each before attention and MLP: 6 h
    - gate and up, their parts, activation and product: 5 f / t
    - queries, keys and values as one tensor, queries and keys after rope, the attention's output and its logarithm of
      sums: (3 q + 3 k + heads) / t, and (2 q + k) / t more where heads are normed
    - the mask that keeps packed sequences apart: S; sines and cosines: 4 head sizes of one row
    - where c context-parallel ranks have S / c tokens of a row each, keys and values of all in place of the rank's own:
      2 k c / t, less k / t, and less the one tensor's (q + 2 k) / t where no norm of the heads needs it
    """
    h, f, q, k = _sizes(architecture)
    shared = 5 * f + 3 * q + 3 * k + architecture.num_attention_heads + (2 * q + k) * architecture.qk_norm
    if context > 1:
        shared += 2 * k * context - k - (q + 2 * k) * (not architecture.qk_norm)
    per_token = 6 * h + shared / layout.tensor + row_tokens + 4 * architecture.head_dim / rows
    return round(per_token * rows * row_tokens // context) * weight_bytes(precision)


def fused_activation_bytes(architecture: Architecture, layout: ParallelLayout, tokens: int, sequence: bool) -> int:
    """What a microbatch leaves for the backward pass in a layer of Transformer Engine, BF16, flash attention.

    Counted as Korthikanti et al. (arXiv 2205.05198, section 4.1) do, for SwiGLU, grouped queries and no dropout, in
    numbers of two bytes per token and layer:

    - the inputs of the two norms and of the matrices behind them: 4 h, divided by t under sequence parallelism
    - queries and keys after rope, values, the attention's output: (2 q + 2 k) / t, and (q + k) / t more where heads
      are normed
    - gate and up, and their product: 3 f / t; of each of a token's e experts, with the copies that it is given and
      gives back: e (2 h + 3 f / t)
    """
    h, f, q, k = _sizes(architecture)
    t = layout.tensor
    residual = 4 * h / (t if sequence else 1)
    attention = (2 * q + 2 * k + (q + k) * architecture.qk_norm) / t
    mlp = architecture.experts_per_token * (2 * h + 3 * f / t) if architecture.num_experts else 3 * f / t
    return round(2 * (residual + attention + mlp) * tokens)


def layer_input_bytes(architecture: Architecture, layout: ParallelLayout, tokens: int, sequence: bool) -> int:
    """What is left of a layer that is computed again in the backward pass: its input, BF16."""
    return round(2 * architecture.hidden_size * tokens / (layout.tensor if sequence else 1))


def output_bytes(
    architecture: Architecture, layout: ParallelLayout, tokens: int, chunk_logits: int, train: bool
) -> int:
    """Hidden states and logits of the output layer, BF16 weights.

    The hidden states of all tokens and, in training, their gradient (2 h each, the final norm's input and output
    too); one chunk of logits in float32 and its residuals in BF16; in training the weight's gradient in float32.
    """
    hidden = (8 if train else 4) * architecture.hidden_size * tokens
    rows = padded_vocab_size(architecture, layout.tensor) // layout.tensor
    return hidden + 6 * chunk_logits + 4 * rows * architecture.hidden_size * train


def cache_bytes_per_token(architecture: Architecture) -> int:
    """Keys and values of all layers in the rollout engine, BF16, over the ranks of a replica."""
    return 2 * 2 * architecture.key_size * architecture.num_layers


def _sizes(architecture: Architecture) -> tuple[int, int, int, int]:
    return (
        architecture.hidden_size,
        architecture.ffn_hidden_size,
        architecture.query_size,
        architecture.key_size,
    )

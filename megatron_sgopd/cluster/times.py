"""Seconds of a step's stages on a device: work over rate, for each of what a stage must compute, read and send.

Every number is an estimate that `Calibration` replaces by what a run measured.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_sgopd.cluster.hardware import Device, allowance, efficiency
from megatron_sgopd.cluster.memory import cache_bytes_per_token, shard_elements
from megatron_sgopd.models.architecture import Architecture
from megatron_sgopd.models.weight_map import ParallelLayout, owned_parameters, parameter_count


@dataclass(frozen=True)
class Workload:
    """What one step has to do, over all ranks."""

    prompts: int
    group_size: int
    prompt_tokens: float
    """Mean."""
    response_tokens: float
    """Mean."""
    longest_response: int
    row_tokens: int

    @property
    def responses(self) -> int:
        return self.prompts * self.group_size

    @property
    def tokens(self) -> float:
        """Of prompts and responses."""
        return self.responses * (self.prompt_tokens + self.response_tokens)

    @property
    def context(self) -> float:
        """Tokens that a token attends to, as a mean."""
        return (self.prompt_tokens + self.response_tokens) / 2

    def rows(self, shares: int) -> int:
        """Packed rows, a multiple of `shares`."""
        return shares * math.ceil(self.tokens / (self.row_tokens * allowance("packing")) / shares)


@dataclass(frozen=True)
class Spread:
    """How a model's ranks lie on nodes."""

    layout: ParallelLayout
    data: int
    sequence: bool = False
    context: int = 1

    @property
    def ranks(self) -> int:
        return self.layout.tensor * self.layout.pipeline * self.context * self.data

    def microbatches(self, rows: int, most: int) -> int:
        """Of each data-parallel rank, with at most so many of the packed rows in one."""
        return math.ceil(rows / self.data / most)

    def bandwidth(self, device: Device, ranks: int) -> float:
        """Of a collective of consecutive ranks, bytes a second and rank."""
        if ranks <= device.per_node:
            return device.link_bandwidth * efficiency("link")
        return device.network_bandwidth * efficiency("network")


@dataclass(frozen=True)
class Calibration:
    """Measured over predicted seconds of stages; 1 where nothing was measured."""

    factors: Mapping[str, float] = field(default_factory=dict)

    def of(self, stage: str, seconds: float) -> float:
        return seconds * self.factors.get(stage, 1.0)


@functools.cache
def active_elements(architecture: Architecture) -> float:
    """Weights that a token is multiplied by in the layers: of the experts, those that it is given to."""
    total = 0.0
    for parameter in owned_parameters(architecture):
        if parameter.layer is None or len(parameter.pieces[0].shape) < 2:
            continue
        share = 1.0 if parameter.expert is None else architecture.experts_per_token / architecture.num_experts
        total += share * sum(math.prod(piece.shape) for piece in parameter.pieces)
    return total


def forward_flops(architecture: Architecture, context: float) -> float:
    """Of a token in all layers: two a weight, and two products of attention with `context` tokens on average."""
    attention = 4 * architecture.query_size * context * architecture.num_layers
    return 2 * active_elements(architecture) + attention


def output_flops(architecture: Architecture) -> float:
    """Of a token in the output layer."""
    return 2.0 * architecture.hidden_size * architecture.vocab_size


def forward_seconds(
    architecture: Architecture,
    spread: Spread,
    work: Workload,
    rows: int,
    rows_per_microbatch: int,
    device: Device,
    fp8: bool = False,
) -> float:
    """A forward pass over all rows, as a scorer makes it."""
    compute = _last_stage_seconds(architecture, spread, work, rows, device, fp8) / efficiency("forward")
    microbatches = spread.microbatches(rows, rows_per_microbatch)
    within_layers = _exchange_seconds(architecture, spread, work, rows, device)
    within_layers += _context_seconds(architecture, spread, work, rows, device)
    return (compute + within_layers) * _bubble(spread, microbatches)


def train_seconds(
    architecture: Architecture,
    spread: Spread,
    work: Workload,
    rows: int,
    rows_per_microbatch: int,
    device: Device,
    recompute: bool,
    optimizer_shards: int,
    fp8: bool = False,
) -> float:
    """Forward and backward passes, the exchange of gradients and weights, and the optimizer.

    The backward pass is twice the forward pass's work; the output layer's is done in three products in all.
    """
    passes = 4 if recompute else 3
    compute = passes * _last_stage_seconds(architecture, spread, work, rows, device, fp8) / efficiency("train")
    microbatches = spread.microbatches(rows, rows_per_microbatch)
    within_layers = (passes - 1) * _exchange_seconds(architecture, spread, work, rows, device)
    within_layers += passes * _context_seconds(architecture, spread, work, rows, device)  # gradients come back
    elements = shard_elements(architecture, spread.layout, 0)
    copies = spread.data * spread.context
    share = (copies - 1) / copies
    exchange = 6 * share * elements / spread.bandwidth(device, spread.ranks)
    hidden = 2 * compute / passes / microbatches  # behind the last microbatch's backward pass
    state = 2 * (18 * elements / optimizer_shards) / device.memory_bandwidth
    return (compute + within_layers) * _bubble(spread, microbatches) + max(0.0, exchange - hidden) + state


def _last_stage_seconds(
    architecture: Architecture, spread: Spread, work: Workload, rows: int, device: Device, fp8: bool
) -> float:
    """A forward pass at the peak rate on the stage that has the output layer too, for which the others wait."""
    in_layers = rows * work.row_tokens * forward_flops(architecture, work.context) / spread.layout.pipeline
    in_output = work.responses * work.response_tokens * output_flops(architecture)
    peak = device.fp8_flops if fp8 and device.fp8_flops else device.bf16_flops
    return (in_layers / peak + in_output / device.bf16_flops) / (spread.layout.tensor * spread.context * spread.data)


def _exchange_seconds(architecture: Architecture, spread: Spread, work: Workload, rows: int, device: Device) -> float:
    """Exchange within the layers in one pass, of two bytes a number.

    Over tensor-parallel ranks two sums a layer, sent twice; over expert-parallel ones tokens to their experts and back.
    """
    t, e = spread.layout.tensor, spread.layout.expert
    numbers = _layer_tokens(architecture, spread, work, rows) * architecture.hidden_size
    summed = 2 * 2 * 2 * numbers * (t - 1) / t / spread.bandwidth(device, t)
    routed = 2 * 2 * numbers / t * architecture.experts_per_token * (e - 1) / e / spread.bandwidth(device, t * e)
    return summed + routed


def _context_seconds(architecture: Architecture, spread: Spread, work: Workload, rows: int, device: Device) -> float:
    """Keys and values that each of c context-parallel ranks hands to c - 1 others in one pass, two bytes a number."""
    t, c = spread.layout.tensor, spread.context
    numbers = 2 * architecture.key_size / t * _layer_tokens(architecture, spread, work, rows)
    return 2 * numbers * (c - 1) / spread.bandwidth(device, t * c)


def _layer_tokens(architecture: Architecture, spread: Spread, work: Workload, rows: int) -> float:
    """Tokens that pass through a layer, summed over a rank's layers."""
    return rows * work.row_tokens / (spread.data * spread.context) * architecture.num_layers / spread.layout.pipeline


def _bubble(spread: Spread, microbatches: int) -> float:
    return 1 + (spread.layout.pipeline - 1) / microbatches


def generate_seconds(
    architecture: Architecture,
    ranks: int,
    tensor: int,
    work: Workload,
    cache_bytes: float,
    device: Device,
    weight_bytes: int = 2,
) -> float:
    """Decoding of all responses by replicas of `tensor` ranks.

    A step of decoding reads the weights once and the cache of each sequence, and takes the model's work at least.
    While enough sequences wait, as many are decoded at once as the cache holds; then the longest ones go on.

    Args:
        cache_bytes: for keys and values on a rank.
        weight_bytes: of one weight.
    """
    replicas = ranks // tensor
    sequences = math.ceil(work.responses / replicas)
    per_token = cache_bytes_per_token(architecture)
    tokens = work.prompt_tokens + work.response_tokens
    at_once = min(sequences, allowance("engine_sequences"), max(1.0, cache_bytes * tensor / (per_token * tokens)))
    weights = weight_bytes * parameter_count(architecture)
    flops = forward_flops(architecture, work.context) + output_flops(architecture)

    def step(count: float) -> float:
        read = (weights + count * (work.prompt_tokens + work.response_tokens / 2) * per_token) / tensor
        compute = count * flops / (tensor * device.bf16_flops * efficiency("forward"))
        exchanges = 2 * architecture.num_layers if tensor > 1 else 0
        fixed = allowance("decode_step_ms") / 1e3 + exchanges * allowance("collective_us") / 1e6
        return fixed + max(read / (device.memory_bandwidth * efficiency("decode")), compute)

    full = sequences * work.response_tokens / at_once
    tail = max(0.0, work.longest_response - full)
    prefill = work.prompts * work.prompt_tokens * flops / (ranks * device.bf16_flops * efficiency("forward"))
    return full * step(at_once) + tail * step(at_once / 10) + prefill


def sync_seconds(architecture: Architecture, spread: Spread, device: Device, alike: bool) -> float:
    """Every rank gathers the student's weights once, and its engine copies its part of them.

    Args:
        alike: each rank copies its shards instead; see `split_alike`.
    """
    nbytes = 2 * parameter_count(architecture)
    model_ranks = spread.layout.tensor * spread.layout.pipeline
    if alike:
        return 2 * nbytes / model_ranks / device.memory_bandwidth
    gather = nbytes / spread.bandwidth(device, model_ranks) if model_ranks > 1 else 0.0
    return gather + 3 * nbytes / device.memory_bandwidth


def host_seconds(nbytes: float, device: Device) -> float:
    """To bring weights from the host's memory."""
    return nbytes / (device.host_bandwidth * efficiency("host"))


def verify_seconds(responses: int, processes: int) -> float:
    """To check the answers."""
    return responses / (processes * allowance("answers_per_s"))


def calibration(predicted: Mapping[str, float], steps: Sequence[Mapping[str, Any]]) -> Calibration:
    """What a run's stages took, by the median of its steps but the first, over what was predicted for it.

    Args:
        steps: lines of metrics.jsonl.
    """
    factors = {}
    for stage, seconds in predicted.items():
        measured = sorted(line["stage_seconds"][stage] for line in steps[1:] if stage in line["stage_seconds"])
        if measured and seconds > 0:
            factors[stage] = measured[len(measured) // 2] / seconds
    return Calibration(factors)

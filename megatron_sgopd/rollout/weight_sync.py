"""Student weights from the trainer's shards into the rollout engine, proven to have arrived."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from megatron_sgopd.errors import Alarm, some
from megatron_sgopd.models.architecture import Architecture
from megatron_sgopd.models.digests import ALL_ROWS, Rows, digest_halves, digest_of
from megatron_sgopd.models.weight_map import ParallelLayout, split_alike
from megatron_sgopd.models.weights import digests_of_shards, export_weights, fill_shards, shard_digests
from megatron_sgopd.rollout.engine import RolloutEngine

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.process_groups_config import ProcessGroupCollection

_ROWS_BETWEEN = 128
"""An attention head's in most models, so that each rank's shard of a matrix has a row that is read."""


def compared_rows(engine: RolloutEngine) -> Rows:
    """Those that the engine's next sync compares.

    All of them at its first, which shows whatever is wrong with names, shapes and shards; then one of `_ROWS_BETWEEN`,
    others each time, which shows what was left out, stale or out of place at as small a part of the work.
    """
    version = engine.weight_version
    return Rows(_ROWS_BETWEEN, version % _ROWS_BETWEEN) if version else ALL_ROWS


def sync_student(
    engine: RolloutEngine,
    model: GPTModel,
    architecture: Architecture,
    groups: ProcessGroupCollection,
    memory_bytes: int,
) -> None:
    """Give the engine the student's weights and compare each with the trainer's. Collective.

    Where the engine is split as the student and of its dtype, each rank copies its own shards; elsewhere whole tensors
    are gathered, and the engine takes its share of them.

    Args:
        memory_bytes: what the tensors that are on their way may take.

    Raises:
        Alarm: a tensor differs from the trainer's.
    """
    rows = compared_rows(engine)
    digests = shard_digests(model, architecture, groups, rows)
    layout = ParallelLayout(groups.tp.size(), groups.pp.size())
    alike = split_alike(architecture, layout, engine.tensor_parallel, engine.quantized)
    if not alike or next(model.parameters()).dtype != engine.dtype:
        sync_weights(engine, export_weights(model, architecture, groups, memory_bytes), digests, rows)
        return
    targets = engine.parameters(architecture)
    filled = fill_shards(model, architecture, groups, targets, memory_bytes)
    engine.weights_changed()
    _compare(engine, digests, digests_of_shards(filled, architecture, groups, rows))


def sync_weights(
    engine: RolloutEngine, weights: Iterator[tuple[str, torch.Tensor]], digests: Mapping[str, int], rows: Rows
) -> None:
    """Load `weights` into the engine and compare each tensor, as the engine took it, with its digest.

    Args:
        weights: full tensors under Hugging Face names.
        digests: of what the trainer's shards hold, computed in place before anything was sent.
        rows: those that the digests read.

    Raises:
        Alarm: a tensor is missing, unknown, or differs from the trainer's.
    """
    halves: dict[str, torch.Tensor] = {}

    def checked() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            halves[name] = digest_halves(tensor, rows)
            yield name, tensor

    engine.load_weights(checked())
    received = zip(halves, map(digest_of, torch.stack(list(halves.values())).tolist()), strict=True)
    _compare(engine, digests, dict(received))


def _compare(engine: RolloutEngine, digests: Mapping[str, int], received: Mapping[str, int]) -> None:
    wrong = sorted(name for name in digests.keys() | received.keys() if digests.get(name) != received.get(name))
    if wrong:
        raise Alarm(
            f"weight sync {engine.weight_version}: {len(wrong)} of {len(digests)} tensors in the rollout engine "
            f"are not those of the trainer, first {wrong[0]!r}: rollouts would come from a wrong policy. "
            "Check the interconnect and the model's entry in the weight table."
        )
    if engine.weight_version == 1 and (lost := engine.lost_tensors()):
        raise Alarm(
            f"weight sync: tensors of vLLM's model that are no weights were lost while it slept ({some(lost)}): "
            "rollouts would come from a wrong policy. Take the version of vLLM that requirements/cuda.txt pins."
        )

"""Student weights from the trainer's shards into the rollout engine, proven to have arrived."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megatron_sgopd.errors import Alarm
from megatron_sgopd.models.digests import ALL_ROWS, Rows, digest_halves, digest_of
from megatron_sgopd.rollout.engine import RolloutEngine

_ROWS_BETWEEN = 128
"""An attention head's in most models, so that each rank's shard of a matrix has a row that is read."""


def compared_rows(engine: RolloutEngine) -> Rows:
    """Those that the engine's next sync compares.

    All of them at its first, which shows whatever is wrong with names, shapes and shards; then one of `_ROWS_BETWEEN`,
    others each time, which shows what was left out, stale or out of place at as small a part of the work.
    """
    version = engine.weight_version
    return Rows(_ROWS_BETWEEN, version % _ROWS_BETWEEN) if version else ALL_ROWS


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
    received = dict(zip(halves, map(digest_of, torch.stack(list(halves.values())).tolist()), strict=True))
    wrong = sorted(name for name in digests.keys() | received.keys() if digests.get(name) != received.get(name))
    if wrong:
        raise Alarm(
            f"weight sync {engine.weight_version}: {len(wrong)} of {len(digests)} tensors in the rollout engine "
            f"are not those of the trainer, first {wrong[0]!r}: rollouts would come from a wrong policy. "
            "Check the interconnect and the model's entry in the weight table."
        )

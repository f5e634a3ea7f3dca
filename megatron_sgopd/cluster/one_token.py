"""For the doctor: a model generates one token."""

from __future__ import annotations


def main(folder: str, platform: str, memory_fraction: str, quantization: str) -> int:
    """0 if it did. An empty `quantization` is none."""
    from megatron_sgopd.config import RolloutSettings
    from megatron_sgopd.platform import select
    from megatron_sgopd.processes import joined_ranks
    from megatron_sgopd.rollout.engine import RolloutEngine
    from megatron_sgopd.rollout.prompts import Prompt
    from megatron_sgopd.rollout.trajectory import Decoding

    select(platform)  # type: ignore[arg-type]  # one of a recipe's
    with joined_ranks():
        settings = RolloutSettings(max_new_tokens=1, cache_gib=0.1, memory_fraction=float(memory_fraction))
        engine = RolloutEngine(folder, settings, 32, seed=0, quantization=quantization or None)
        (trajectory,) = engine.generate([Prompt("doctor", "", (1, 2, 3), "", "", {})], [1], Decoding(), 0, 0)
    return 0 if len(trajectory.token_ids) == 1 else 1

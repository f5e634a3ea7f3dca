"""Pass rate on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sgopd.config import EvaluateSettings
from megatron_sgopd.rollout.engine import RolloutEngine
from megatron_sgopd.rollout.prompts import Prompt
from megatron_sgopd.verify.stage import Verification

EVALUATION_STEP = -1  # seeds of evaluations are those of no training step, and the same for every model


def pass_rate(
    engine: RolloutEngine,
    verification: Verification,
    prompts: Sequence[Prompt],
    settings: EvaluateSettings,
    seed: int,
) -> float:
    """avg@k: the share of right answers among `settings.samples` responses to each prompt."""
    trajectories = engine.generate(
        prompts, [settings.samples] * len(prompts), settings.temperature, seed, EVALUATION_STEP
    )
    return float(verification.start(trajectories)().mean())

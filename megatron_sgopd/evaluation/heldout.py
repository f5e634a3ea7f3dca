"""Evaluation within a run: the student, or the teacher, on the held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_sgopd.config import EvaluateSettings
from megatron_sgopd.evaluation.scores import Responses
from megatron_sgopd.rollout.engine import RolloutEngine
from megatron_sgopd.rollout.prompts import Prompt
from megatron_sgopd.rollout.trajectory import Decoding
from megatron_sgopd.verify.stage import Verification

EVALUATION_STEP = -1  # seeds of evaluations are those of no training step, and the same for every model


def decoding_of(settings: EvaluateSettings) -> Decoding:
    """How evaluations draw tokens."""
    return Decoding(settings.temperature, settings.top_p, settings.top_k, settings.stop)


def respond(
    engine: RolloutEngine,
    verification: Verification,
    prompts: Sequence[Prompt],
    settings: EvaluateSettings,
    seed: int,
) -> Responses:
    """`settings.samples` judged responses to each prompt, the same on every rank."""
    counts = [settings.samples] * len(prompts)
    trajectories = engine.generate(prompts, counts, decoding_of(settings), seed, EVALUATION_STEP)
    verification.start(trajectories)()
    results = verification.all_results()
    shape = len(prompts), settings.samples
    answers = [result.vote or result.extracted for result in results]
    return Responses(
        np.array([result.outcome for result in results]).reshape(shape),
        [answers[start : start + settings.samples] for start in range(0, len(answers), settings.samples)],
        np.array([trajectory.truncated for trajectory in trajectories]).reshape(shape),
    )

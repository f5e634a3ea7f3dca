"""Faults that would otherwise stay silent: each stops the run with a diagnosis."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from megatron_sgopd.config import AlarmSettings
from megatron_sgopd.errors import Alarm

if TYPE_CHECKING:
    from megatron_sgopd.step import Batch


def check_responses(settings: AlarmSettings, batch: Batch, truncated_history: list[bool]) -> None:
    """Something was generated, and not every response was cut off for several steps in a row.

    Args:
        truncated_history: one entry for each earlier step of this process; this step's is appended.

    Raises:
        Alarm: naming the step and what to change.
    """
    assert batch.trajectories is not None
    if batch.trajectories and not any(t.token_ids for t in batch.trajectories):
        raise Alarm(
            f"step {batch.step}: {len(batch.trajectories)} responses hold no token at all: the model stops at once. "
            "Look at the chat template and at eos_token_id in generation_config.json."
        )
    truncated_history.append(bool(batch.trajectories) and all(t.truncated for t in batch.trajectories))
    recent = truncated_history[-settings.truncated_steps :]
    if len(recent) == settings.truncated_steps and all(recent):
        raise Alarm(
            f"step {batch.step}: every response of the last {len(recent)} steps was truncated: nothing can be "
            "verified. Raise rollout.max_new_tokens, or check that the model knows its end-of-sequence token."
        )


def check_teacher(settings: AlarmSettings, logprobs_T: torch.Tensor, vocab_size: int) -> None:
    """The teacher's log-probs are numbers, and better than those of a uniform guess.

    Raises:
        Alarm: they are not finite, or their mean lies near -ln(vocab_size).
    """
    if not torch.isfinite(logprobs_T).all():
        count = int((~torch.isfinite(logprobs_T)).sum())
        raise Alarm(
            f"{count} of {logprobs_T.numel()} teacher log-probs are NaN or infinite: the teacher's weights or its "
            "precision are broken. Check the teacher's files, and on the CPU try train.precision=float32."
        )
    mean, uniform = float(logprobs_T.mean()), -math.log(vocab_size)
    if mean < settings.teacher_floor * uniform:
        raise Alarm(
            f"mean teacher log-prob is {mean:.2f}, near {uniform:.2f} = -ln(vocabulary), as of a model without "
            "weights: the teacher was not loaded, or its vocabulary is not the student's. "
            "If the teacher is really that far away, raise alarms.teacher_floor."
        )


def check_skipped(settings: AlarmSettings, step: int, in_a_row: int) -> None:
    """Not too many steps one after the other had nothing to train on.

    Args:
        in_a_row: such steps, this one included.

    Raises:
        Alarm: naming what leaves responses out.
    """
    if in_a_row >= settings.skipped_steps:
        raise Alarm(
            f"step {step}: nothing was left to train on in the last {in_a_row} steps: settings leave every response "
            "out. Look at verify.truncated=skip, sgopd.uniform_groups=skip and filters, and at the pass rate; or raise "
            "alarms.skipped_steps."
        )


def check_metrics(settings: AlarmSettings, step: int, metrics: dict[str, float]) -> None:
    """Loss and gradient are numbers, and trainer and engine agree on the policy.

    Raises:
        Alarm: naming the first thing that is wrong.
    """
    # A mean over no token is no number, and no fault.
    known = ["loss"] * (metrics["tokens"] > 0) + ["teacher_loss"] * (metrics["teacher_tokens"] > 0) + ["grad_norm"]
    known += ["full_kl"] * ("full_kl" in metrics and metrics["tokens"] > 0)
    for name in known:
        if not math.isfinite(metrics.get(name, 0.0)):
            raise Alarm(
                f"step {step}: {name} is {metrics[name]}: lower train.learning_rate, or set train.clip_grad; `report` "
                "shows the steps before"
            )
    if metrics["logprob_gap"] > settings.logprob_gap:
        raise Alarm(
            f"step {step}: training and rollout log-probs of the same tokens differ by {metrics['logprob_gap']:.3f} "
            f"nats on average (limit alarms.logprob_gap={settings.logprob_gap}): the engine holds other weights than "
            "the trainer, or samples at another temperature than rollout.temperature. Low precision alone gives "
            "about 0.03 (BF16) to 0.2 (FP8)."
        )

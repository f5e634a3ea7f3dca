"""Some of a step's responses as lines of samples.jsonl, with what the objective did to each of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from megatron_sgopd.objective.gate import AGREE, CONFLICT, NEUTRAL, UNDECIDED, reported
from megatron_sgopd.objective.loss import TokenSignals, token_update
from megatron_sgopd.objective.methods import Method
from megatron_sgopd.rollout.trajectory import Trajectory
from megatron_sgopd.verify.base import VerifierResult

if TYPE_CHECKING:
    from megatron_sgopd.step import Batch

GATE_LETTERS = {AGREE: "a", CONFLICT: "c", NEUTRAL: "n", UNDECIDED: "u"}
_DIGITS = 4
_LONGEST_CHARACTER = 4
"""Bytes of UTF-8, and so at most that many tokens."""


def sample_lines(
    batch: Batch,
    checked: Sequence[tuple[Trajectory, str, VerifierResult]],
    count: int,
    student_logprobs_T: torch.Tensor,
    signals: TokenSignals,
    method: Method,
    tokenizer: Any,
) -> list[dict[str, Any]]:
    """Up to `count` lines, of responses at even distances among those checked.

    Args:
        student_logprobs_T: s_t of all response tokens of the step, on the host, as `signals` are.

    Returns:
        For each response its step (from 1 on), texts and outcome, `outcome_advantage` (o_i), whether it was `trained`
        on, and under `tokens` one entry for each token: `text`, where one that completes no character has none;
        log-probs in nats of `student` (s), `teacher` (q), `reference` (r) and `behaviour` (b), None where there are
        none; `rank` under the teacher; `delta`, `advantage` (A) and `gate`, a string of a, c, n and u, all None where
        the response was left out of training. An empty response has no `outcome_advantage`.
    """
    assert batch.rows is not None and batch.trajectories is not None
    order_T = batch.rows.trajectory_order()
    update = token_update(student_logprobs_T, signals, method)
    classes_T = reported(update.classes_T, signals.outcome_advantage_T)
    numbers = {
        "student": student_logprobs_T,
        "teacher": batch.teacher_logprobs_T,
        "reference": batch.reference_logprobs_T,
        "behaviour": signals.behaviour_logprobs_T,
        "delta": update.delta_T,
        "advantage": update.advantage_T,
        "rank": batch.teacher_ranks_T,
    }
    starts, start = {}, 0
    for trajectory in batch.trajectories:
        starts[trajectory.prompt.id, trajectory.sample] = start
        start += len(trajectory.token_ids)
    lines, kept = [], min(count, len(checked))
    for trajectory, text, result in (checked[i * len(checked) // kept] for i in range(kept)):
        first = starts[trajectory.prompt.id, trajectory.sample]
        index_L = order_T[first : first + len(trajectory.token_ids)]
        tokens: dict[str, Any] = {"text": token_texts(tokenizer, trajectory.token_ids)}
        tokens |= {name: None if value is None else _numbers(value[index_L]) for name, value in numbers.items()}
        tokens["gate"] = "".join(GATE_LETTERS[int(c)] for c in classes_T[index_L].tolist())
        trained = bool(signals.mask_T[index_L].any())
        if not trained:  # the objective did nothing to them
            tokens |= dict.fromkeys(("delta", "advantage", "gate"))
        lines.append(
            {
                "step": batch.step + 1,
                "prompt": trajectory.prompt.text,
                "response": text,
                "answer": trajectory.prompt.answer,
                "outcome": result.outcome,
                "reason": result.reason,
                "extracted": result.extracted,
                "outcome_advantage": _numbers(signals.outcome_advantage_T[index_L[:1]])[0] if len(index_L) else None,
                "trained": trained,
                "tokens": tokens,
            }
        )
    return lines


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; all of a character's bytes count for the token that completes it."""
    texts, before, begin = [], 0, 0
    for end in range(1, len(token_ids) + 1):
        # The token before the new ones is decoded with them, since a decoder may drop a text's leading space.
        known = tokenizer.decode(token_ids[before:begin])
        added = tokenizer.decode(token_ids[before:end])[len(known) :]
        if added.endswith("\ufffd") and end - begin < _LONGEST_CHARACTER:
            texts.append("")
            continue
        texts.append(added)
        before, begin = begin, end
    return texts


def _numbers(values_L: torch.Tensor) -> list[float] | list[int]:
    if not values_L.is_floating_point():
        return values_L.tolist()
    return [round(value, _DIGITS) for value in values_L.tolist()]

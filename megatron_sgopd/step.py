"""One training step of SG-OPD. Read this first: it is the architecture.

    prompts -> sync -> generate -> pack -> (verify | teacher | reference) -> train

Each stage takes the step's `Batch` and returns it with its own part filled in. A part that is there already,
because the batch was recorded by an earlier run, is not computed again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from megatron_sgopd.models.weights import export_weights, shard_digests
from megatron_sgopd.monitor import alarms
from megatron_sgopd.objective.loss import TokenSignals
from megatron_sgopd.objective.outcome import outcome_advantage, uniform_groups
from megatron_sgopd.rollout.packing import PackedRows, pack
from megatron_sgopd.rollout.prompts import Prompt
from megatron_sgopd.rollout.trajectory import Trajectory
from megatron_sgopd.rollout.weight_sync import sync_weights

if TYPE_CHECKING:
    from megatron_sgopd.run import Run


SCORES = ("teacher_logprobs_T", "reference_logprobs_T")


@dataclass(frozen=True)
class Batch:
    """Everything that is known about a step's rollouts; the same on every rank.

    N trajectories, in order of prompt and sample, with T response tokens in the order of the packed rows.
    """

    step: int
    prompts: tuple[Prompt, ...]
    trajectories: tuple[Trajectory, ...] | None = None
    rows: PackedRows | None = None
    teacher_logprobs_T: torch.Tensor | None = None
    """q_t: float32, nats."""
    reference_logprobs_T: torch.Tensor | None = None
    """r_t: float32, nats; None also where the reference is the live student."""
    outcomes_N: torch.Tensor | None = None
    """R_i: float32, 1 where the verifier accepted the answer, else 0."""


def prepare(run: Run, step: int) -> Batch:
    """All that comes before the optimizer step."""
    recorded = run.recording.load(step)
    if recorded is None:
        sync(run)
        batch = packed(run, generate(run, Batch(step, tuple(run.prompts_of(step)))))
    else:
        batch = with_tensors(packed(run, recorded[0]), recorded[1])
    alarms.check_responses(run.settings.alarms, batch, run.truncated_history)
    # The answers are checked in processes of their own while this one scores.
    assert batch.trajectories is not None
    with run.clock("verify"):
        outcomes = run.verification.start(batch.trajectories)
    batch = score_teacher(run, batch)
    batch = score_reference(run, batch)
    with run.clock("verify"):
        return replace(batch, outcomes_N=outcomes())


def with_tensors(batch: Batch, tensors: dict[str, torch.Tensor]) -> Batch:
    """Put recorded scores into the batch's own order of tokens."""
    assert batch.rows is not None
    scores: dict[str, Any] = {name: in_row_order(tensors[name], batch.rows) for name in SCORES if name in tensors}
    return replace(batch, **scores)


def sync(run: Run) -> None:
    """Give the engine the weights of the last optimizer step."""
    assert run.engine is not None
    with run.clock("sync"):
        run.engine.wake(["weights"])
        student, groups = run.student, run.student.groups
        digests = shard_digests(student.model, student.architecture, groups)
        bucket_bytes = run.settings.rollout.sync_bucket_mib * 2**20
        weights = export_weights(student.model, student.architecture, groups, bucket_bytes)
        sync_weights(run.engine, weights, digests)


def generate(run: Run, batch: Batch) -> Batch:
    """Sample G responses a prompt from the student."""
    assert run.engine is not None
    settings = run.settings.rollout
    with run.clock("generate"):
        run.engine.wake(["kv_cache"])
        trajectories = run.engine.generate(
            batch.prompts, settings.group_size, settings.temperature, run.seed, batch.step
        )
        run.engine.sleep()
    return replace(batch, trajectories=tuple(trajectories))


def packed(run: Run, batch: Batch) -> Batch:
    """Pack the trajectories into rows that every model of the run can split evenly over its ranks."""
    assert batch.trajectories is not None
    with run.clock("pack"):
        shares = math.lcm(run.student.groups.dp.size(), *(s.data_parallel_size for s in run.scorers))
        return replace(batch, rows=pack(batch.trajectories, run.row_tokens, shares * run.rows_per_microbatch))


def score_teacher(run: Run, batch: Batch) -> Batch:
    """q_t, one forward of the teacher."""
    if run.teacher is None or batch.teacher_logprobs_T is not None:
        return batch
    assert batch.rows is not None
    with run.clock("teacher"):
        logprobs_T = run.teacher.score(batch.rows, run.settings.rollout.temperature)
        alarms.check_teacher(run.settings.alarms, logprobs_T, run.student.architecture.vocab_size)
    return replace(batch, teacher_logprobs_T=logprobs_T)


def score_reference(run: Run, batch: Batch) -> Batch:
    """r_t, one forward of the reference; none where the reference is the live student."""
    if run.reference is None or batch.reference_logprobs_T is not None:
        return batch
    assert batch.rows is not None
    with run.clock("reference"):
        logprobs_T = run.reference.score(batch.rows, run.settings.rollout.temperature)
    return replace(batch, reference_logprobs_T=logprobs_T)


def signals(run: Run, batch: Batch) -> tuple[TokenSignals, torch.Tensor]:
    """The objective's inputs for each response token, and the outcome of its response."""
    assert batch.trajectories is not None and batch.rows is not None and batch.outcomes_N is not None
    trajectories, rows, method = batch.trajectories, batch.rows, run.method
    groups_N = torch.tensor([i // run.settings.rollout.group_size for i in range(len(trajectories))])
    keep_N = torch.ones(len(trajectories), dtype=torch.bool)
    if run.settings.verify.truncated == "skip":
        keep_N &= ~torch.tensor([t.truncated for t in trajectories])
    if method.uniform_groups == "skip":
        keep_N &= ~uniform_groups(batch.outcomes_N, groups_N)
    advantage_N = outcome_advantage(batch.outcomes_N, groups_N, method.outcome)
    tokens = TokenSignals(
        teacher_logprobs_T=batch.teacher_logprobs_T,
        reference_logprobs_T=batch.reference_logprobs_T,
        behaviour_logprobs_T=behaviour_logprobs(trajectories, rows),
        outcome_advantage_T=advantage_N[rows.trajectory_T],
        trajectory_T=rows.trajectory_T,
        mask_T=keep_N[rows.trajectory_T],
    )
    return tokens, batch.outcomes_N[rows.trajectory_T]


def behaviour_logprobs(trajectories: Sequence[Trajectory], rows: PackedRows) -> torch.Tensor:
    """b_t in the order of the packed rows, float32 [T]."""
    flat = torch.tensor([b for t in trajectories for b in t.behaviour_logprobs], dtype=torch.float32)
    return in_row_order(flat, rows)


def in_row_order(values_T: torch.Tensor, rows: PackedRows) -> torch.Tensor:
    """Values in the order of trajectories -> in the order of the packed rows."""
    result_T = torch.empty_like(values_T)
    result_T[rows.trajectory_order()] = values_T
    return result_T


def batch_metrics(batch: Batch) -> dict[str, float]:
    """What a step's log says about whole responses."""
    assert batch.trajectories is not None and batch.outcomes_N is not None and batch.rows is not None
    lengths = torch.tensor([float(len(t.token_ids)) for t in batch.trajectories])
    groups_GN = batch.outcomes_N.view(len(batch.prompts), -1)
    return {
        "pass_rate": float(batch.outcomes_N.mean()),
        "uniform_groups": float((groups_GN == groups_GN[:, :1]).all(dim=1).float().mean()),
        "response_length": float(lengths.mean()),
        "response_length_max": float(lengths.max()),
        "truncated": sum(t.truncated for t in batch.trajectories) / len(batch.trajectories),
        "response_tokens": float(lengths.sum()),
        "rows": float(batch.rows.rows),
    }

"""One training step of SG-OPD. Read this first: it is the architecture.

    prompts -> teach -> sync -> generate -> pack -> (verify | teacher | reference) -> train

Each stage takes the step's `Batch` and returns it with its own part filled in. A part that is there already,
because the batch was recorded by an earlier run, is not computed again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from megatron_sgopd.monitor import alarms
from megatron_sgopd.objective.filters import repetition
from megatron_sgopd.objective.imitation import imitation_weights
from megatron_sgopd.objective.loss import TokenSignals
from megatron_sgopd.objective.outcome import outcome_advantage, uniform_groups
from megatron_sgopd.platform import current
from megatron_sgopd.rollout.packing import PackedRows, pack
from megatron_sgopd.rollout.prompts import Prompt
from megatron_sgopd.rollout.teacher_rollouts import NOTHING_TAUGHT, Taught
from megatron_sgopd.rollout.trajectory import Decoding, Trajectory
from megatron_sgopd.rollout.weight_sync import sync_student

if TYPE_CHECKING:
    from megatron_sgopd.run import Run


SCORES = ("teacher_logprobs_T", "teacher_ranks_T", "reference_logprobs_T")


@dataclass(frozen=True)
class Batch:
    """Everything that is known about a step's rollouts; the same on every rank.

    N trajectories of the student, in order of prompt and sample, then the teacher's approved ones; together they have
    T response tokens, in the order of the packed rows.
    """

    step: int
    prompts: tuple[Prompt, ...]
    taught: Taught = NOTHING_TAUGHT
    trajectories: tuple[Trajectory, ...] | None = None
    """The student's."""
    rows: PackedRows | None = None
    teacher_logprobs_T: torch.Tensor | None = None
    """q_t: float32, nats."""
    teacher_ranks_T: torch.Tensor | None = None
    """int64: place of the token in the teacher's order of preference, from 1 on; only taken in steps whose responses
    are kept."""
    reference_logprobs_T: torch.Tensor | None = None
    """r_t: float32, nats; None also where the reference is the live student."""
    outcomes_N: torch.Tensor | None = None
    """R_i of the student's: float32, 1 where the verifier accepted the answer, else 0."""

    trained_N: torch.Tensor | None = None
    """bool: those of the student's that settings do not leave out."""

    @property
    def responses(self) -> tuple[Trajectory, ...]:
        """All that is packed: the student's trajectories, then the teacher's."""
        assert self.trajectories is not None
        return self.trajectories + self.taught.trajectories


def prepare(run: Run, step: int) -> Batch:
    """All that comes before the optimizer step."""
    run.stop_if_asked(step)
    recorded = run.recording.load(step)
    if recorded is None:
        batch = teach(run, Batch(step, tuple(run.prompts_of(step))))
        run.stop_if_asked(step)
        sync(run)
        batch = packed(run, generate(run, batch))
        run.stop_if_asked(step)
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
        batch = replace(batch, outcomes_N=outcomes())
    run.stop_if_asked(step)
    return replace(batch, trained_N=trained_responses(run, batch))


def with_tensors(batch: Batch, tensors: dict[str, torch.Tensor]) -> Batch:
    """Put recorded scores into the batch's own order of tokens."""
    assert batch.rows is not None
    scores: dict[str, Any] = {name: in_row_order(tensors[name], batch.rows) for name in SCORES if name in tensors}
    return replace(batch, **scores)


def teach(run: Run, batch: Batch) -> Batch:
    """Approved rollouts of the teacher, while the schedule wants them."""
    if run.teacher_rollouts is None:
        return batch
    with run.clock("teach"):
        return replace(batch, taught=run.teacher_rollouts.of(batch.step, batch.prompts))


def sync(run: Run) -> None:
    """Give the engine the weights of the last optimizer step."""
    assert run.engine is not None
    with run.phase("sync"), current().plain_torch():
        student, memory_bytes = run.student, run.settings.rollout.sync_bucket_mib * 2**20
        sync_student(run.engine, student.model, student.architecture, student.groups, memory_bytes)


def generate(run: Run, batch: Batch) -> Batch:
    """Sample G responses a prompt from the student, fewer where the teacher's take their slots."""
    assert run.engine is not None
    settings = run.settings.rollout
    mixed = run.settings.teacher_rollouts.mode == "mixture"
    taken = Counter(t.prompt.id for t in batch.taught.trajectories if mixed)
    samples = [settings.group_size - taken[prompt.id] for prompt in batch.prompts]
    with run.phase("generate"):
        decoding = Decoding(settings.temperature)  # of the whole distribution, whose log-probs the objective reads
        trajectories = run.engine.generate(batch.prompts, samples, decoding, run.seed, batch.step)
    return replace(batch, trajectories=tuple(trajectories))


def packed(run: Run, batch: Batch) -> Batch:
    """Pack the trajectories into rows that every model of the run can split evenly over its ranks."""
    with run.clock("pack"):
        shares = math.lcm(run.student.groups.dp.size(), *(s.data_parallel_size for s in run.scorers))
        share_prompts = current().shares_prompts
        rows = pack(
            batch.responses,
            run.row_tokens,
            shares,
            run.rows_per_microbatch,
            share_prompts,
            run.student.groups.cp.size(),
        )
        return replace(batch, rows=rows)


def score_teacher(run: Run, batch: Batch) -> Batch:
    """q_t, one forward of the teacher."""
    if run.teacher is None:
        return batch
    if batch.teacher_logprobs_T is not None and run.method.estimator == "sampled":
        return batch  # recorded; `full` needs more of the teacher than was
    assert batch.rows is not None
    with run.phase("teacher"):
        keeps = run.keeps_samples(batch.step)
        logprobs_T, ranks_T = run.teacher.score(batch.rows, run.settings.rollout.temperature, keeps)
        alarms.check_teacher(run.settings.alarms, logprobs_T, run.student.architecture.vocab_size)
    return replace(batch, teacher_logprobs_T=logprobs_T, teacher_ranks_T=ranks_T)


def score_reference(run: Run, batch: Batch) -> Batch:
    """r_t, one forward of the reference; none where the reference is the live student."""
    if run.reference is None or batch.reference_logprobs_T is not None:
        return batch
    assert batch.rows is not None
    with run.phase("reference"):
        logprobs_T, _ = run.reference.score(batch.rows, run.settings.rollout.temperature)
    return replace(batch, reference_logprobs_T=logprobs_T)


def signals(run: Run, batch: Batch) -> tuple[TokenSignals, torch.Tensor, torch.Tensor]:
    """For each response token the objective's inputs, R_i of its response, and whether the loss is a mean over it."""
    assert batch.trajectories is not None and batch.rows is not None
    assert batch.outcomes_N is not None and batch.trained_N is not None
    rows, groups_N = batch.rows, group_ids(batch)
    judged_N = judged_responses(run, batch)
    advantage_N = outcome_advantage(batch.outcomes_N, groups_N, run.method.outcome, counted_N=judged_N)
    teacher_T = rows.trajectory_T >= len(batch.trajectories)
    nothing_M = torch.zeros(len(batch.taught.trajectories))
    mask_T = torch.cat([batch.trained_N, nothing_M.bool()])[rows.trajectory_T]
    imitation_T, counted_T = None, mask_T
    if batch.taught.trajectories:
        mode = run.settings.teacher_rollouts.mode
        imitation_T, counted_T = imitation_weights(mask_T, teacher_T, batch.taught.weight, mode)
    tokens = TokenSignals(
        teacher_logprobs_T=batch.teacher_logprobs_T,
        reference_logprobs_T=batch.reference_logprobs_T,
        behaviour_logprobs_T=behaviour_logprobs(batch.responses, rows),
        outcome_advantage_T=torch.cat([advantage_N, nothing_M])[rows.trajectory_T],
        trajectory_T=rows.trajectory_T,
        mask_T=mask_T,
        imitation_T=imitation_T,
    )
    return tokens, torch.cat([batch.outcomes_N, nothing_M + 1])[rows.trajectory_T], counted_T


def group_ids(batch: Batch) -> torch.Tensor:
    """int64 [N]: the prompt of each of the student's trajectories."""
    assert batch.trajectories is not None
    index = {prompt.id: i for i, prompt in enumerate(batch.prompts)}
    return torch.tensor([index[t.prompt.id] for t in batch.trajectories], dtype=torch.int64)


def judged_responses(run: Run, batch: Batch) -> torch.Tensor:
    """bool [N]: those of the student's trajectories whose outcome says something: not of what was cut off, if that is
    to be skipped."""
    assert batch.trajectories is not None
    skips = run.settings.verify.truncated == "skip"
    return torch.tensor([not (skips and t.truncated) for t in batch.trajectories], dtype=torch.bool)


def trained_responses(run: Run, batch: Batch) -> torch.Tensor:
    """bool [N]: those of the student's trajectories that settings do not leave out."""
    assert batch.trajectories is not None and batch.outcomes_N is not None
    filters, trajectories = run.settings.filters, batch.trajectories
    judged_N = judged_responses(run, batch)
    keep_N = judged_N.clone()
    if run.method.uniform_groups == "skip":
        keep_N[judged_N] &= ~uniform_groups(batch.outcomes_N[judged_N], group_ids(batch)[judged_N])
    if (longest := filters.max_response_tokens) is not None:
        keep_N &= torch.tensor([len(t.token_ids) <= longest for t in trajectories], dtype=torch.bool)
    if (limit := filters.max_repetition) is not None:
        keep_N &= torch.tensor([repetition(t.token_ids) <= limit for t in trajectories], dtype=torch.bool)
    return keep_N


def behaviour_logprobs(trajectories: Sequence[Trajectory], rows: PackedRows) -> torch.Tensor:
    """b_t in the order of the packed rows, float32 [T]; NaN for tokens of the teacher."""
    unknown = float("nan")
    flat = [b for t in trajectories for b in ([unknown] * len(t.token_ids) if t.from_teacher else t.behaviour_logprobs)]
    return in_row_order(torch.tensor(flat, dtype=torch.float32), rows)


def in_row_order(values_T: torch.Tensor, rows: PackedRows) -> torch.Tensor:
    """Values in the order of trajectories -> in the order of the packed rows."""
    result_T = torch.empty_like(values_T)
    result_T[rows.trajectory_order()] = values_T
    return result_T


def batch_metrics(batch: Batch) -> dict[str, float]:
    """What a step's log says about whole responses."""
    assert batch.trajectories is not None and batch.rows is not None
    assert batch.outcomes_N is not None and batch.trained_N is not None
    lengths = torch.tensor([float(len(t.token_ids)) for t in batch.trajectories])
    groups_N = group_ids(batch)
    first_N = torch.ones_like(groups_N, dtype=torch.bool)
    first_N[1:] = groups_N[1:] != groups_N[:-1]
    taught = batch.taught
    return {
        "pass_rate": float(batch.outcomes_N.mean()),
        "uniform_groups": float(uniform_groups(batch.outcomes_N, groups_N)[first_N].float().mean()),
        "filtered": 1 - float(batch.trained_N.float().mean()),
        "response_length": float(lengths.mean()),
        "response_length_max": float(lengths.max()) if len(lengths) else 0.0,
        "truncated": sum(t.truncated for t in batch.trajectories) / max(1, len(batch.trajectories)),
        "response_tokens": float(lengths.sum()),
        "rows": float(batch.rows.rows),
        "teacher_weight": taught.weight,
        "teacher_rollouts": float(len(taught.trajectories)),
        "teacher_approval": taught.approval,
        "teacher_shortfall": taught.shortfall,
        "memory_mib": current().memory_used() / 2**20,
    }

"""The teacher's own approved responses to a step's prompts: made in the run ahead of time, or read from a bank."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sgopd.config import RolloutSettings, Settings, TeacherRolloutSettings
from megatron_sgopd.objective.imitation import teacher_slots
from megatron_sgopd.objective.schedule import TeacherSchedule
from megatron_sgopd.platform import current
from megatron_sgopd.rollout.bank import BankIdentity, BankWriter, RolloutBank, writing
from megatron_sgopd.rollout.engine import RolloutEngine
from megatron_sgopd.rollout.filling import Sampling, Worker, absent_problems, judged_rollouts, sample_problems
from megatron_sgopd.rollout.prompts import Prompt
from megatron_sgopd.rollout.trajectory import Decoding, Trajectory, from_first_rank, gather_trajectories
from megatron_sgopd.verify.stage import Verification

TEACHER_STEP = -2
"""Seeds of teacher rollouts are those of no training step and no evaluation."""
OWN_BANK = "teacher_bank"
"""Folder in RUN_DIR of the rollouts that a run makes itself."""


def schedule_of(settings: TeacherRolloutSettings) -> TeacherSchedule:
    """w(step) as the settings say."""
    return TeacherSchedule(settings.weight, settings.hold_steps, settings.end_step, settings.shape)


def bank_folder(settings: Settings) -> Path:
    """Where the rollouts of a run are."""
    return Path(settings.teacher_rollouts.bank or Path(settings.run_dir) / OWN_BANK)


def teacher_sampling(settings: TeacherRolloutSettings, run_seed: int) -> Sampling:
    """How the teacher answers: otherwise in every run, but for the runs that share a bank."""
    seed = settings.seed
    if seed is None:
        seed = run_seed if settings.bank is None else 0
    return Sampling(settings.samples, Decoding(settings.temperature), seed, TEACHER_STEP)


def teacher_engine(settings: Settings) -> RolloutSettings:
    """The settings of the teacher's engine: the student's, but for what depends on its size."""
    own = settings.teacher_rollouts
    tensor = own.tensor_parallel or settings.rollout.tensor_parallel
    return dataclasses.replace(settings.rollout, tensor_parallel=tensor, memory_fraction=own.memory_fraction)


def teacher_worker(settings: Settings, tokenizer: Any, row_tokens: int, run_seed: int) -> Worker:
    """The teacher, answering as the settings say."""
    return Worker(
        settings.teacher.path,
        tokenizer,
        teacher_sampling(settings.teacher_rollouts, run_seed),
        teacher_engine(settings),
        settings.verify,
        row_tokens,
        settings.platform,
        "teacher_rollouts.tensor_parallel",
    )


@dataclass(frozen=True)
class Taught:
    """What the teacher contributes to a step."""

    trajectories: tuple[Trajectory, ...]
    """Approved rollouts, in order of prompt and sample."""
    weight: float
    """w."""
    approval: float
    """Share of the prompts' teacher rollouts that were approved; NaN where there are none."""
    shortfall: float
    """Share of the prompts without an approved rollout; in `mixture`, of the teacher's slots that stay student's."""


NOTHING_TAUGHT = Taught((), 0.0, float("nan"), 0.0)


class TeacherRollouts:
    """Rank 0 reads and writes the bank; all ranks call every method together."""

    def __init__(
        self,
        settings: Settings,
        identity: BankIdentity,
        verification: Verification,
        engine: Callable[[], RolloutEngine],
        prompts_of: Callable[[int], list[Prompt]],
        note: Callable[[str], None],
        run_seed: int,
    ) -> None:
        """Nothing is built before it is needed.

        Args:
            engine: builds the teacher's engine.
            prompts_of: the prompts of a step.
            note: tells the user something.
        """
        self._settings, self._group_size = settings.teacher_rollouts, settings.rollout.group_size
        self._schedule = schedule_of(settings.teacher_rollouts)
        self._identity, self._verification = identity, verification
        self._sampling = teacher_sampling(settings.teacher_rollouts, run_seed)
        self._build_engine, self._prompts_of, self._note = engine, prompts_of, note
        self._folder = bank_folder(settings)
        self._bank = RolloutBank(self._folder)
        self._engine: RolloutEngine | None = None
        self._open = contextlib.ExitStack()
        self._writer: BankWriter | None = None

    def of(self, step: int, prompts: Sequence[Prompt]) -> Taught:
        """The approved rollouts of a step's prompts; releases the teacher's engine once the schedule has ended."""
        weight = self._schedule(step)
        if weight == 0.0:
            self.release()
            return NOTHING_TAUGHT
        if self._settings.bank is None:
            self._make(self._missing(step))
        local, counts = [], torch.zeros(2, dtype=torch.int64)
        if dist.get_rank() == 0:
            found = [(prompt, self._bank.of(prompt.problem)) for prompt in prompts]
            counts[0] = sum(len(rollouts) for _, rollouts in found)
            counts[1] = sum(rollout.outcome for _, rollouts in found for rollout in rollouts)
            local = [
                Trajectory(prompt, r.sample, tuple(r.token_ids), (), r.truncated, from_teacher=True)
                for prompt, rollouts in found
                for r in rollouts
                if r.outcome
            ]
        counts = from_first_rank(counts)
        approved = gather_trajectories(local, prompts, contributes=dist.get_rank() == 0)
        approval = float(counts[1] / counts[0]) if counts[0] else float("nan")
        if self._settings.mode == "mixture":
            slots = teacher_slots(weight, self._group_size)
            taken = _first_of_each(approved, slots)
            missing = 1 - len(taken) / (slots * len(prompts)) if slots else 0.0
            return Taught(tuple(taken), weight, approval, missing)
        answered = len({trajectory.prompt.id for trajectory in approved})
        return Taught(tuple(approved), weight, approval, 1 - answered / len(prompts))

    def _missing(self, step: int) -> list[Prompt]:
        """Prompts of this and the coming steps whose rollouts are not there; none while this step's are."""
        ahead = range(step, min(step + self._settings.ahead_steps, self._settings.end_step))
        coming = {prompt.problem: prompt for other in ahead for prompt in self._prompts_of(other)}
        missing = absent_problems(self._bank, list(coming.values()))
        now = {prompt.problem for prompt in self._prompts_of(step)}
        return missing if any(prompt.problem in now for prompt in missing) else []

    def _make(self, prompts: Sequence[Prompt]) -> None:
        if not prompts:
            return
        if self._engine is None:
            self._engine = self._build_engine()
            if dist.get_rank() == 0:
                self._writer = self._open.enter_context(writing(self._folder, self._identity, "train-0"))
                self._bank.refresh()
        trajectories = sample_problems(self._engine, prompts, self._sampling)
        self._verification.start(trajectories)()
        texts, results = self._verification.all_texts(), self._verification.all_results()
        if self._writer is not None:
            self._writer.write(judged_rollouts(trajectories, texts, results))
            self._bank.refresh()

    def release(self) -> None:
        """Give the engine's memory back; a run that never needed it has nothing to give."""
        if self._engine is None:
            return
        before = current().memory_used()
        self._engine.close()
        self._engine = None
        self._open.close()
        after = current().memory_used()
        self._note(f"teacher engine released: memory in use {before / 2**20:.0f} -> {after / 2**20:.0f} MiB")


def _first_of_each(trajectories: Sequence[Trajectory], count: int) -> list[Trajectory]:
    """At most `count` of each prompt's."""
    taken: dict[str, int] = {}
    kept = []
    for trajectory in trajectories:
        number = taken.get(trajectory.prompt.id, 0)
        if number < count:
            kept.append(trajectory)
            taken[trajectory.prompt.id] = number + 1
    return kept

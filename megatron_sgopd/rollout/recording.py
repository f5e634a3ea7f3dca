"""A step's batch on disk, so that training can be run without rollouts and rollouts looked at later."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_sgopd.checkpoint.files import write_atomically
from megatron_sgopd.common.data_files import read_bytes
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.rollout.prompts import Prompt, PromptSet
from megatron_sgopd.rollout.teacher_rollouts import Taught
from megatron_sgopd.rollout.trajectory import Trajectory

if TYPE_CHECKING:
    from megatron_sgopd.step import Batch


@dataclass(frozen=True)
class _Response:
    """A trajectory as it is written."""

    prompt: int
    """Place of its prompt."""
    sample: int
    token_ids: tuple[int, ...]
    behaviour: tuple[float, ...]
    truncated: bool
    from_teacher: bool


@dataclass(frozen=True)
class _TeacherShare:
    weight: float
    approval: float
    shortfall: float


@dataclass(frozen=True)
class _Step:
    """The .json of a step."""

    step: int
    prompts: tuple[Prompt, ...]
    trajectories: tuple[_Response, ...]
    taught: _TeacherShare


_STEP = TypeAdapter(_Step)


class Recording:
    """Batches as `step_000012.json` (prompts and responses) and `step_000012.safetensors` (numbers).

    Per-token tensors are stored in the order of trajectories, not of packed rows, so that a batch can be
    replayed under any layout. Answers are always verified again; delete the safetensors file to have teacher and
    reference score again too.
    """

    def __init__(
        self,
        replay: str | None,
        record: str | None,
        vocab_size: int,
        known: PromptSet | None,
        scored_by: Mapping[str, str],
    ) -> None:
        """Replay from one folder, and record into another.

        Args:
            vocab_size: of the models.
            known: the run's own prompts, where the verifier believes what it is told of a prompt: those that are
                replayed must be among them. None where it does not.
            scored_by: digests of the run's `teacher` and `reference`, and the `temperature` of log-probs: recorded
                scores are of the same, or refused.
        """
        self._replay = Path(replay) if replay else None
        self._record = Path(record) if record else None
        self._vocab_size, self._known, self._scored_by = vocab_size, known, dict(scored_by)

    @cached_property
    def _recorded(self) -> list[Path]:
        assert self._replay is not None
        return sorted(self._replay.glob("step_*.json"))

    def load(self, step: int) -> tuple[Batch, dict[str, torch.Tensor]] | None:
        """The recorded batch without its rows, and its tensors; None if nothing is to be replayed.

        After the last recorded step the first one follows again.

        Raises:
            ConfigError: a step among those recorded is missing, or one is not what a run writes.
        """
        from megatron_sgopd.step import Batch

        if self._replay is None:
            return None
        path = self._replay / f"step_{step % len(self._recorded):06d}.json"
        if path not in self._recorded:
            raise ConfigError(f"logging.replay={self._replay}: {path.name} is missing before {self._recorded[-1].name}")
        content = self._read(path)
        trajectories = tuple(
            Trajectory(
                content.prompts[t.prompt], t.sample, t.token_ids, t.behaviour, t.truncated, from_teacher=t.from_teacher
            )
            for t in content.trajectories
        )
        taught = Taught(tuple(t for t in trajectories if t.from_teacher), **vars(content.taught))
        numbers = path.with_suffix(".safetensors")
        try:
            tensors, said = _numbers(numbers) if numbers.is_file() else ({}, {})
        except SafetensorError as error:
            raise ConfigError(
                f"{numbers} cannot be read ({error}): remove it, and its numbers are made again"
            ) from None
        tokens = sum(len(t.token_ids) for t in trajectories)
        if wrong := sorted(name for name, tensor in tensors.items() if tensor.shape != (tokens,)):
            raise ConfigError(
                f"{numbers}: {wrong[0]} has the shape {tuple(tensors[wrong[0]].shape)}, and {path.name} has {tokens} "
                "tokens: remove the file, and its numbers are made again"
            )
        self._check_scores(tensors, said, numbers)
        return Batch(step, content.prompts, taught, tuple(t for t in trajectories if not t.from_teacher)), tensors

    def _check_scores(self, tensors: Mapping[str, torch.Tensor], said: Mapping[str, str], numbers: Path) -> None:
        for model in ("teacher", "reference"):
            for name in (model, "temperature"):
                if f"{model}_logprobs_T" in tensors and said.get(name) != self._scored_by[name]:
                    raise ConfigError(
                        f"{numbers} holds log-probs of the {model} with {name} {said.get(name)!r}, and the run has "
                        f"{self._scored_by[name]!r}: remove the .safetensors files there, and models score again"
                    )

    def _read(self, path: Path) -> _Step:
        try:
            content = _STEP.validate_json(read_bytes(path, 1 << 32))
        except (OSError, ValidationError) as error:
            raise ConfigError(f"{path} is no recorded batch ({' '.join(str(error).split())}): record again") from None
        responses = content.trajectories
        fits = all(
            0 <= r.prompt < len(content.prompts) and len(r.behaviour) == (0 if r.from_teacher else len(r.token_ids))
            for r in responses
        )
        ids = {id_ for tokens in (content.prompts, responses) for one in tokens for id_ in one.token_ids}
        if not fits or (ids and not 0 <= min(ids) <= max(ids) < self._vocab_size):
            raise ConfigError(
                f"{path} is no batch of this model: a response has no prompt or no log-probs, or token ids are not "
                f"below {self._vocab_size}"
            )
        for prompt in content.prompts if self._known is not None else ():
            self._check_known(prompt, path)
        return content

    def _check_known(self, prompt: Prompt, path: Path) -> None:
        assert self._known is not None
        own = self._known.find(prompt.problem)
        told = ("text", "answer", "task", "metadata")
        if own is None or any(getattr(own, name) != getattr(prompt, name) for name in told):
            raise ConfigError(
                f"{path}: {prompt.problem} is not that of data.train, and verify.verifier=task believes what a prompt "
                "says of itself: replay with the recipe that the batches were recorded with, or verify by math"
            )

    def save(self, batch: Batch, student_logprobs: Callable[[], torch.Tensor]) -> None:
        """Write the batch and the student's log-probs of it, which `student_logprobs` collects from all ranks."""
        if self._record is None:
            return
        student_logprobs_T = student_logprobs()
        if dist.get_rank() > 0:
            return
        from megatron_sgopd.step import SCORES

        assert batch.rows is not None
        self._record.mkdir(parents=True, exist_ok=True)
        index = {prompt.id: i for i, prompt in enumerate(batch.prompts)}
        taught = batch.taught
        content = _Step(
            batch.step,
            batch.prompts,
            tuple(
                _Response(index[t.prompt.id], t.sample, t.token_ids, t.behaviour_logprobs, t.truncated, t.from_teacher)
                for t in batch.responses
            ),
            _TeacherShare(taught.weight, taught.approval, taught.shortfall),
        )
        order = batch.rows.trajectory_order()
        tensors = {"student_logprobs_T": student_logprobs_T[order].contiguous()}
        for name in SCORES:
            if (value := getattr(batch, name)) is not None:
                tensors[name] = value[order].contiguous()
        path = self._record / f"step_{batch.step:06d}.json"
        save_file(tensors, path.with_suffix(".safetensors"), metadata=self._scored_by)
        write_atomically(path, json.dumps(dataclasses.asdict(content)).encode())


def _numbers(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors of a step, and what the file says of them."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  # no mapping

"""A step's batch on disk, so that training can be run without rollouts and rollouts looked at later."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.rollout.prompts import Prompt
from megatron_sgopd.rollout.teacher_rollouts import Taught
from megatron_sgopd.rollout.trajectory import Trajectory

if TYPE_CHECKING:
    from megatron_sgopd.step import Batch


class Recording:
    """Batches as `step_000012.json` (prompts and responses) and `step_000012.safetensors` (numbers).

    Per-token tensors are stored in the order of trajectories, not of packed rows, so that a batch can be
    replayed under any layout. Answers are always verified again; delete the safetensors file to have teacher and
    reference score again too.
    """

    def __init__(self, replay: str | None, record: str | None) -> None:
        self._replay = Path(replay) if replay else None
        self._record = Path(record) if record else None

    def load(self, step: int) -> tuple[Batch, dict[str, torch.Tensor]] | None:
        """The recorded batch without its rows, and its tensors; None if nothing is to be replayed.

        Raises:
            ConfigError: the step was not recorded.
        """
        from megatron_sgopd.step import Batch

        if self._replay is None:
            return None
        path = self._replay / f"step_{step:06d}.json"
        if not path.is_file():
            raise ConfigError(f"logging.replay={self._replay} has no batch of step {step}: {path.name} is missing")
        content = json.loads(path.read_text())
        prompts = tuple(Prompt(**{**p, "token_ids": tuple(p["token_ids"])}) for p in content["prompts"])
        trajectories = tuple(
            Trajectory(
                prompts[t["prompt"]],
                t["sample"],
                tuple(t["token_ids"]),
                tuple(t["behaviour"]),
                t["truncated"],
                t["from_teacher"],
            )
            for t in content["trajectories"]
        )
        taught = Taught(tuple(t for t in trajectories if t.from_teacher), **content["taught"])
        numbers = path.with_suffix(".safetensors")
        tensors = load_file(numbers) if numbers.is_file() else {}
        return Batch(step, prompts, taught, tuple(t for t in trajectories if not t.from_teacher)), tensors

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
        content = {
            "step": batch.step,
            "prompts": [dataclasses.asdict(prompt) for prompt in batch.prompts],
            "trajectories": [
                {
                    "prompt": index[t.prompt.id],
                    "sample": t.sample,
                    "token_ids": t.token_ids,
                    "behaviour": t.behaviour_logprobs,
                    "truncated": t.truncated,
                    "from_teacher": t.from_teacher,
                }
                for t in batch.responses
            ],
            "taught": {
                "weight": batch.taught.weight,
                "approval": batch.taught.approval,
                "shortfall": batch.taught.shortfall,
            },
        }
        order = batch.rows.trajectory_order()
        tensors = {"student_logprobs_T": student_logprobs_T[order].contiguous()}
        for name in SCORES:
            if (value := getattr(batch, name)) is not None:
                tensors[name] = value[order].contiguous()
        path = self._record / f"step_{batch.step:06d}.json"
        save_file(tensors, path.with_suffix(".safetensors"))
        _replace_text(path, json.dumps(content))


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.rename(path)

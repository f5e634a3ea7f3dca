"""Verification of a step's trajectories, shared out over ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from megatron_sgopd.config import VerifySettings
from megatron_sgopd.platform import current
from megatron_sgopd.rollout.trajectory import Trajectory, all_gather_ragged
from megatron_sgopd.verify.base import VerifierResult, VerifyRequest
from megatron_sgopd.verify.pool import FAULTS, VerifierPool


class Verification:
    """Each rank's verifier processes; rank r checks every world_size-th trajectory from the r-th on."""

    def __init__(self, settings: VerifySettings, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._pool = VerifierPool(
            settings.verifier,
            workers=settings.workers,
            time_limit=settings.time_limit,
            memory_limit=settings.memory_limit_mib * 2**20,
        )
        self.faults: dict[str, int] = {}
        """Answers so far, over all ranks, that timed out, crashed, ran out of memory or could not be read."""
        self.checked: list[tuple[Trajectory, str, VerifierResult]] = []
        """What this rank checked last: trajectory, response text, result."""

    def start(self, trajectories: Sequence[Trajectory]) -> Callable[[], torch.Tensor]:
        """Begin checking; the returned function waits and gives float32 outcomes [N] on every rank.

        A truncated response is wrong without being checked.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        mine = list(range(rank, len(trajectories), world_size))
        token_ids = [list(trajectories[i].token_ids) for i in mine]
        # For no sequence at all it would return one text.
        texts = self._tokenizer.batch_decode(token_ids, skip_special_tokens=True) if mine else []
        complete = [k for k, i in enumerate(mine) if not trajectories[i].truncated]
        pending = self._pool.submit([_request(trajectories[mine[k]], texts[k]) for k in complete])

        def outcomes() -> torch.Tensor:
            results = [VerifierResult(0, None, "truncated") for _ in mine]
            for k, result in zip(complete, pending.result(), strict=True):
                results[k] = result
            self.checked = [
                (trajectories[i], text, result) for i, text, result in zip(mine, texts, results, strict=True)
            ]
            # One all-reduce for outcomes and fault counts; every outcome has one rank that checked it.
            found = torch.zeros(len(trajectories) + len(FAULTS), dtype=torch.float32)
            found[mine] = torch.tensor([float(r.outcome) for r in results])
            found[len(trajectories) :] = torch.tensor([float(self._pool.counters[name]) for name in FAULTS])
            found = found.to(current().device)
            dist.all_reduce(found)
            outcomes_N, counts = found.cpu().split([len(trajectories), len(FAULTS)])
            self.faults = {f"verifier_{name}": int(n) for name, n in zip(FAULTS, counts, strict=True)}
            return outcomes_N

        return outcomes

    def all_checked(self) -> list[tuple[str, VerifierResult]]:
        """Text and result of what all ranks checked last, in the order of the trajectories, on every rank."""
        mine = json.dumps([[text, asdict(result)] for _, text, result in self.checked]).encode()
        parts = all_gather_ragged(torch.frombuffer(bytearray(mine), dtype=torch.uint8))
        by_rank = [[(text, VerifierResult(**r)) for text, r in json.loads(bytes(part.tolist()))] for part in parts]
        longest = max(len(checked) for checked in by_rank)
        return [checked[i] for i in range(longest) for checked in by_rank if i < len(checked)]

    def close(self) -> None:
        """End the verifier processes."""
        self._pool.close()


def _request(trajectory: Trajectory, text: str) -> VerifyRequest:
    prompt = trajectory.prompt
    return VerifyRequest(prompt.text, text, prompt.answer, prompt.task, prompt.metadata)

"""Verification of a step's trajectories, shared out over ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_sgopd.config import VerifySettings
from megatron_sgopd.platform import current
from megatron_sgopd.rollout.trajectory import Trajectory, all_gather_ragged, gather_ragged
from megatron_sgopd.verify.base import VerifierResult, VerifyRequest
from megatron_sgopd.verify.pool import FAULTS, VerifierPool

FAULT_METRICS = tuple(f"verifier_{name}" for name in FAULTS)
_ROUND = 5.0
"""Seconds after which ranks that wait for answers tell each other how many are left."""


class Verification:
    """Each rank's verifier processes; rank r checks every world_size-th trajectory from the r-th on."""

    def __init__(
        self,
        settings: VerifySettings,
        tokenizer: Any,
        earlier: Mapping[str, float] | None = None,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the processes.

        Args:
            earlier: the run's faults before this attempt, under FAULT_METRICS' names.
            alive: called while answers are waited for and some rank has had one since the last call.
        """
        self._tokenizer, self._alive = tokenizer, alive
        self._earlier = dict.fromkeys(FAULT_METRICS, 0) | {name: int(n) for name, n in (earlier or {}).items()}
        self._pool = VerifierPool(
            settings.verifier,
            workers=settings.workers,
            time_limit=settings.time_limit,
            memory_limit=settings.memory_limit_mib * 2**20,
        )
        self.faults: dict[str, int] = dict(self._earlier)
        """The run's answers so far, over all ranks, that timed out, crashed, ran out of memory or could not be read."""
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
            left = len(trajectories) + 1
            while left:
                unsettled = pending.wait(_ROUND)
                if not unsettled:
                    for k, result in zip(complete, pending.result(), strict=True):
                        results[k] = result
                # One all-reduce for outcomes, faults and what is left; every outcome has one rank that checked it.
                found = torch.zeros(len(trajectories) + len(FAULTS) + 1, dtype=torch.float32)
                found[mine] = torch.tensor([float(r.outcome) for r in results])
                counts = [*(self._pool.counters[name] for name in FAULTS), unsettled]
                found[len(trajectories) :] = torch.tensor(counts, dtype=torch.float32)
                found = found.to(current().device)
                dist.all_reduce(found)
                outcomes_N, faults, rest = found.cpu().split([len(trajectories), len(FAULTS), 1])
                if int(rest) < left:
                    self._alive()
                left = int(rest)
            self.checked = [
                (trajectories[i], text, result) for i, text, result in zip(mine, texts, results, strict=True)
            ]
            self.faults = {
                name: self._earlier[name] + int(n) for name, n in zip(FAULT_METRICS, faults.tolist(), strict=True)
            }
            return outcomes_N

        return outcomes

    def all_results(self) -> list[VerifierResult]:
        """Results of what all ranks checked last, in the order of the trajectories, on every rank."""
        mine = json.dumps([asdict(result) for _, _, result in self.checked]).encode()
        parts = all_gather_ragged(_as_tensor(mine))
        return _in_order([[VerifierResult(**r) for r in json.loads(_as_bytes(part))] for part in parts])

    def all_texts(self) -> list[str]:
        """Texts of what all ranks checked last, in the order of the trajectories, on the first rank; none elsewhere."""
        if dist.get_world_size() == 1:
            return [text for _, text, _ in self.checked]
        encoded = [text.encode(errors="surrogatepass") for _, text, _ in self.checked]
        lengths = gather_ragged(torch.tensor([len(text) for text in encoded], dtype=torch.int64))
        parts = gather_ragged(_as_tensor(b"".join(encoded)))
        return _in_order(
            [
                [_as_bytes(text).decode(errors="surrogatepass") for text in part.split(of.tolist())]
                for part, of in zip(parts, lengths, strict=True)
            ]
        )

    def close(self) -> None:
        """End the verifier processes."""
        self._pool.close()


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8))


def _as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


def _in_order[T](by_rank: Sequence[Sequence[T]]) -> list[T]:
    """What ranks have of trajectories that were dealt out one by one, put together again."""
    longest = max((len(checked) for checked in by_rank), default=0)
    return [checked[i] for i in range(longest) for checked in by_rank if i < len(checked)]


def _request(trajectory: Trajectory, text: str) -> VerifyRequest:
    prompt = trajectory.prompt
    return VerifyRequest(prompt.text, text, prompt.answer, prompt.task, prompt.metadata)

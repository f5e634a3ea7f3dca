"""Trajectories: what was sampled for a step, and how ranks share it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_sgopd.rollout.prompts import Prompt


@dataclass(frozen=True)
class Trajectory:
    """One response to a prompt."""

    prompt: Prompt
    sample: int
    """Which of the prompt's G responses this is."""
    token_ids: tuple[int, ...]
    """Response tokens, the end-of-sequence token included where there is one."""
    behaviour_logprobs: tuple[float, ...]
    """b_t in nats: log-prob of each token under the policy that sampled it, at the sampling temperature."""
    truncated: bool
    """Cut off at the length limit, before an end-of-sequence token."""
    from_teacher: bool = False
    """Sampled from the teacher; then b_t is not kept, since nothing may be weighted by it."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn from a model's distribution."""

    temperature: float = 1.0
    top_p: float = 1.0
    """Only of the most likely tokens that together have this share of the probability."""
    top_k: int = 0
    """Only of so many most likely tokens; 0: of all."""
    stop: tuple[str, ...] = ()
    """Texts after which a response is over, besides the end-of-sequence token."""


def sampling_seed(run_seed: int, step: int, prompt_id: str, sample: int) -> int:
    """Seed of one response, so that what is generated depends on neither batching nor layout."""
    text = f"{run_seed}/{step}/{prompt_id}/{sample}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def gather_trajectories(local: Sequence[Trajectory], prompts: Sequence[Prompt], contributes: bool) -> list[Trajectory]:
    """All ranks' trajectories on every rank, ordered by prompt and sample.

    Args:
        local: what this rank has, all from the student or all from the teacher, for any of the prompts.
        prompts: all prompts of the step, the same list on every rank.
        contributes: False on ranks that only repeat another rank's trajectories.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return _in_order(local, prompts)
    index = {prompt.id: i for i, prompt in enumerate(prompts)}
    mine = local if contributes else ()
    header = torch.tensor(
        [[index[t.prompt.id], t.sample, len(t.token_ids), t.truncated, t.from_teacher] for t in mine],
        dtype=torch.int64,
    ).reshape(-1, 5)
    tokens = torch.tensor([token for t in mine for token in t.token_ids], dtype=torch.int64)
    logprobs = torch.tensor([b for t in mine for b in t.behaviour_logprobs], dtype=torch.float64)
    gathered = zip(*(all_gather_ragged(tensor) for tensor in (header, tokens, logprobs)), strict=True)
    trajectories = []
    for header, tokens, logprobs in gathered:
        lengths = header[:, 2]
        of_tokens, of_logprobs = lengths.tolist(), (lengths * (1 - header[:, 4])).tolist()
        for (prompt, sample, _, truncated, teacher), t, b in zip(
            header.tolist(), tokens.split(of_tokens), logprobs.split(of_logprobs), strict=True
        ):
            trajectories.append(
                Trajectory(
                    prompts[prompt], sample, tuple(t.tolist()), tuple(b.tolist()), bool(truncated), bool(teacher)
                )
            )
    return _in_order(trajectories, prompts)


def _in_order(trajectories: Sequence[Trajectory], prompts: Sequence[Prompt]) -> list[Trajectory]:
    index = {prompt.id: i for i, prompt in enumerate(prompts)}
    return sorted(trajectories, key=lambda t: (index[t.prompt.id], t.sample))


def from_first_rank(tensor: torch.Tensor) -> torch.Tensor:
    """The first rank's tensor on every rank, on the host; shape and dtype are the same everywhere."""
    from megatron_sgopd.platform import current

    shared = tensor.to(current().device)
    dist.broadcast(shared, 0)
    return shared.cpu()


def all_gather_ragged(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of different first sizes from all ranks, on the host of every rank."""
    padded, sizes = _padded(tensor)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [part[:size].cpu() for part, size in zip(parts, sizes, strict=True)]


def gather_ragged(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Likewise on the first rank's host alone; nothing elsewhere."""
    padded, sizes = _padded(tensor)
    parts = [torch.empty_like(padded) for _ in sizes] if dist.get_rank() == 0 else None
    dist.gather(padded, parts)
    return [part[:size].cpu() for part, size in zip(parts or (), sizes if parts else (), strict=True)]


def _padded(tensor: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """The tensor on the device, as long as the longest of all ranks, and how long each rank's is."""
    from megatron_sgopd.platform import current

    device = current().device
    size = torch.tensor([tensor.shape[0]], device=device)
    sizes = torch.empty(dist.get_world_size(), dtype=size.dtype, device=device)
    dist.all_gather_into_tensor(sizes, size)
    lengths = sizes.tolist()
    padded = torch.zeros((max(lengths), *tensor.shape[1:]), dtype=tensor.dtype, device=device)
    padded[: tensor.shape[0]] = tensor
    return padded, lengths

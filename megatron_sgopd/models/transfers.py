"""How weights travel from the ranks that hold them to all ranks of their model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_sgopd.models.weight_map import Parameter

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class Source:
    """Where a parameter is: its stage, the expert-parallel rank that holds it (0 if all do), and its dtype."""

    stage: int
    expert_rank: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Transfer:
    """Parameters of one source that travel together, each split over the same `tensor` ranks."""

    source: Source
    members: tuple[Parameter, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Of the members' shards."""
    tensor: int

    @property
    def of_experts(self) -> bool:
        return self.members[0].expert is not None

    @property
    def sizes(self) -> list[int]:
        """Elements of the members' shards."""
        return [math.prod(shape) for shape in self.shapes]


def plan_transfers(
    sources: Iterable[tuple[Parameter, Source]],
    tensor: int,
    expert_tensor: int,
    padded_vocab_size: int,
    memory_bytes: int,
) -> list[Transfer]:
    """Consecutive parameters of one source together, as many as fit.

    Args:
        sources: the parameters in the order in which they shall arrive.
        tensor: ranks that share a parameter, `expert_tensor` those that share an expert's.
        memory_bytes: what transfers may take of a rank's memory. A receiver may still hold a tensor of the last one
            when the next arrives: one takes half of it at most, but for a parameter that is larger alone.
    """
    batches: list[tuple[Source, int, list[Parameter], list[tuple[int, ...]]]] = []
    kind, nbytes = None, 0
    for parameter, source in sources:
        ranks = tensor if parameter.expert is None else expert_tensor
        shape = parameter.shard_shape(ranks, padded_vocab_size)
        alone = ranks * math.prod(shape) * source.dtype.itemsize
        if kind != (source, parameter.expert is None) or nbytes + alone > memory_bytes // 2:
            batches.append((source, ranks, [], []))
            kind, nbytes = (source, parameter.expert is None), 0
        _, _, members, shapes = batches[-1]
        members.append(parameter)
        shapes.append(shape)
        nbytes += alone
    return [Transfer(source, tuple(members), tuple(shapes), ranks) for source, ranks, members, shapes in batches]


def carry_out(
    transfer: Transfer, held: Mapping[Parameter, torch.Tensor], groups: ProcessGroupCollection, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Bring a transfer's members to every rank of the model, as tensors under their Hugging Face names.

    Collective. Each shard goes to the other experts' ranks and crosses the pipeline before its tensor-parallel ranks
    gather it: the slow links carry 1/TP of the bytes, and no rank is sent anything twice. Without parallelism the
    tensors are views of the model's own weights.

    Args:
        held: what this rank has all or a shard of.
    """
    members, source = transfer.members, transfer.source
    if transfer.tensor == groups.pp.size() == groups.ep.size() == 1:
        for member in members:
            yield from member.assemble(held[member][None])
        return
    group = groups.expt_tp if transfer.of_experts else groups.tp
    shards = torch.empty(transfer.tensor, sum(transfer.sizes), dtype=source.dtype, device=device)
    mine = shards[group.rank()]
    if members[0] in held:
        torch.cat([held[member].flatten() for member in members], out=mine)
    if groups.ep.size() > 1 and transfer.of_experts and groups.pp.rank() == source.stage:
        dist.broadcast(mine, group=groups.ep, group_src=source.expert_rank)
    if groups.pp.size() > 1:
        dist.broadcast(mine, group=groups.pp, group_src=source.stage)
    if transfer.tensor > 1:
        dist.all_gather_into_tensor(shards.view(-1), mine, group=group)
    parts = shards.split(transfer.sizes, dim=1)
    for member, shape, part in zip(members, transfer.shapes, parts, strict=True):
        yield from member.assemble(part.unflatten(1, shape))

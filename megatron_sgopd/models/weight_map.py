"""Shapes and shards that follow from an architecture's table: pure functions, no tensors.

A rank's share of a Hugging Face tensor is always one slab: a range along one axis. Loading, exporting,
checkpoints, digests and counts differ only in what they do with slabs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from megatron_sgopd.models.architecture import Architecture
from megatron_sgopd.models.families.base import AFTER_LAYERS, BEFORE_LAYERS, Entry, Layout

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Piece:
    """One Hugging Face tensor."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Slab:
    """What one rank holds of a piece, `piece[start:stop]` along `axis`, and where in its shard that lies.

    Seen as [groups, rows of a group, *rest], the shard holds it in rows `offset : offset + rows`.
    """

    piece: Piece
    axis: int
    start: int
    stop: int
    groups: int
    offset: int
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the slab."""
        shape = list(self.piece.shape)
        shape[self.axis] = self.stop - self.start
        return tuple(shape)

    def view(self, shard: torch.Tensor) -> torch.Tensor:
        """The slab inside `shard`, without a copy: [groups, rows, *rest]."""
        grouped = shard.view(self.groups, -1, *shard.shape[1:])
        return grouped[:, self.offset : self.offset + self.rows]


def in_sequence(slabs: Sequence[Slab]) -> list[Slab]:
    """A shard's slabs where the shard has them one after the other, not query group by query group."""
    placed, offset = [], 0
    for slab in slabs:
        rows = slab.groups * slab.rows
        placed.append(replace(slab, groups=1, offset=offset, rows=rows))
        offset += rows
    return placed


@dataclass(frozen=True)
class Chunk:
    """A block of one tensor of a `torch_dist` checkpoint, and what is in it."""

    key: str
    offsets: tuple[int, ...]
    """Of the block in the whole tensor, whose leading axes are layer and expert where there is one of each."""
    global_shape: tuple[int, ...]
    shape: tuple[int, ...]
    """Of the block without those leading axes."""
    slabs: tuple[Slab, ...]
    """All that the block holds; rows beyond are padding of the vocabulary, zeros."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the block in the whole tensor."""
        return (1,) * (len(self.offsets) - len(self.shape)) + self.shape


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of tensor, pipeline, virtual pipeline (parts of a stage) and expert parallelism."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    expert: int = 1


@dataclass(frozen=True)
class Owner:
    """The ranks that hold a parameter; None where every rank of that kind does."""

    pipeline: int
    virtual_pipeline: int
    expert: int | None


@dataclass(frozen=True)
class Parameter:
    """One Megatron parameter of the whole model."""

    entry: Entry
    layer: int | None
    """The layer's number in the model, from 0."""
    expert: int | None
    """The expert's number in its layer, from 0."""
    pieces: tuple[Piece, ...]
    architecture: Architecture = field(compare=False)

    @property
    def layout(self) -> Layout:
        return self.entry.layout

    def shard_shape(self, tensor: int, padded_vocab_size: int) -> tuple[int, ...]:
        """Shape of a rank's shard where `tensor` ranks share the parameter."""
        first, *rest = self.pieces[0].shape
        if self.layout is Layout.REPLICATED:
            return (first, *rest)
        if self.layout is Layout.ROW:
            return (first, rest[0] // tensor)
        if self.layout is Layout.VOCABULARY:
            return (padded_vocab_size // tensor, *rest)
        return (sum(piece.shape[0] for piece in self.pieces) // tensor, *rest)

    def slabs(self, rank: int, tensor: int, padded_vocab_size: int) -> list[Slab]:
        """What rank `rank` of `tensor` holds of each piece."""
        groups = self.architecture.num_query_groups // tensor if self.layout is Layout.QUERY_GROUPS else 1
        slabs, offset = [], 0
        for piece in self.pieces:
            axis = self.layout.axis or 0
            size = piece.shape[axis]
            start, stop = 0, size
            if self.layout is Layout.VOCABULARY:
                share = padded_vocab_size // tensor
                start, stop = min(rank * share, size), min((rank + 1) * share, size)
            elif self.layout.axis is not None:
                start, stop = rank * size // tensor, (rank + 1) * size // tensor
            rows = (stop - start if axis == 0 else piece.shape[0]) // groups
            slabs.append(Slab(piece, axis, start, stop, groups, offset, rows))
            offset += rows
        return slabs

    def assemble(self, shards: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face tensors from the shards of all ranks, [ranks, *shard_shape]; views where possible."""
        if self.layout is Layout.REPLICATED:
            yield self.pieces[0].name, shards[0]
        elif self.layout is Layout.ROW:
            yield self.pieces[0].name, shards.transpose(0, 1).reshape(self.pieces[0].shape)
        elif self.layout is Layout.VOCABULARY:
            yield self.pieces[0].name, shards.flatten(0, 1)[: self.pieces[0].shape[0]]
        else:
            tensor = shards.shape[0]
            groups = self.architecture.num_query_groups if self.layout is Layout.QUERY_GROUPS else tensor
            grouped = shards.reshape(groups, -1, *shards.shape[2:])
            sizes = [piece.shape[0] // groups for piece in self.pieces]
            for piece, part in zip(self.pieces, grouped.split(sizes, dim=1), strict=True):
                yield piece.name, part.reshape(piece.shape)

    def chunks(self, key: str, tensor: int, padded_vocab_size: int) -> list[Chunk]:
        """The blocks that make up the parameter in a `torch_dist` checkpoint whose writer split it `tensor` ways.

        In the checkpoint it is one tensor, its shard at tensor parallel size 1. Each rank's shard is a block of
        it, but for `Layout.COLUMN`, where each piece of each shard is one: the whole pieces follow each other.

        Args:
            key: one of its entry's `checkpoint_keys`.
        """
        lead: tuple[int, ...] = ()
        axes: tuple[int, ...] = ()
        for index, size in ((self.layer, self.architecture.num_layers), (self.expert, self.architecture.num_experts)):
            if index is not None:
                lead, axes = (*lead, index), (*axes, size)
        axis, whole = self.layout.axis or 0, self.shard_shape(1, padded_vocab_size)
        chunks = []

        def add(start: int, shape: tuple[int, ...], slabs: Sequence[Slab]) -> None:
            offsets = [0] * len(whole)
            offsets[axis] = start
            chunks.append(Chunk(key, (*lead, *offsets), (*axes, *whole), shape, tuple(slabs)))

        for rank in range(1 if self.layout is Layout.REPLICATED else tensor):
            slabs = self.slabs(rank, tensor, padded_vocab_size)
            if self.layout is Layout.COLUMN:
                before = 0
                for slab in slabs:
                    add(before + slab.start, slab.shape, [replace(slab, offset=0)])
                    before += slab.piece.shape[0]
            else:
                shape = self.shard_shape(tensor, padded_vocab_size)
                add(rank * shape[axis], shape, slabs)
        return chunks

    def owner(self, layout: ParallelLayout) -> Owner:
        """The ranks that hold it where layers and experts are dealt out evenly, as Megatron does by default.

        With virtual pipeline parallelism, consecutive parts of the model go to consecutive stages in turn.
        """
        stages = layout.pipeline * layout.virtual_pipeline
        part = stages - 1 if self.entry in AFTER_LAYERS else 0
        if self.layer is not None:
            part = self.layer * stages // self.architecture.num_layers
        expert = None if self.expert is None else self.expert * layout.expert // self.architecture.num_experts
        return Owner(part % layout.pipeline, part // layout.pipeline, expert)


def parameters(architecture: Architecture) -> Iterator[Parameter]:
    """Every parameter of the model, in the order of the forward pass, second holders included."""
    placed: list[tuple[Entry, int | None]] = [(entry, None) for entry in BEFORE_LAYERS]
    placed += [(entry, layer) for layer in range(architecture.num_layers) for entry in architecture.family.layer]
    placed += [(entry, None) for entry in AFTER_LAYERS]
    for entry, layer in placed:
        if entry.only_if is not None and not getattr(architecture, entry.only_if):
            continue
        for expert in range(architecture.num_experts) if entry.per_expert else [None]:
            pieces = tuple(
                Piece(
                    name.format(layer=layer, expert=expert),
                    tuple(getattr(architecture, size) for size in sizes),
                )
                for name, *sizes in entry.pieces
            )
            yield Parameter(entry, layer, expert, pieces, architecture)


def owned_parameters(architecture: Architecture) -> list[Parameter]:
    """Every parameter once: those whose pieces make up the Hugging Face folder."""
    return [parameter for parameter in parameters(architecture) if not parameter.entry.duplicate]


def split_alike(architecture: Architecture, layout: ParallelLayout, engine_tensor: int, quantized: bool) -> bool:
    """Whether each rank's shards are what its rollout engine keeps on that rank.

    Not of experts, whose weights vLLM stacks and may lay out for a kernel, nor where it quantizes them.
    """
    return layout == ParallelLayout(tensor=engine_tensor) and not architecture.num_experts and not quantized


@functools.cache
def parameter_count(architecture: Architecture) -> int:
    """Number of weights in the Hugging Face folder; tied embeddings count once, padding never."""
    return sum(math.prod(piece.shape) for parameter in owned_parameters(architecture) for piece in parameter.pieces)

"""The weights of a Megatron model: loaded from a Hugging Face folder, exported to it, and digested."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_sgopd.errors import ConfigError, some
from megatron_sgopd.models.architecture import Architecture
from megatron_sgopd.models.digests import ALL_ROWS, Rows, digest_of, grouped_digest
from megatron_sgopd.models.families.base import Layout
from megatron_sgopd.models.huggingface import HuggingFaceWeights
from megatron_sgopd.models.transfers import Source, carry_out, plan_transfers
from megatron_sgopd.models.weight_map import Parameter, Slab, in_sequence, owned_parameters, parameters

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.process_groups_config import ProcessGroupCollection


# ---- Models ---------------------------------------------------------------------------------------------


def _bind(model: GPTModel, architecture: Architecture, groups: ProcessGroupCollection) -> dict[Parameter, torch.Tensor]:
    """The model's tensor for each parameter that this rank holds all or a shard of.

    Raises:
        ConfigError: the model has a parameter that the table does not know, or one of another shape.
    """
    unbound = dict(model.named_parameters())
    local_layer = {layer.layer_number - 1: index for index, layer in enumerate(model.decoder.layers)}
    experts_here = architecture.num_experts // groups.ep.size()
    first_expert = groups.ep.rank() * experts_here
    bound = {}
    for parameter in parameters(architecture):
        if parameter.layer is not None and parameter.layer not in local_layer:
            continue
        expert = None if parameter.expert is None else parameter.expert - first_expert
        if expert is not None and not 0 <= expert < experts_here:
            continue
        for template in (parameter.entry.local, parameter.entry.transformer_engine):
            name = (template or "").format(layer=local_layer.get(parameter.layer), expert=expert)
            if name not in unbound:
                continue
            weight = unbound.pop(name).detach()
            shape = parameter.shard_shape(_shard_group(parameter, groups).size(), model.vocab_size)
            if tuple(weight.shape) != shape:
                raise ConfigError(
                    f"the Megatron model's {name} has shape {tuple(weight.shape)}, and {architecture.folder} "
                    f"needs {shape}: build the model from this folder"
                )
            bound[parameter] = weight
    if unbound:
        raise ConfigError(
            f"the Megatron model has parameters that a {architecture.model_type} model has not: {some(unbound)}"
        )
    return bound


def _shard_group(parameter: Parameter, groups: ProcessGroupCollection) -> dist.ProcessGroup:
    """The ranks that share a parameter by tensor parallelism, of which experts may have one of their own."""
    return groups.tp if parameter.expert is None else groups.expt_tp


def _slabs(parameter: Parameter, groups: ProcessGroupCollection, padded_vocab_size: int) -> list[Slab]:
    """What this rank's shard of a parameter holds."""
    group = _shard_group(parameter, groups)
    return parameter.slabs(group.rank(), group.size(), padded_vocab_size)


# ---- Loading --------------------------------------------------------------------------------------------


def load_weights(model: GPTModel, architecture: Architecture, groups: ProcessGroupCollection) -> int:
    """Fill `model` from its Hugging Face folder; each rank reads only the slabs that it holds.

    BF16, F16 and F32 on disk become the parameter's dtype; rows that pad the vocabulary become zero.

    Returns:
        The bytes that this rank read.

    Raises:
        ConfigError: a file cannot be read, or a tensor is missing, superfluous, or of another shape or dtype.
    """
    with HuggingFaceWeights(architecture) as weights:
        for parameter, weight in _bind(model, architecture, groups).items():
            weights.fill(_slabs(parameter, groups, model.vocab_size), weight)
        return weights.bytes_read


def fill_whole_model(
    model: GPTModel,
    architecture: Architecture,
    groups: ProcessGroupCollection,
    fill: Callable[[Parameter, torch.Tensor], None],
) -> None:
    """Let `fill` set each weight of a model that is not split over ranks."""
    for parameter, weight in _bind(model, architecture, groups).items():
        fill(parameter, weight)


# ---- Exporting ------------------------------------------------------------------------------------------

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def export_weights(
    model: GPTModel, architecture: Architecture, groups: ProcessGroupCollection, memory_bytes: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Stream the whole model under Hugging Face names, in the same order to every rank of the model.

    Collective: every rank must take every tensor. Order: embedding, layers, final norm, output layer (none
    where tied). A tensor stays valid after the next one is asked for, and may be a view of others' memory or of the
    model's own weight: it must not be written to, and holding one holds its transfer.

    Args:
        memory_bytes: what the tensors that are on their way may take; see `plan_transfers`.
    """
    held = _bind(model, architecture, groups)
    sources = _sources(architecture, held, groups)
    sizes = groups.tp.size(), groups.expt_tp.size()
    for transfer in plan_transfers(sources, *sizes, model.vocab_size, memory_bytes):
        yield from carry_out(transfer, held, groups, _device(model))


def _sources(
    architecture: Architecture, held: Mapping[Parameter, torch.Tensor], groups: ProcessGroupCollection
) -> Iterator[tuple[Parameter, Source]]:
    """Each parameter with its source, which only the ranks that hold it know by themselves."""
    owned = owned_parameters(architecture)
    kinds = len(_DTYPES)

    def code(parameter: Parameter) -> int:
        if parameter not in held:
            return 0
        expert_rank = 0 if parameter.expert is None else groups.ep.rank()
        place = groups.pp.rank() * groups.ep.size() + expert_rank
        return 1 + place * kinds + _DTYPES.index(held[parameter].dtype)

    device = next(iter(held.values())).device
    shared = torch.tensor([code(parameter) for parameter in owned], dtype=torch.int64, device=device)
    for group in (groups.ep, groups.pp):
        if group.size() > 1:
            dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=group)
    for parameter, number in zip(owned, shared.tolist(), strict=True):
        assert number, f"no rank holds {parameter.pieces[0].name}"
        place, dtype = divmod(number - 1, kinds)
        stage, expert_rank = divmod(place, groups.ep.size())
        yield parameter, Source(stage, expert_rank, _DTYPES[dtype])


def _device(model: GPTModel) -> torch.device:
    return next(model.parameters()).device


# ---- Into an engine that is split alike -----------------------------------------------------------------

Shards = Mapping[Parameter, Sequence[tuple[Slab, torch.Tensor]]]
"""Of each parameter what a rank holds of its pieces, and the tensor in which each lies."""


def fill_shards(
    model: GPTModel,
    architecture: Architecture,
    groups: ProcessGroupCollection,
    targets: Mapping[Parameter, torch.Tensor],
    memory_bytes: int,
) -> Shards:
    """Copy this rank's shards to where an engine of the same tensor parallelism has its own.

    There is no pipeline, and there are no experts. Pieces follow each other in a target. Nothing is sent but a
    vocabulary that is padded to another length there, whose rows lie on other ranks; this is collective.

    Args:
        memory_bytes: what the tensors that are on their way may take; see `plan_transfers`.

    Returns:
        What the targets hold now.
    """
    held = _bind(model, architecture, groups)
    tensor = groups.tp.size()
    filled: dict[Parameter, list[tuple[Slab, torch.Tensor]]] = {}
    sent: dict[str, Parameter] = {}
    for parameter, weight in held.items():
        target = targets[parameter]
        theirs = in_sequence(_slabs(parameter, groups, padded_vocab_size=tensor * target.shape[0]))
        filled[parameter] = [(slab, target) for slab in theirs]
        if parameter.layout is Layout.VOCABULARY:
            target[theirs[0].rows :].zero_()
            if tensor > 1 and target.shape != weight.shape:
                sent[parameter.pieces[0].name] = parameter
                continue
        for ours, slab in zip(_slabs(parameter, groups, model.vocab_size), theirs, strict=True):
            source = ours.view(weight)
            slab.view(target).view(source.shape).copy_(source)
    sources = [(parameter, Source(0, 0, held[parameter].dtype)) for parameter in sent.values()]
    for transfer in plan_transfers(sources, tensor, 1, model.vocab_size, memory_bytes):
        for name, whole in carry_out(transfer, held, groups, _device(model)):
            [(slab, target)] = filled[sent[name]]
            slab.view(target)[0].copy_(whole[slab.start : slab.stop])
    return filled


# ---- Digests --------------------------------------------------------------------------------------------


def shard_digests(
    model: GPTModel, architecture: Architecture, groups: ProcessGroupCollection, rows: Rows = ALL_ROWS
) -> dict[str, int]:
    """`tensor_digest` of every tensor that `export_weights` yields, from the shards where they are.

    Collective; all ranks get the same answer, in the order of export. A replicated parameter is read on the
    first tensor-parallel rank, and tied embeddings on the first stage.
    """
    held = {
        parameter: [(slab, weight) for slab in _slabs(parameter, groups, model.vocab_size)]
        for parameter, weight in _bind(model, architecture, groups).items()
    }
    return digests_of_shards(held, architecture, groups, rows)


def digests_of_shards(
    held: Shards, architecture: Architecture, groups: ProcessGroupCollection, rows: Rows
) -> dict[str, int]:
    """Likewise of shards that lie anywhere on the ranks of a model. Collective."""
    device = next(iter(held.values()))[0][1].device
    nothing = torch.zeros(2, dtype=torch.int64, device=device)
    owned = owned_parameters(architecture)
    found: dict[str, list[int]] = {}
    for of_experts, reduced in ((False, (groups.tp, groups.pp)), (True, (groups.expt_tp, groups.ep, groups.pp))):
        members = [parameter for parameter in owned if (parameter.expert is not None) is of_experts]
        if members:
            parts = {
                slab.piece.name: grouped_digest(slab.view(tensor), slab.piece.shape, slab.axis, slab.start, rows)
                for parameter in members
                if parameter.layout is not Layout.REPLICATED or reduced[0].rank() == 0
                for slab, tensor in held.get(parameter, ())
            }
            names = [piece.name for parameter in members for piece in parameter.pieces]
            total = torch.stack([parts.get(name, nothing) for name in names])
            for group in reduced:
                if group.size() > 1:
                    dist.all_reduce(total, group=group)
            found |= zip(names, total.tolist(), strict=True)
    return {piece.name: digest_of(found[piece.name]) for parameter in owned for piece in parameter.pieces}

"""Names, shapes and shards of a model's weights: one table, and everything that follows from it.

The table has an entry for each Megatron parameter: the Hugging Face tensors ("pieces") it is made of, how
tensor parallelism splits it, and its name in Megatron's local and Transformer Engine layers. A rank's share
of a piece is always one slab: a range along one axis. Loading, exporting, digests and counts differ only in
what they do with slabs.
"""

from __future__ import annotations

import contextlib
import enum
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.models.architecture import INDEX_FILE, SINGLE_FILE, Architecture

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


class Layout(enum.Enum):
    """How a parameter is split over the ranks of tensor parallelism, and how its pieces lie in a shard."""

    REPLICATED = "each rank holds all of it"
    COLUMN = "axis 0 of each piece is split; in a shard the pieces follow each other (gate, up)"
    QUERY_GROUPS = "axis 0 of each piece is split; in a shard each query group has its rows of q, k, v"
    ROW = "axis 1 is split"
    VOCABULARY = "axis 0 is split, after rows of zeros that pad the vocabulary"

    @property
    def axis(self) -> int | None:
        """The split axis of a piece."""
        return {Layout.REPLICATED: None, Layout.ROW: 1}.get(self, 0)


@dataclass(frozen=True)
class _Entry:
    """A Megatron parameter, or the same one of every layer where the names have `{layer}`."""

    local: str
    layout: Layout
    pieces: tuple[tuple[str, ...], ...]
    """Of each Hugging Face tensor the name, then its shape in names of `Architecture`'s sizes."""
    transformer_engine: str | None = None
    """Where it differs from the local name."""
    only_if: str | None = None
    """The flag of `Architecture` without which the parameter does not exist."""
    duplicate: bool = False
    """A second holder of tensors that another entry owns: loaded, never exported, digested or counted."""


_MEGATRON = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."
_EMBEDDING = ("model.embed_tokens.weight", "vocab_size", "hidden_size")

# In the order of the forward pass, which is the order of export.
_BEFORE = (_Entry("embedding.word_embeddings.weight", Layout.VOCABULARY, (_EMBEDDING,)),)
_LAYER = (
    _Entry(
        _MEGATRON + "input_layernorm.weight",
        Layout.REPLICATED,
        ((_HF + "input_layernorm.weight", "hidden_size"),),
        transformer_engine=_MEGATRON + "self_attention.linear_qkv.layer_norm_weight",
    ),
    _Entry(
        _MEGATRON + "self_attention.linear_qkv.weight",
        Layout.QUERY_GROUPS,
        (
            (_HF + "self_attn.q_proj.weight", "query_size", "hidden_size"),
            (_HF + "self_attn.k_proj.weight", "key_size", "hidden_size"),
            (_HF + "self_attn.v_proj.weight", "key_size", "hidden_size"),
        ),
    ),
    _Entry(
        _MEGATRON + "self_attention.linear_qkv.bias",
        Layout.QUERY_GROUPS,
        (
            (_HF + "self_attn.q_proj.bias", "query_size"),
            (_HF + "self_attn.k_proj.bias", "key_size"),
            (_HF + "self_attn.v_proj.bias", "key_size"),
        ),
        only_if="qkv_bias",
    ),
    _Entry(
        _MEGATRON + "self_attention.q_layernorm.weight",
        Layout.REPLICATED,
        ((_HF + "self_attn.q_norm.weight", "head_dim"),),
        only_if="qk_norm",
    ),
    _Entry(
        _MEGATRON + "self_attention.k_layernorm.weight",
        Layout.REPLICATED,
        ((_HF + "self_attn.k_norm.weight", "head_dim"),),
        only_if="qk_norm",
    ),
    _Entry(
        _MEGATRON + "self_attention.linear_proj.weight",
        Layout.ROW,
        ((_HF + "self_attn.o_proj.weight", "hidden_size", "query_size"),),
    ),
    _Entry(
        _MEGATRON + "pre_mlp_layernorm.weight",
        Layout.REPLICATED,
        ((_HF + "post_attention_layernorm.weight", "hidden_size"),),
        transformer_engine=_MEGATRON + "mlp.linear_fc1.layer_norm_weight",
    ),
    _Entry(
        _MEGATRON + "mlp.linear_fc1.weight",
        Layout.COLUMN,
        (
            (_HF + "mlp.gate_proj.weight", "ffn_hidden_size", "hidden_size"),
            (_HF + "mlp.up_proj.weight", "ffn_hidden_size", "hidden_size"),
        ),
    ),
    _Entry(
        _MEGATRON + "mlp.linear_fc2.weight",
        Layout.ROW,
        ((_HF + "mlp.down_proj.weight", "hidden_size", "ffn_hidden_size"),),
    ),
)
_AFTER = (
    _Entry("decoder.final_layernorm.weight", Layout.REPLICATED, (("model.norm.weight", "hidden_size"),)),
    _Entry(
        "output_layer.weight",
        Layout.VOCABULARY,
        (("lm_head.weight", "vocab_size", "hidden_size"),),
        only_if="untied_embeddings",
    ),
    # The last pipeline stage's copy of tied embeddings; a stage that has the embedding uses that one.
    _Entry("output_layer.weight", Layout.VOCABULARY, (_EMBEDDING,), only_if="tied_embeddings", duplicate=True),
)


# ---- Shapes: pure functions of the table, the architecture and the layout -------------------------------


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

    def view(self, shard: torch.Tensor) -> torch.Tensor:
        """The slab inside `shard`, without a copy: [groups, rows, *rest]."""
        grouped = shard.view(self.groups, -1, *shard.shape[1:])
        return grouped[:, self.offset : self.offset + self.rows]


@dataclass(frozen=True)
class Parameter:
    """One Megatron parameter of the whole model."""

    entry: _Entry
    layer: int | None
    """The layer's number in the model, from 0."""
    pieces: tuple[Piece, ...]
    query_groups: int

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
        groups = self.query_groups // tensor if self.layout is Layout.QUERY_GROUPS else 1
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
            groups = self.query_groups if self.layout is Layout.QUERY_GROUPS else tensor
            grouped = shards.reshape(groups, -1, *shards.shape[2:])
            sizes = [piece.shape[0] // groups for piece in self.pieces]
            for piece, part in zip(self.pieces, grouped.split(sizes, dim=1), strict=True):
                yield piece.name, part.reshape(piece.shape)


def parameters(architecture: Architecture) -> Iterator[Parameter]:
    """Every parameter of the model, in the order of the forward pass."""
    placed: list[tuple[_Entry, int | None]] = [(entry, None) for entry in _BEFORE]
    placed += [(entry, layer) for layer in range(architecture.num_layers) for entry in _LAYER]
    placed += [(entry, None) for entry in _AFTER]
    for entry, layer in placed:
        if entry.only_if is None or getattr(architecture, entry.only_if):
            pieces = tuple(
                Piece(name.format(layer=layer), tuple(getattr(architecture, size) for size in sizes))
                for name, *sizes in entry.pieces
            )
            yield Parameter(entry, layer, pieces, architecture.num_query_groups)


def _owned(architecture: Architecture) -> list[Parameter]:
    return [parameter for parameter in parameters(architecture) if not parameter.entry.duplicate]


def parameter_count(architecture: Architecture) -> int:
    """Number of weights in the Hugging Face folder; tied embeddings count once, padding never."""
    return sum(math.prod(piece.shape) for parameter in _owned(architecture) for piece in parameter.pieces)


# ---- Models ---------------------------------------------------------------------------------------------


def _bind(model: GPTModel, architecture: Architecture, tensor: int) -> dict[Parameter, torch.Tensor]:
    """The model's tensor for each parameter that this pipeline stage holds.

    Raises:
        ConfigError: the model has a parameter that the table does not know, or one of another shape.
    """
    unbound = dict(model.named_parameters())
    local_index = {layer.layer_number - 1: index for index, layer in enumerate(model.decoder.layers)}
    bound = {}
    for parameter in parameters(architecture):
        entry = parameter.entry
        for template in (entry.local, entry.transformer_engine):
            if template is None or (parameter.layer is not None and parameter.layer not in local_index):
                continue
            name = template.format(layer=local_index.get(parameter.layer))
            if name not in unbound:
                continue
            weight = unbound.pop(name).detach()
            shape = parameter.shard_shape(tensor, model.vocab_size)
            if tuple(weight.shape) != shape:
                raise ConfigError(
                    f"the Megatron model's {name} has shape {tuple(weight.shape)}, and {architecture.folder} "
                    f"needs {shape}: build the model from this folder"
                )
            bound[parameter] = weight
    if unbound:
        raise ConfigError(
            f"the Megatron model has parameters that a {architecture.model_type} model has not: {_some(unbound)}"
        )
    return bound


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ---- Loading --------------------------------------------------------------------------------------------


def load_weights(model: GPTModel, architecture: Architecture, tp_group: dist.ProcessGroup) -> None:
    """Fill `model` from its Hugging Face folder; each rank reads only the slabs that it holds.

    BF16, F16 and F32 on disk become the parameter's dtype; rows that pad the vocabulary become zero.

    Raises:
        ConfigError: a file cannot be read, or a tensor is missing, superfluous, or of another shape or dtype.
    """
    tensor, rank = tp_group.size(), tp_group.rank()
    with contextlib.ExitStack() as stack:
        files = _open_folder(architecture, stack)
        for parameter, weight in _bind(model, architecture, tensor).items():
            for slab in parameter.slabs(rank, tensor, model.vocab_size):
                file = files[slab.piece.name].get_slice(slab.piece.name)
                span = slice(slab.start, slab.stop)
                read = file[span] if slab.axis == 0 else file[:, span]
                target = slab.view(weight)
                target.copy_(read.view(target.shape))
            if parameter.layout is Layout.VOCABULARY:
                weight[slab.stop - slab.start :].zero_()


def _open_folder(architecture: Architecture, stack: contextlib.ExitStack) -> dict[str, Any]:
    """The open file of each tensor, after the headers of all were checked against the table."""
    folder = architecture.folder
    index = None if (folder / SINGLE_FILE).is_file() else _read_index(folder / INDEX_FILE)
    found, files = {}, {}
    for name in sorted(set(index.values())) if index else [SINGLE_FILE]:
        try:
            file = stack.enter_context(safe_open(folder / name, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{folder / name} cannot be read as safetensors: {error}") from error
        for key in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
            found[key], files[key] = name, file
    if index is not None and index != found:
        wrong = {key for key in index.keys() | found.keys() if index.get(key) != found.get(key)}
        raise ConfigError(f"{folder / INDEX_FILE} does not say where these tensors are: {_some(wrong)}")

    pieces = [piece for parameter in _owned(architecture) for piece in parameter.pieces]
    expected = {piece.name for piece in pieces}
    missing = expected - files.keys()
    # Transformers wrote these constants beside the weights once, and ignores them now.
    superfluous = {key for key in files.keys() - expected if not key.endswith(".rotary_emb.inv_freq")}
    if missing or superfluous:
        faults = [f"lack {_some(missing)}"] * bool(missing)
        faults += [f"hold {_some(superfluous)} beyond its config.json"] * bool(superfluous)
        raise ConfigError(f"the safetensors of {folder} {' and '.join(faults)}: give a complete folder")
    for piece in pieces:
        header = files[piece.name].get_slice(piece.name)
        if tuple(header.get_shape()) != piece.shape:
            raise ConfigError(
                f"{piece.name} in {folder} has shape {tuple(header.get_shape())}, "
                f"and its config.json makes it {piece.shape}"
            )
        if header.get_dtype() not in ("BF16", "F16", "F32"):
            raise ConfigError(f"{piece.name} in {folder} is {header.get_dtype()}: only BF16, F16 and F32 can be loaded")
    return files


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        placed = {str(key): str(file) for key, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read as an index of safetensors: {error!r}") from error
    outside = [file for file in placed.values() if Path(file).name != file]
    if outside:
        raise ConfigError(f"{path} names files outside its folder: {_some(outside)}")
    return placed


# ---- Exporting ------------------------------------------------------------------------------------------

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class _Bucket:
    """Parameters of one stage and dtype that travel together."""

    stage: int
    dtype: torch.dtype
    members: list[Parameter]
    nbytes: int


def export_weights(
    model: GPTModel,
    architecture: Architecture,
    tp_group: dist.ProcessGroup,
    pp_group: dist.ProcessGroup,
    bucket_bytes: int,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Stream the whole model under Hugging Face names, in the same order to every rank of both groups.

    Collective: every rank must take every tensor. Order: embedding, layers, final norm, output layer (none
    where tied). A tensor stays valid after the next one is asked for; without parallelism, or where a
    tensor arrives alone, it may be a view of the model's own weight, so it must not be written to. Each
    shard first crosses the pipeline, then its tensor-parallel ranks gather it: the slow links between
    stages carry 1/TP of the bytes.

    Args:
        bucket_bytes: limit of the gathered bytes of one collective; a larger parameter travels alone.
    """
    tensor, stages = tp_group.size(), pp_group.size()
    held = _bind(model, architecture, tensor)
    for bucket in _buckets(architecture, held, tp_group, pp_group, model.vocab_size, bucket_bytes):
        shapes = [member.shard_shape(tensor, model.vocab_size) for member in bucket.members]
        if tensor == stages == 1:
            for member in bucket.members:
                yield from member.assemble(held[member][None])
            continue
        sizes = [math.prod(shape) for shape in shapes]
        if pp_group.rank() == bucket.stage:
            flat = [held[member].flatten() for member in bucket.members]
            packed = flat[0] if len(flat) == 1 else torch.cat(flat)
        else:
            packed = torch.empty(sum(sizes), dtype=bucket.dtype, device=_device(model))
        if stages > 1:
            dist.broadcast(packed, group=pp_group, group_src=bucket.stage)
        if tensor > 1:
            gathered = packed.new_empty(tensor * packed.numel())
            dist.all_gather_into_tensor(gathered, packed, group=tp_group)
            packed = gathered
        parts = packed.view(tensor, -1).split(sizes, dim=1)
        for member, shape, part in zip(bucket.members, shapes, parts, strict=True):
            yield from member.assemble(part.unflatten(1, shape))


def _buckets(
    architecture: Architecture,
    held: Mapping[Parameter, torch.Tensor],
    tp_group: dist.ProcessGroup,
    pp_group: dist.ProcessGroup,
    padded_vocab_size: int,
    bucket_bytes: int,
) -> list[_Bucket]:
    """Consecutive parameters of one stage and dtype, up to `bucket_bytes` together."""
    buckets: list[_Bucket] = []
    for parameter, stage, dtype in _holders(architecture, held, pp_group):
        shape = parameter.shard_shape(tp_group.size(), padded_vocab_size)
        nbytes = tp_group.size() * math.prod(shape) * dtype.itemsize
        last = buckets[-1] if buckets else None
        if last and (last.stage, last.dtype) == (stage, dtype) and last.nbytes + nbytes <= bucket_bytes:
            last.members.append(parameter)
            last.nbytes += nbytes
        else:
            buckets.append(_Bucket(stage, dtype, [parameter], nbytes))
    return buckets


def _holders(
    architecture: Architecture, held: Mapping[Parameter, torch.Tensor], pp_group: dist.ProcessGroup
) -> Iterator[tuple[Parameter, int, torch.dtype]]:
    """Each parameter with its pipeline stage and dtype, which only that stage knows by itself."""
    owned = _owned(architecture)
    codes = [
        1 + pp_group.rank() * len(_DTYPES) + _DTYPES.index(held[parameter].dtype) if parameter in held else 0
        for parameter in owned
    ]
    device = next(iter(held.values())).device
    shared = torch.tensor(codes, dtype=torch.int64, device=device)
    if pp_group.size() > 1:
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=pp_group)
    for parameter, code in zip(owned, shared.tolist(), strict=True):
        assert code, f"no pipeline stage holds {parameter.pieces[0].name}"
        stage, dtype = divmod(code - 1, len(_DTYPES))
        yield parameter, stage, _DTYPES[dtype]


def _device(model: GPTModel) -> torch.device:
    return next(model.parameters()).device


# ---- Digests --------------------------------------------------------------------------------------------

_CHUNK = 1 << 20  # elements hashed at a time: 8 MiB of int64 for each of two temporaries
_MASK = (1 << 64) - 1


def tensor_digest(tensor: torch.Tensor) -> int:
    """A 64-bit digest of a tensor's bits and their order: equal tensors of one dtype have equal digests,
    and others the same one with a chance of about 2^-64.

    digest = sum over i of mix((i + 1) 2^32 + bits_i) mod 2^64, mix being the bijective finalizer of
    SplitMix64 (Steele, Lea and Flood, 2014), i the flat index: a sum over parts is the digest of the whole.
    """
    return slab_digest(tensor, tuple(tensor.shape), axis=0, start=0)


def slab_digest(slab: torch.Tensor, shape: Sequence[int], axis: int, start: int) -> int:
    """The part of `tensor_digest` that belongs to `tensor[start:...]` along `axis` (0 or 1), where `tensor`
    has shape `shape`: modulo 2^64, the digests of slabs that tile a tensor add up to its own."""
    return int(_digest(slab[None], shape, axis, start)) & _MASK


def shard_digests(
    model: GPTModel, architecture: Architecture, tp_group: dist.ProcessGroup, pp_group: dist.ProcessGroup
) -> dict[str, int]:
    """`tensor_digest` of every tensor that `export_weights` yields, from the shards where they are.

    Collective; all ranks get the same answer, in the order of export. A replicated parameter is read on the
    first tensor-parallel rank, and tied embeddings on the first stage.
    """
    tensor, rank = tp_group.size(), tp_group.rank()
    held = _bind(model, architecture, tensor)
    names, digests = [], []
    nothing = torch.zeros((), dtype=torch.int64, device=_device(model))
    for parameter in _owned(architecture):
        counts = parameter in held and (rank == 0 or parameter.layout is not Layout.REPLICATED)
        for slab in parameter.slabs(rank, tensor, model.vocab_size):
            names.append(slab.piece.name)
            digests.append(
                _digest(slab.view(held[parameter]), slab.piece.shape, slab.axis, slab.start) if counts else nothing
            )
    total = torch.stack(digests)
    for group in (tp_group, pp_group):
        if group.size() > 1:
            dist.all_reduce(total, group=group)
    return {name: digest & _MASK for name, digest in zip(names, total.tolist(), strict=True)}


def _digest(grouped: torch.Tensor, shape: Sequence[int], axis: int, start: int) -> torch.Tensor:
    """Digest of a slab seen as [groups, rows, *rest], int64 scalar on the slab's device."""
    assert math.prod(shape) < 1 << 32, "indices of larger tensors do not fit the digest"
    width = math.prod(shape[1:])
    first_row, first_column = (start, 0) if axis == 0 else (0, start)
    total = torch.zeros((), dtype=torch.int64, device=grouped.device)
    for group, rows in enumerate(grouped.detach()):
        if not rows.numel():
            continue
        matrix = rows.reshape(rows.shape[0], -1)
        columns = torch.arange(matrix.shape[1], device=grouped.device) + (first_column + 1)
        step = max(1, _CHUNK // matrix.shape[1])
        for begin in range(0, matrix.shape[0], step):
            chunk = matrix[begin : begin + step]
            numbers = torch.arange(begin, begin + chunk.shape[0], device=grouped.device)
            numbers += first_row + group * matrix.shape[0]
            hashes = (numbers[:, None] * width + columns) << 32
            hashes |= _bits(chunk)
            total += _mix(hashes).sum()
    return total


def _bits(values: torch.Tensor) -> torch.Tensor:
    """The bit patterns of 16- or 32-bit numbers as int64 in [0, 2^32)."""
    signed = {2: torch.int16, 4: torch.int32}[values.dtype.itemsize]
    return values.view(signed).to(torch.int64).bitwise_and_((1 << 8 * values.dtype.itemsize) - 1)


def _mix(numbers: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer, in place on int64; products wrap modulo 2^64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        shifted = numbers >> shift
        numbers ^= shifted.bitwise_and_((1 << (64 - shift)) - 1)  # int64 shifts copy the sign bit
        if factor != 1:
            numbers *= factor - (1 << 64)
    return numbers

"""Shapes, shards and digests as pure functions of table and layout; real models: tests/distributed."""

import dataclasses
import shutil
import unittest.mock
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.models.architecture import Architecture, read_architecture
from megatron_sgopd.models.digests import Rows, digest_of, grouped_digest, tensor_digest
from megatron_sgopd.models.families import FAMILIES
from megatron_sgopd.models.families.base import Layout
from megatron_sgopd.models.huggingface import HuggingFaceWeights
from megatron_sgopd.models.weight_map import (
    Chunk,
    Owner,
    ParallelLayout,
    Parameter,
    owned_parameters,
    parameter_count,
    parameters,
)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Architecture, int, int]:
    """A random architecture of few weights, a tensor parallel size that divides it, a padded vocabulary."""
    size = st.integers(1, 3)
    tensor = draw(st.integers(1, 4))
    groups = tensor * draw(size)
    vocab_size = draw(st.integers(1, 9))
    family = draw(st.sampled_from(list(FAMILIES.values())))
    architecture = Architecture(
        folder=Path("unused"),
        model_type=family.model_type,
        num_layers=draw(size),
        hidden_size=draw(st.integers(1, 7)),
        ffn_hidden_size=tensor * draw(size),
        num_attention_heads=groups * draw(size),
        num_query_groups=groups,
        head_dim=2 * draw(size),
        vocab_size=vocab_size,
        max_position_embeddings=8,
        norm_epsilon=1e-6,
        tied_embeddings=draw(st.booleans()),
        rope_type="default",
        rope_theta=10000.0,
        num_experts=draw(st.integers(1, 4)) if family.has_experts else 0,
    )
    architecture.check_parallel(tensor, 1)
    multiple = tensor * draw(size)
    padded_vocab_size = -(-vocab_size // multiple) * multiple
    return architecture, tensor, padded_vocab_size


def _numbered(parameter: Parameter) -> list[torch.Tensor]:
    """The parameter's pieces with every element different, and none zero."""
    pieces, first = [], 1
    for piece in parameter.pieces:
        pieces.append(torch.arange(first, first + torch.Size(piece.shape).numel()).view(piece.shape))
        first += pieces[-1].numel()
    return pieces


@given(layouts())
def test_shards_tile_every_tensor_exactly_once(layout: tuple[Architecture, int, int]) -> None:
    architecture, tensor, padded_vocab_size = layout
    for parameter in parameters(architecture):
        pieces = _numbered(parameter)
        covered = [torch.zeros_like(piece) for piece in pieces]
        shards = []
        for rank in range(tensor):
            shard = torch.full(parameter.shard_shape(tensor, padded_vocab_size), -1)
            slabs = parameter.slabs(rank, tensor, padded_vocab_size)
            for slab, piece, count in zip(slabs, pieces, covered, strict=True):
                span = piece.narrow(slab.axis, slab.start, slab.stop - slab.start)
                count.narrow(slab.axis, slab.start, slab.stop - slab.start).add_(1)
                view = slab.view(shard)
                assert (view == -1).all()  # no two slabs share a place in the shard
                view.copy_(span.reshape(view.shape))
            padding = shard == -1
            assert parameter.layout is Layout.VOCABULARY or not padding.any()
            shards.append(shard.masked_fill(padding, 0))
        copies = tensor if parameter.layout is Layout.REPLICATED else 1
        assert all((count == copies).all() for count in covered)
        assembled = dict(parameter.assemble(torch.stack(shards)))
        for (name, weight), expected in zip(assembled.items(), pieces, strict=True):
            assert torch.equal(weight, expected), name


@given(layouts())
def test_chunks_tile_every_tensor_of_a_checkpoint_exactly_once(layout: tuple[Architecture, int, int]) -> None:
    architecture, tensor, padded_vocab_size = layout
    tensors: dict[str, torch.Tensor] = {}
    for compared, ways in ((False, tensor), (True, 1)):  # written for `tensor` ranks, read as blocks of one
        for parameter in owned_parameters(architecture):
            pieces = {piece.name: values for piece, values in zip(parameter.pieces, _numbered(parameter), strict=True)}
            chunks = [
                c for key in parameter.entry.checkpoint_keys for c in parameter.chunks(key, ways, padded_vocab_size)
            ]
            for chunk in chunks:
                block = _filled(chunk, pieces)
                whole = tensors.setdefault(chunk.key, torch.full(chunk.global_shape, -1))
                place = whole[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))]
                if not compared:
                    assert (place == -1).all()
                    place.copy_(block.view(place.shape))
                assert torch.equal(place, block.view(place.shape))
    assert all((whole != -1).all() for whole in tensors.values())


def _filled(chunk: Chunk, pieces: dict[str, torch.Tensor]) -> torch.Tensor:
    """The chunk with its slabs of `pieces`, and zeros where it pads the vocabulary."""
    block = torch.zeros(chunk.shape, dtype=torch.int64)
    for slab in chunk.slabs:
        span = pieces[slab.piece.name].narrow(slab.axis, slab.start, slab.stop - slab.start)
        view = slab.view(block)
        view.copy_(span.reshape(view.shape))
    return block


@given(layouts(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_every_parameter_has_one_owner(
    layout: tuple[Architecture, int, int], pipeline: int, virtual_pipeline: int, expert: int
) -> None:
    architecture = layout[0]
    stages = pipeline * virtual_pipeline
    architecture = dataclasses.replace(
        architecture,
        num_layers=stages * architecture.num_layers,
        num_experts=expert * architecture.num_experts,
    )
    sizes = ParallelLayout(1, pipeline, virtual_pipeline, expert)
    layers: dict[tuple[int, int], set[int]] = {}
    experts: dict[int, set[int]] = {}
    for parameter in parameters(architecture):
        owner = parameter.owner(sizes)
        if parameter.layer is not None:
            layers.setdefault((owner.virtual_pipeline, owner.pipeline), set()).add(parameter.layer)
        elif parameter.entry.local.startswith("embedding"):
            assert owner == Owner(0, 0, None)
        else:
            assert owner == Owner(pipeline - 1, virtual_pipeline - 1, None)
        if parameter.expert is not None:
            assert owner.expert is not None
            experts.setdefault(owner.expert, set()).add(parameter.expert)
    # Each stage has an equal run of layers, the stages of one virtual part before those of the next.
    share = architecture.num_layers // stages
    assert [sorted(layers[place]) for place in sorted(layers)] == [
        list(range(part * share, (part + 1) * share)) for part in range(stages)
    ]
    if architecture.num_experts:
        share = architecture.num_experts // expert
        assert [sorted(experts[rank]) for rank in range(expert)] == [
            list(range(rank * share, (rank + 1) * share)) for rank in range(expert)
        ]


@unittest.mock.patch("megatron_sgopd.models.digests._SMALL", 0)
@given(layouts(), st.integers(1, 5), st.integers(0, 4))
def test_digests_of_slabs_add_up_to_the_tensor_digest(
    layout: tuple[Architecture, int, int], step: int, first: int
) -> None:
    architecture, tensor, padded_vocab_size = layout
    rows = Rows(step, first % step)
    for parameter in parameters(architecture):
        for index, piece in enumerate(_numbered(parameter)):
            weight = piece.to(torch.float32)
            total = torch.zeros(2, dtype=torch.int64)
            for rank in range(1 if parameter.layout is Layout.REPLICATED else tensor):
                slab = parameter.slabs(rank, tensor, padded_vocab_size)[index]
                span = weight.narrow(slab.axis, slab.start, slab.stop - slab.start)
                total += grouped_digest(span[None], weight.shape, slab.axis, slab.start, rows)
            assert digest_of(total.tolist()) == tensor_digest(weight, rows)


def test_query_groups_lie_in_megatrons_order() -> None:
    # Megatron's fused projection: for each query group, its query heads, its key head, its value head.
    architecture = Architecture(Path("unused"), "llama", 1, 1, 2, 4, 2, 2, 3, 8, 1e-6, True, "default", 1e4)
    [qkv] = [entry for entry in parameters(architecture) if entry.layout is Layout.QUERY_GROUPS]
    query, key, value = _numbered(qkv)
    shard = torch.empty(qkv.shard_shape(1, 4), dtype=torch.int64)
    for slab, piece in zip(qkv.slabs(0, 1, 4), (query, key, value), strict=True):
        view = slab.view(shard)
        view.copy_(piece.view(view.shape))
    expected = torch.cat([query[:4], key[:2], value[:2], query[4:], key[2:], value[2:]])
    assert torch.equal(shard, expected)


def test_the_table_names_and_shapes_what_transformers_saves(tiny_models: dict[str, Path]) -> None:
    for folder in tiny_models.values():
        architecture = read_architecture(folder)
        with safe_open(folder / "model.safetensors", "pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        table = {piece.name: piece.shape for parameter in owned_parameters(architecture) for piece in parameter.pieces}
        assert table == stored
        assert parameter_count(architecture) == sum(torch.Size(shape).numel() for shape in stored.values())


def test_a_tied_models_output_layer_may_be_stored_as_well_if_it_is_the_embedding(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_models["llama_tied"], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    with HuggingFaceWeights(read_architecture(folder)):
        pass
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lm_head.weight that is not its model.embed_tokens.weight"):
        HuggingFaceWeights(read_architecture(folder))


def test_one_models_table_does_not_depend_on_another(tiny_models: dict[str, Path]) -> None:
    tied = read_architecture(tiny_models["llama_tied"])
    before = list(parameters(tied))
    untied = dataclasses.replace(tied, tied_embeddings=False)
    assert [parameter.pieces[0].name for parameter in parameters(untied)].count("lm_head.weight") == 1
    assert list(parameters(tied)) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_change_of_bits_or_order_changes_the_digest(dtype: torch.dtype) -> None:
    weight = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    digests = {tensor_digest(weight), tensor_digest(torch.zeros_like(weight))}
    bits = weight.view({2: torch.int16, 4: torch.int32}[dtype.itemsize])
    for row in range(12):
        for bit in range(8 * dtype.itemsize):
            changed = bits.clone()
            changed[row, row % 5] ^= torch.tensor(1).bitwise_left_shift(bit).to(bits.dtype)
            digests.add(tensor_digest(changed.view(dtype)))
    digests.add(tensor_digest(weight.flip(0)))
    digests.add(tensor_digest(weight.T.contiguous()))
    digests.add(tensor_digest(weight[:-1]))
    negative_zero = torch.zeros_like(weight).neg()
    digests.add(tensor_digest(negative_zero))
    digests.add(tensor_digest(torch.zeros_like(weight)[:-1]))
    assert len(digests) == 2 + 12 * 8 * dtype.itemsize + 5


def test_the_digest_does_not_depend_on_how_the_tensor_lies_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    whole = tensor_digest(weight)
    assert tensor_digest(weight.T.contiguous().T) == whole
    monkeypatch.setattr("megatron_sgopd.models.digests._CHUNK", 7)
    assert tensor_digest(weight) == whole


def test_of_a_large_tensor_a_change_shows_to_those_who_read_its_row() -> None:
    weight = torch.zeros(300, 256)
    changed = weight.clone()
    changed[201, 17] = 1.0
    seen = [
        first
        for first in range(16)
        if tensor_digest(weight, Rows(16, first)) != tensor_digest(changed, Rows(16, first))
    ]
    assert seen == [201 % 16]
    small, first = changed[:250], Rows(16, 0)  # 64,000 elements: read whole
    assert tensor_digest(weight[:250], first) != tensor_digest(small, first)


def test_the_digest_is_the_documented_formula() -> None:
    # From the docstring's equation in Python integers, over one value of each sign.
    def mix(number: int) -> int:
        number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
        return number ^ number >> 31

    def numbers(index: int) -> tuple[int, int]:
        mixed = mix(index)
        return mixed % 2**32 | 1, mixed >> 32 | 1

    bits = [0x3F800000, 0xC0000000]  # 1.0 and -2.0, in two rows of one column
    halves = [
        sum(numbers(2 * row + 1)[k] * numbers(2)[k] * ((word ^ word >> 16) + 1) for row, word in enumerate(bits))
        % 2**32
        for k in range(2)
    ]
    assert tensor_digest(torch.tensor([1.0, -2.0])) == halves[0] << 32 | halves[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_signs_that_change_in_pairs_show(dtype: torch.dtype) -> None:
    # In a linear form mod 2^32 alone, two changes of the highest bit would cancel.
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    digests = {tensor_digest(weight)}
    for first in range(64):
        for second in range(first):
            changed = weight.flatten().clone()
            changed[[first, second]] *= -1
            digests.add(tensor_digest(changed.view(8, 8)))
    assert len(digests) == 1 + 64 * 63 // 2

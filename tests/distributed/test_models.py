"""Models built and loaded from Hugging Face folders, at every layout, against transformers.

One launch of four ranks checks all: importing Megatron takes longer than everything else here.
"""

import contextlib
import dataclasses
import json
import shutil
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks
from megatron_models import OFTEN_AND_ALL, build, each_layout, forward, process_groups
from safetensors.torch import load_file, save_file

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.models.architecture import Architecture, read_architecture

LENGTH = 256  # four times the positions where the fixture's rope scaling starts


@pytest.mark.parametrize("layouts", OFTEN_AND_ALL)
def test_models_equal_transformers_and_export_bit_equal_at_every_layout(
    tiny_models: dict[str, Path], tmp_path: Path, layouts: Any
) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(250, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    reference = {"tokens": tokens}
    for name, folder in tiny_models.items():
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        reference[name] = logits.log_softmax(-1)
    save_file(reference, tmp_path / "reference.safetensors")
    run_ranks(4, _check_models, tiny_models, tmp_path, layouts)


# ---- What each rank does --------------------------------------------------------------------------------


def _check_models(folders: dict[str, Path], tmp_path: Path, layouts: Any) -> None:
    reference = load_file(tmp_path / "reference.safetensors")
    architectures = {name: read_architecture(folder) for name, folder in folders.items()}
    for tensor, pipeline, expert in each_layout(layouts):
        for name, architecture in architectures.items():
            if expert == 1 or architecture.num_experts:
                _check_model(architecture, reference["tokens"], reference[name], (tensor, pipeline, expert))
        if (tensor, pipeline, expert) == (1, 1, 1) and dist.get_rank() == 0:  # nothing collective
            _check_table_names(architectures["qwen2"])
            _check_flags(architectures)
            _check_differing_models_refused(architectures)
            _check_bad_files_refused(architectures["qwen3"], tmp_path)
            _check_sharded_files(architectures["qwen2"], tmp_path)


def _check_model(
    architecture: Architecture, tokens: torch.Tensor, expected: torch.Tensor, layout: tuple[int, int, int]
) -> None:
    from megatron.core import parallel_state

    from megatron_sgopd.models import weights
    from megatron_sgopd.models.digests import tensor_digest
    from megatron_sgopd.models.provider import check_model
    from megatron_sgopd.models.weight_map import ParallelLayout, owned_parameters, parameter_count

    (tensor, pipeline, expert), groups = layout, process_groups()
    model = build(architecture, layout)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))  # whatever is not loaded shows
    read = weights.load_weights(model, architecture, groups)
    check_model(model, architecture)
    end = (parallel_state.get_tensor_model_parallel_rank() + 1) * model.vocab_size // tensor
    padding = max(0, end - architecture.vocab_size)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            assert padding == 0 or not parameter[-padding:].any(), name

    logprobs = forward(model, tokens, architecture.vocab_size)
    if logprobs is not None:
        # float32 sums of 64 to 256 terms in another order, through four layers.
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)

    stored = load_file(architecture.folder / "model.safetensors")
    order = [piece.name for parameter in owned_parameters(architecture) for piece in parameter.pieces]
    _check_read_once(read, architecture, stored, groups)
    # The rule for what a rank owns is Megatron's own.
    owners = {
        parameter: parameter.owner(ParallelLayout(tensor, pipeline, 1, expert))
        for parameter in owned_parameters(architecture)
    }
    for parameter, place in owners.items():
        here = place.pipeline == groups.pp.rank() and place.expert in (None, groups.ep.rank())
        assert here == (parameter in weights._bind(model, architecture, groups)), parameter
    for memory_bytes in (1, 100_000, 1 << 30):
        with _recorded_collectives() as sizes:
            exported = list(weights.export_weights(model, architecture, groups, memory_bytes))
        assert [name for name, _ in exported] == order
        for name, weight in exported:
            assert torch.equal(weight, stored[name]), name
        # A transfer goes over its half of the memory only with a parameter that is larger alone.
        largest = model.vocab_size * architecture.hidden_size * 4
        assert all(nbytes <= max(memory_bytes // 2, largest) for nbytes in sizes)
        if memory_bytes == 1 << 30 and tensor > 1:
            assert len(sizes) == pipeline if not architecture.num_experts else len(sizes) > pipeline

    digests = weights.shard_digests(model, architecture, groups)
    assert list(digests) == order
    assert digests == {name: tensor_digest(stored[name]) for name in order}
    assert parameter_count(architecture) == sum(weight.numel() for weight in stored.values())

    # Local norms stay float32 in a bfloat16 model, so both dtypes travel.
    mixed = build(architecture, layout, params_dtype=torch.bfloat16)
    weights.load_weights(mixed, architecture, groups)
    digests = weights.shard_digests(mixed, architecture, groups)
    for name, weight in weights.export_weights(mixed, architecture, groups, 100_000):
        assert weight.dtype is (torch.float32 if "norm" in name else torch.bfloat16)
        assert torch.equal(weight, stored[name].to(weight.dtype)), name
        assert digests[name] == tensor_digest(weight), name


def _check_read_once(read: int, architecture: Architecture, stored: dict[str, torch.Tensor], groups: Any) -> None:
    """Over the ranks of one model every byte is read once, but for the small parameters that all of them hold."""
    from megatron_sgopd.models.families.base import Layout
    from megatron_sgopd.models.weight_map import parameters

    tensor, total = groups.tp.size(), torch.tensor(read)
    for group in (groups.tp, groups.pp):
        dist.all_reduce(total, group=group)
    expected = 0
    for parameter in parameters(architecture):
        copies = tensor if parameter.layout is Layout.REPLICATED else 1
        if parameter.entry.duplicate:
            copies = int(groups.pp.size() > 1)  # tied embeddings live on the first and on the last stage
        if (
            parameter.expert is None
            or parameter.expert * groups.ep.size() // architecture.num_experts == groups.ep.rank()
        ):
            expected += copies * sum(stored[piece.name].nbytes for piece in parameter.pieces)
    assert int(total) == expected


@contextlib.contextmanager
def _recorded_collectives() -> Iterator[list[int]]:
    """The gathered bytes of each all-gather, in order."""
    sizes: list[int] = []
    all_gather = dist.all_gather_into_tensor

    def recording(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(output.nbytes)
        return all_gather(output, *args, **kwargs)

    with unittest.mock.patch.object(dist, "all_gather_into_tensor", recording):
        yield sizes


def _check_table_names(qwen2: Architecture) -> None:
    """Megatron's own map from local to Transformer Engine names agrees with the table's."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_sgopd.models.weight_map import parameters

    renamed = get_gpt_layer_local_spec(normalization="RMSNorm").submodules.sharded_state_dict_keys_map
    assert len(renamed) == 2
    for parameter in parameters(qwen2):
        name = parameter.entry.local
        for local, transformer_engine in renamed.items():
            name = name.replace("{layer}." + local, "{layer}." + transformer_engine)
        assert (parameter.entry.transformer_engine or parameter.entry.local) == name


def _check_flags(architectures: dict[str, Architecture]) -> None:
    """Stock Megatron, given the flags, arrives at the model that the architecture describes."""
    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.arguments import parse_args, validate_args

    from megatron_sgopd import platform
    from megatron_sgopd.models.provider import check_model, megatron_flags, padded_vocab_size

    run = ["--micro-batch-size=1", "--global-batch-size=4", "--seq-length=64", "--train-iters=1", "--lr=1"]
    for architecture in architectures.values():
        padded = [f"--padded-vocab-size={padded_vocab_size(architecture, tensor=1)}"]
        flags = [*megatron_flags(architecture), *padded, *run, *platform.current().megatron_flags]
        with unittest.mock.patch("sys.argv", ["train", *flags]):
            args = validate_args(parse_args())
        model = build(architecture)
        model.config = core_transformer_config_from_args(args)
        model.vocab_size = args.padded_vocab_size
        model.position_embedding_type = args.position_embedding_type
        model.rotary_percent = args.rotary_percent
        model.share_embeddings_and_output_weights = not args.untie_embeddings_and_output_weights
        check_model(model, architecture)
        assert args.rotary_base == architecture.rope_theta
        assert args.vocab_size == architecture.vocab_size
        assert args.padded_vocab_size == 256


def _check_differing_models_refused(architectures: dict[str, Architecture]) -> None:
    from megatron_sgopd.models.provider import check_model

    qwen2, qwen3 = architectures["qwen2"], architectures["qwen3"]
    for built, described, message in (
        (qwen2, qwen3, r"kv_channels = 8.*16: pass --kv-channels 16"),
        (qwen2, dataclasses.replace(qwen2, norm_epsilon=1e-5), r"layernorm_epsilon = 1e-06.*1e-05"),
        (qwen2, dataclasses.replace(qwen2, tied_embeddings=True), "no --untie-embeddings"),
        (qwen2, dataclasses.replace(qwen2, rope_theta=5000.0), "--rotary-base 5000 "),
        (
            architectures["llama_tied"],
            dataclasses.replace(architectures["llama_tied"], rope_type="default"),
            "rot",
        ),
        (qwen2, dataclasses.replace(qwen2, vocab_size=300), "--padded-vocab-size"),
    ):
        model = build(built)
        check_model(model, built)
        with pytest.raises(ConfigError, match=message):
            check_model(model, described)


def _check_bad_files_refused(qwen3: Architecture, scratch: Path) -> None:
    from megatron_sgopd.models.weights import load_weights

    model = build(qwen3)
    stored = load_file(qwen3.folder / "model.safetensors")
    gate, norm = "model.layers.1.mlp.gate_proj.weight", "model.norm.weight"
    for broken, message in (
        ({name: weight for name, weight in stored.items() if name != norm}, f"lack {norm}"),
        (stored | {"model.layers.4.mlp.bias": torch.ones(3)}, "hold model.layers.4.mlp.bias"),
        (stored | {gate: stored[gate].T.contiguous()}, rf"{gate} .* \(64, 96\), .* \(96, 64\)"),
        (stored | {gate: stored[gate].to(torch.float8_e4m3fn)}, f"{gate} .* F8_E4M3"),
    ):
        folder = scratch / message[:8]
        shutil.copytree(qwen3.folder, folder, dirs_exist_ok=True)
        save_file(broken, folder / "model.safetensors")
        with pytest.raises(ConfigError, match=message):
            load_weights(model, dataclasses.replace(qwen3, folder=folder), process_groups())
    whole = (qwen3.folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="cannot be read as safetensors"):
        load_weights(model, dataclasses.replace(qwen3, folder=folder), process_groups())


def _check_sharded_files(qwen2: Architecture, scratch: Path) -> None:
    """A folder of several files with an index loads like a single file; an index that lies is refused."""
    from megatron_sgopd.models.architecture import INDEX_FILE
    from megatron_sgopd.models.digests import tensor_digest
    from megatron_sgopd.models.weights import load_weights, shard_digests

    folder = scratch / "sharded"
    folder.mkdir(parents=True)
    stored = load_file(qwen2.folder / "model.safetensors")
    names = sorted(stored)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in files.items():
        save_file({name: stored[name] for name in members}, folder / file)
    weight_map = {name: file for file, members in files.items() for name in members}
    index = folder / INDEX_FILE
    index.write_text(json.dumps({"weight_map": weight_map}))

    sharded = dataclasses.replace(qwen2, folder=folder)
    groups = process_groups()
    model = build(qwen2)
    load_weights(model, sharded, groups)
    assert shard_digests(model, qwen2, groups) == {name: tensor_digest(stored[name]) for name in stored}

    for wrong, message in (
        (weight_map | {names[0]: "b.safetensors"}, f"does not say where these tensors are: {names[0]}"),
        (weight_map | {names[0]: "c.safetensors"}, "c.safetensors cannot be read"),
        (weight_map | {names[0]: "../a.safetensors"}, "outside"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(ConfigError, match=message):
            load_weights(model, sharded, groups)

"""Checkpoints through stock Megatron at every layout: converted ones load there, and ones saved there convert back.

One launch of four ranks checks all: importing Megatron takes longer than everything else here.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks
from megatron_models import OFTEN_AND_ALL, build, each_layout, forward, process_groups
from safetensors.torch import load_file, save_file

from megatron_sgopd.models.architecture import Architecture, read_architecture

from .conftest import Conversion

TOKENS = 96  # one and a half times the positions where the fixture's rope scaling starts


@pytest.mark.parametrize("layouts", OFTEN_AND_ALL)
def test_every_layout_loads_and_saves(conversions: dict[str, Conversion], tmp_path: Path, layouts: Any) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(250, (4, TOKENS), generator=torch.Generator().manual_seed(2))
    reference = {"tokens": tokens}
    for name, model in conversions.items():
        with torch.no_grad():
            reference[name] = AutoModelForCausalLM.from_pretrained(model.source)(tokens).logits.log_softmax(-1)
    save_file(reference, tmp_path / "reference.safetensors")
    run_ranks(4, _check_layouts, conversions, tmp_path, layouts)


def _check_layouts(conversions: dict[str, Conversion], scratch: Path, layouts: Any) -> None:
    reference = load_file(scratch / "reference.safetensors")
    for tensor, pipeline, expert in each_layout(layouts):
        for name, model in conversions.items():
            architecture = read_architecture(model.source)
            if expert == 1 or architecture.num_experts:
                folder = scratch / f"{name}-{tensor}-{pipeline}-{expert}"
                _check(architecture, model.megatron, folder, (tensor, pipeline, expert), reference, name)


def _check(
    architecture: Architecture,
    converted: Path,
    saved: Path,
    layout: tuple[int, int, int],
    reference: dict[str, torch.Tensor],
    name: str,
) -> None:
    from megatron.core import dist_checkpointing

    from megatron_sgopd.checkpoint.torch_dist import CheckpointReader
    from megatron_sgopd.models.weight_map import owned_parameters

    model = build(architecture, layout)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))  # whatever is not loaded shows
    model.load_state_dict(dist_checkpointing.load(_state(model), str(converted / "release"))["model"])
    logprobs = forward(model, reference["tokens"], architecture.vocab_size)
    if logprobs is not None:
        # float32 sums of 64 to 96 terms in another order, through four layers.
        torch.testing.assert_close(logprobs, reference[name], rtol=0, atol=1e-5)

    if dist.get_rank() == 0:
        saved.mkdir()
    dist.barrier()
    dist_checkpointing.save(_state(model), str(saved))
    dist.barrier()
    if dist.get_rank() == 0:
        reader = CheckpointReader(saved)
        reader.check(architecture)
        stored = load_file(architecture.folder / "model.safetensors")
        for parameter in owned_parameters(architecture):
            for tensor, value in reader.pieces(parameter):
                assert torch.equal(value, stored.pop(tensor)), (layout, tensor)
        assert not stored


def _state(model: Any) -> dict[str, Any]:
    metadata = {"singleton_local_shards": False, "dp_cp_group": process_groups().dp_cp}
    return {"model": model.sharded_state_dict(metadata=metadata)}

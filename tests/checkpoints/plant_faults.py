"""python tests/checkpoints/plant_faults.py MODELS OUT      (MODELS: folder of the tiny models)

Make `convert` wrong in one way after the other, and print how each conversion ended, a JSON line each.
"""

import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from megatron_sgopd.cli import main
from megatron_sgopd.models import architecture, families
from megatron_sgopd.models.families import base
from megatron_sgopd.models.families.base import Entry, Layout
from megatron_sgopd.models.huggingface import HuggingFaceWeights
from megatron_sgopd.models.weight_map import Chunk, Parameter, Slab

Fault = Callable[[contextlib.ExitStack], None]


def table(model_type: str, change: Callable[[Entry], Entry | None]) -> Fault:
    """A family whose layer entries were put through `change`; None drops an entry."""

    def plant(stack: contextlib.ExitStack) -> None:
        family = families.FAMILIES[model_type]
        changed = tuple(new for entry in family.layer if (new := change(entry)) is not None)
        assert changed != family.layer
        broken = dataclasses.replace(family, layer=changed)
        stack.enter_context(patch.dict(families.FAMILIES, {model_type: broken}))
        # That the model has biases or head norms is told by these entries.
        names = {entry.local: entry for entry in changed}
        if base.QKV_BIAS.local in names:
            stack.enter_context(patch.object(architecture, "QKV_BIAS", names[base.QKV_BIAS.local]))
        if base.QK_NORM[0].local in names:
            stack.enter_context(patch.object(architecture, "QK_NORM", [names[base.QK_NORM[0].local]]))

    return plant


def reordered(name: str, *order: int) -> Callable[[Entry], Entry]:
    def change(entry: Entry) -> Entry:
        if not entry.local.endswith(name):
            return entry
        return dataclasses.replace(entry, pieces=tuple(entry.pieces[index] for index in order))

    return change


def laid_out(name: str, layout: Layout) -> Callable[[Entry], Entry]:
    return lambda entry: dataclasses.replace(entry, layout=layout) if entry.local.endswith(name) else entry


def exchanged(one: str, other: str) -> Callable[[Entry], Entry]:
    """Two entries with each other's Hugging Face tensors."""
    pieces: dict[str, tuple[tuple[str, ...], ...]] = {}
    for family in families.FAMILIES.values():
        for entry in family.layer:
            for name in (one, other):
                if entry.local.endswith(name):
                    pieces[other if name == one else one] = entry.pieces

    def change(entry: Entry) -> Entry:
        for name, theirs in pieces.items():
            if entry.local.endswith(name):
                return dataclasses.replace(entry, pieces=theirs)
        return entry

    return change


def transposed(name: str) -> Callable[[Entry], Entry]:
    def change(entry: Entry) -> Entry:
        if not entry.local.endswith(name):
            return entry
        return dataclasses.replace(entry, pieces=tuple((n, *reversed(sizes)) for n, *sizes in entry.pieces))

    return change


def dropped(name: str) -> Callable[[Entry], Entry | None]:
    return lambda entry: None if entry.local.endswith(name) else entry


def wrong_expert(stack: contextlib.ExitStack) -> None:
    chunks = Parameter.chunks

    def reversed_experts(self: Parameter, *arguments: Any) -> list[Chunk]:
        count = self.architecture.num_experts
        if self.expert is not None:
            self = dataclasses.replace(self, expert=count - 1 - self.expert)
        return chunks(self, *arguments)

    stack.enter_context(patch.object(Parameter, "chunks", reversed_experts))


def filled_padding(stack: contextlib.ExitStack) -> None:
    fill = HuggingFaceWeights.fill

    def fill_all(self: HuggingFaceWeights, slabs: tuple[Slab, ...], shard: torch.Tensor) -> None:
        fill(self, slabs, shard)
        shard[shard.abs().sum(-1) == 0] = 1.0

    stack.enter_context(patch.object(HuggingFaceWeights, "fill", fill_all))


def biases_left_out(stack: contextlib.ExitStack) -> None:
    fill = HuggingFaceWeights.fill

    def fill_weights(self: HuggingFaceWeights, slabs: tuple[Slab, ...], shard: torch.Tensor) -> None:
        fill(self, slabs, shard)
        if slabs[0].piece.name.endswith("bias"):
            shard.zero_()

    stack.enter_context(patch.object(HuggingFaceWeights, "fill", fill_weights))


def not_a_number(stack: contextlib.ExitStack) -> None:
    """On both sides, so that all tensors are equal."""
    read = HuggingFaceWeights.read

    def read_nan(self: HuggingFaceWeights, slab: Slab) -> torch.Tensor:
        tensor = read(self, slab)
        return tensor * float("nan") if slab.piece.name == "model.layers.1.mlp.down_proj.weight" else tensor

    stack.enter_context(patch.object(HuggingFaceWeights, "read", read_nan))


def transposed_projection(stack: contextlib.ExitStack) -> None:
    """Of a square weight, which no shape gives away; on the way there and in what the proof reads."""
    read = HuggingFaceWeights.read

    def read_transposed(self: HuggingFaceWeights, slab: Slab) -> torch.Tensor:
        if not slab.piece.name.endswith("o_proj.weight"):
            return read(self, slab)
        whole = read(self, dataclasses.replace(slab, start=0, stop=slab.piece.shape[1])).T
        return whole[:, slab.start : slab.stop].contiguous()

    stack.enter_context(patch.object(HuggingFaceWeights, "read", read_transposed))


def wrong_rank(stack: contextlib.ExitStack) -> None:
    slabs = Parameter.slabs

    def of_another(self: Parameter, rank: int, tensor: int, padded_vocab_size: int) -> list[Slab]:
        return slabs(self, tensor - 1 - rank if self.layout is Layout.ROW else rank, tensor, padded_vocab_size)

    stack.enter_context(patch.object(Parameter, "slabs", of_another))


FAULTS: dict[str, tuple[str, Fault]] = {
    "none": ("qwen2", lambda stack: None),
    "swapped gate and up": ("qwen2", table("qwen2", reordered("mlp.linear_fc1.weight", 1, 0))),
    "swapped key and value": ("llama_untied", table("llama", reordered("linear_qkv.weight", 0, 2, 1))),
    "swapped biases of key and value": ("qwen2", table("qwen2", reordered("linear_qkv.bias", 0, 2, 1))),
    "wrong query groups": ("qwen3", table("qwen3", laid_out("linear_qkv.weight", Layout.COLUMN))),
    "wrong query groups of biases": ("qwen2", table("qwen2", laid_out("linear_qkv.bias", Layout.COLUMN))),
    "exchanged norms": ("mistral", table("mistral", exchanged("input_layernorm.weight", "pre_mlp_layernorm.weight"))),
    "exchanged head norms": ("qwen3", table("qwen3", exchanged("q_layernorm.weight", "k_layernorm.weight"))),
    "transposed": ("mistral", table("mistral", transposed("mlp.linear_fc2.weight"))),
    "transposed square weight": ("mistral", transposed_projection),
    "not a number": ("mistral", not_a_number),
    "biases left out": ("qwen2", biases_left_out),
    "missing bias": ("qwen2", table("qwen2", dropped("linear_qkv.bias"))),
    "padding that is not zero": ("llama_tied", filled_padding),
    "row shards of other ranks": ("mistral", wrong_rank),
    "wrong expert": ("qwen3_moe", wrong_expert),
    "swapped gate and up of experts": ("qwen3_moe", table("qwen3_moe", reordered("linear_fc1.weight", 1, 0))),
}


def results(models: Path, out: Path) -> Iterator[tuple[str, int, str]]:
    for index, (name, (model, plant)) in enumerate(FAULTS.items()):
        errors = io.StringIO()
        command = ["convert", "to-megatron", str(models / model), str(out / str(index)), "--tensor-parallel", "2"]
        with contextlib.ExitStack() as stack, contextlib.redirect_stderr(errors):
            plant(stack)
            code = main(command)
        yield name, code, errors.getvalue()


if __name__ == "__main__":
    for result in results(Path(sys.argv[1]), Path(sys.argv[2])):
        print(json.dumps(result), flush=True)

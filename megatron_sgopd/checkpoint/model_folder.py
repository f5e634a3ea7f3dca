"""Writing a Hugging Face folder: safetensors in shards, and everything else that makes it a model folder."""

from __future__ import annotations

import json
import mmap
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_sgopd.checkpoint.files import PieceWriter, sync_path, write_atomically
from megatron_sgopd.common.data_files import read_json
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.models.architecture import INDEX_FILE, SINGLE_FILE, Architecture
from megatron_sgopd.models.weight_map import Parameter, owned_parameters

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Any of which makes a tokenizer."""
_COPIED = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_DTYPE_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Safetensors' own names."""
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class ShardPlan:
    """Which parameters go into which file."""

    def __init__(
        self, architecture: Architecture, dtype_of: Callable[[Parameter], torch.dtype], max_shard_bytes: int
    ) -> None:
        """Fill shards in the order of the forward pass; one is larger than `max_shard_bytes` only for one parameter."""
        self.members: list[list[Parameter]] = [[]]
        self.nbytes = [0]
        self.dtype_of = dtype_of
        for parameter in owned_parameters(architecture):
            elements = sum(torch.Size(piece.shape).numel() for piece in parameter.pieces)
            nbytes = elements * dtype_of(parameter).itemsize
            if self.members[-1] and self.nbytes[-1] + nbytes > max_shard_bytes:
                self.members.append([])
                self.nbytes.append(0)
            self.members[-1].append(parameter)
            self.nbytes[-1] += nbytes
        for members in self.members:
            members.sort(key=lambda parameter: -dtype_of(parameter).itemsize)

    def name(self, shard: int) -> str:
        """File name of a shard."""
        count = len(self.members)
        return SINGLE_FILE if count == 1 else f"model-{shard + 1:05d}-of-{count:05d}.safetensors"

    def described(self, shard: int) -> list[tuple[str, torch.dtype, Sequence[int]]]:
        """Name, dtype and shape of each tensor of a shard."""
        return [
            (piece.name, self.dtype_of(parameter), piece.shape)
            for parameter in self.members[shard]
            for piece in parameter.pieces
        ]

    def index(self) -> dict[str, Any]:
        """Content of the index file."""
        weight_map = {
            piece.name: self.name(shard)
            for shard, members in enumerate(self.members)
            for parameter in members
            for piece in parameter.pieces
        }
        return {"metadata": {"total_size": sum(self.nbytes)}, "weight_map": dict(sorted(weight_map.items()))}


def write_shard(
    path: Path, described: Sequence[tuple[str, torch.dtype, Sequence[int]]], tensors: Iterable[torch.Tensor]
) -> Callable[[], None]:
    """Write one safetensors file, under a temporary name.

    The library's own writer must have all of a file's tensors at once; here each is made when its turn comes.

    Args:
        described: names, dtypes and shapes, the widest dtypes first, so that all are aligned.
        tensors: as many, in the same order.

    Returns:
        What is still to be done, in any thread: sync it, then give it its name.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in described:
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % mmap.PAGESIZE)
    temporary = path.with_name(f"{path.name}.tmp")
    with PieceWriter(temporary) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy())
    assert temporary.stat().st_size == 8 + len(text) + end, "the tensors are not those that were described"

    def settle() -> None:
        sync_path(temporary)
        temporary.rename(path)

    return settle


def write_companions(folder: Path, plan: ShardPlan, like: Path, dtypes: Iterable[torch.dtype], card: str) -> None:
    """Write all but the weights: index, config.json, tokenizer and generation files, and the model card.

    Args:
        like: the folder whose config.json and tokenizer the model has.
        dtypes: of the weights; config.json names the one of most of them.
        card: content of README.md.
    """
    if len(plan.members) > 1:
        write_atomically(folder / INDEX_FILE, json.dumps(plan.index(), indent=2).encode())
    config = read_json(like / "config.json")
    config.pop("torch_dtype", None)
    config["dtype"] = _most_common(list(dtypes))
    write_atomically(folder / "config.json", json.dumps(config, indent=2).encode())
    for name in _COPIED:
        if (like / name).is_file():
            shutil.copyfile(like / name, folder / name)
            sync_path(folder / name)
    write_atomically(folder / "README.md", card.encode())


def _most_common(dtypes: Sequence[torch.dtype]) -> str:
    return DTYPE_NAMES[max(set(dtypes), key=dtypes.count)]


def check_tokenizer(like: Path) -> None:
    """Check that there is a tokenizer to copy.

    Raises:
        ConfigError: there is none.
    """
    if not any((like / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(
            f"{like} has no tokenizer ({', '.join(TOKENIZER_FILES)}), so the output could not be used for text: "
            "give a folder that has one by --like, or pass --allow-no-tokenizer"
        )

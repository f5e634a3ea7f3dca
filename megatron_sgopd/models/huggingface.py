"""Reading the weights of a Hugging Face folder, slab by slab, after its files were checked against the table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_sgopd.common.data_files import read_json
from megatron_sgopd.errors import ConfigError, some
from megatron_sgopd.models.architecture import INDEX_FILE, SINGLE_FILE, Architecture
from megatron_sgopd.models.weight_map import Piece, Slab, owned_parameters

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS = 4096
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Of weights on disk, under safetensors' names."""


class HuggingFaceWeights:
    """The open safetensors of a model folder. Files are mapped into memory, and only what is asked for is read."""

    def __init__(self, architecture: Architecture) -> None:
        """Open all files and check their headers.

        Raises:
            ConfigError: a file cannot be read, or a tensor is missing, superfluous, or of another shape or dtype.
        """
        self.bytes_read = 0
        self._folder = architecture.folder
        self._placed, self._dtypes = _check_folder(architecture)
        self._stack = contextlib.ExitStack()
        self._open: dict[str, Any] = {}

    def __enter__(self) -> HuggingFaceWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Close the files, and so let go of the memory that they are mapped to; the next read opens them again."""
        self._open.clear()
        self._stack.close()

    def dtype(self, piece: Piece) -> torch.dtype:
        """Of a tensor on disk."""
        return self._dtypes[piece.name]

    def read(self, slab: Slab) -> torch.Tensor:
        """The slab, as it is on disk."""
        span, file = slice(slab.start, slab.stop), self._slice(slab.piece)
        tensor = file[span] if slab.axis == 0 else file[:, span]
        self.bytes_read += tensor.nbytes
        return tensor

    def fill(self, slabs: Iterable[Slab], shard: torch.Tensor) -> None:
        """Read `slabs` into their places in `shard`, in its dtype; rows beyond, which pad a vocabulary, become zero."""
        filled = 0
        for slab in slabs:
            target = slab.view(shard)
            target.copy_(self.read(slab).view(target.shape))
            filled += target.shape[0] * target.shape[1]
        shard[filled:].zero_()

    def _slice(self, piece: Piece) -> Any:
        name = self._placed[piece.name]
        if name not in self._open:
            self._open[name] = self._stack.enter_context(_open(self._folder / name))
        return self._open[name].get_slice(piece.name)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError, RuntimeError) as error:  # torch's own where a file cannot be mapped
        raise ConfigError(f"{path} cannot be read as safetensors: {error}") from error


def _check_folder(architecture: Architecture) -> tuple[dict[str, str], dict[str, torch.dtype]]:
    """The file and the dtype of each tensor, after the headers of all were checked against the table."""
    folder = architecture.folder
    index = None if (folder / SINGLE_FILE).is_file() else _read_index(folder / INDEX_FILE)
    found, headers = {}, {}
    for name in sorted(set(index.values())) if index else [SINGLE_FILE]:
        with _open(folder / name) as file:
            for key in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                header = file.get_slice(key)
                found[key], headers[key] = name, (tuple(header.get_shape()), header.get_dtype())
    if index is not None and index != found:
        wrong = {key for key in index.keys() | found.keys() if index.get(key) != found.get(key)}
        raise ConfigError(f"{folder / INDEX_FILE} does not say where these tensors are: {some(wrong)}")

    pieces = [piece for parameter in owned_parameters(architecture) for piece in parameter.pieces]
    expected = {piece.name for piece in pieces}
    missing = expected - found.keys()
    # Transformers wrote these constants beside the weights once, and ignores them now.
    superfluous = {key for key in found.keys() - expected if not key.endswith(".rotary_emb.inv_freq")}
    tied_head = architecture.tied_embeddings and _HEAD in superfluous
    superfluous -= {_HEAD} if tied_head else set()
    if missing or superfluous:
        faults = [f"lack {some(missing)}"] * bool(missing)
        faults += [f"hold {some(superfluous)} beyond its config.json"] * bool(superfluous)
        raise ConfigError(f"the safetensors of {folder} {' and '.join(faults)}: give a complete folder")
    for piece in pieces:
        shape, dtype = headers[piece.name]
        if shape != piece.shape:
            raise ConfigError(f"{piece.name} in {folder} has shape {shape}, and its config.json makes it {piece.shape}")
        if dtype not in DTYPES:
            raise ConfigError(f"{piece.name} in {folder} is {dtype}: only {', '.join(DTYPES)} can be loaded")
    if tied_head and not _same_tensor(folder, found, _EMBEDDING, _HEAD):
        raise ConfigError(
            f"{folder} holds a {_HEAD} that is not its {_EMBEDDING}, and its config.json ties them "
            "(tie_word_embeddings): set that to false if the model has an output layer of its own, else remove it"
        )
    return found, {piece.name: DTYPES[headers[piece.name][1]] for piece in pieces}


def _same_tensor(folder: Path, placed: Mapping[str, str], one: str, other: str) -> bool:
    """Whether two tensors are equal to the last bit, some rows at a time."""
    with _open(folder / placed[one]) as first, _open(folder / placed[other]) as second:
        a, b = first.get_slice(one), second.get_slice(other)
        if a.get_shape() != b.get_shape() or a.get_dtype() != b.get_dtype():
            return False
        rows = a.get_shape()[0]
        return all(a[i : i + _ROWS].equal(b[i : i + _ROWS]) for i in range(0, rows, _ROWS))


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ConfigError(f"{path} cannot be read as an index of safetensors: its weight_map is {weight_map!r}")
    placed = {str(key): str(file) for key, file in weight_map.items()}
    outside = [file for file in placed.values() if Path(file).name != file]
    if outside:
        raise ConfigError(f"{path} names files outside its folder: {some(outside)}")
    return placed

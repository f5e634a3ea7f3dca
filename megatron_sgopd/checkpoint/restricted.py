"""The one file of a checkpoint that torch reads by unpickling, `.metadata`, read without running anything.

Objects among the tensors are pickles too; for those torch has a guard of its own, which `megatron_sgopd` sets.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from megatron_sgopd.common.data_files import check_inside
from megatron_sgopd.errors import ConfigError

METADATA = ".metadata"
_HARMLESS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.distributed.checkpoint.storage": {"WriteResult"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _HARMLESS.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place there")
        return super().find_class(module, name)


def load_metadata(data: bytes) -> Any:
    """Unpickle a checkpoint's metadata, or results of writing. Raises UnpicklingError at any other class."""
    return _Unpickler(io.BytesIO(data)).load()


@contextmanager
def explaining_objects(checkpoint: Path) -> Iterator[None]:
    """Say in a user's words that torch refused an object of a checkpoint.

    Raises:
        ConfigError: it did.
    """
    try:
        yield
    except (pickle.UnpicklingError, CheckpointException) as error:
        if "UnpicklingError" not in repr(error) + str(error):
            raise
        raise ConfigError(
            f"{checkpoint} holds an object that is more than plain data, and could run code when it is loaded: it is "
            "not read. Megatron writes none; take the checkpoint from where it was made"
        ) from None


def restrict_metadata() -> None:
    """Have every reader of torch's, also Megatron's, read metadata by `load_metadata` from now on."""
    FileSystemReader.read_metadata = _read_metadata  # type: ignore[method-assign, assignment]


def _is_sensible(entry: Any) -> bool:
    """Whether a tensor's blocks lie within it."""
    if not isinstance(entry, TensorStorageMetadata):
        return True
    axes = range(len(entry.size))
    return all(size >= 0 for size in entry.size) and all(
        len(chunk.offsets) == len(chunk.sizes) == len(axes)
        and all(chunk.offsets[i] >= 0 and 0 <= chunk.sizes[i] <= entry.size[i] - chunk.offsets[i] for i in axes)
        for chunk in entry.chunks
    )


def _read_metadata(reader: FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
    """In the place of torch's.

    Raises:
        ConfigError: it is no checkpoint's metadata, or names a class or a file that has no place there.
    """
    path = Path(reader.path) / METADATA
    try:
        metadata = load_metadata(path.read_bytes())
    except Exception as error:  # a class that has a place there may still be made of nonsense
        raise ConfigError(f"{path} cannot be read as the metadata of a torch_dist checkpoint: {error}") from error
    if not isinstance(metadata, Metadata):
        raise ConfigError(f"{path} holds a {type(metadata).__name__}, not the metadata of a checkpoint")
    if metadata.storage_meta is None:
        metadata.storage_meta = StorageMeta()
    metadata.storage_meta.load_id = reader.load_id
    if not all(_is_sensible(entry) for entry in metadata.state_dict_metadata.values()):
        raise ConfigError(f"{path} has a tensor whose size is no size, or that its blocks do not lie in: refused")
    if any(place.offset < 0 or place.length < 0 for place in metadata.storage_data.values()):
        raise ConfigError(f"{path} names a place before the beginning of a file: refused")
    folder = Path(reader.path)
    check_inside(folder, (file for file in folder.iterdir() if file.is_symlink()))
    for name in {place.relative_path for place in metadata.storage_data.values()}:
        if Path(name).name != name:
            raise ConfigError(f"{path} names {name!r}, which is not a file of its own folder: refused")
    return metadata

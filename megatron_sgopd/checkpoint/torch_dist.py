"""Megatron's `torch_dist` checkpoints, block by block, without a Megatron model.

The format is torch's distributed checkpoint: `.metadata` says which blocks of which tensors lie where in the
`.distcp` files. Reading and writing go through torch's own storage classes; what is here is which blocks.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from megatron_sgopd.checkpoint.files import PieceWriter, sync_path, write_atomically
from megatron_sgopd.checkpoint.restricted import METADATA, load_metadata, restrict_metadata
from megatron_sgopd.errors import ConfigError, some
from megatron_sgopd.models.architecture import Architecture
from megatron_sgopd.models.weight_map import Chunk, Parameter, owned_parameters

FORMAT = "metadata.json"
"""Megatron's mark of a distributed checkpoint."""
COMMON_STATE = "common_state/shard_0_1"
"""Megatron's arguments and counters."""

_EXTRA_STATE = "._extra_state/shard_"
_POPULATE_READ = 22
"""Linux' MADV_POPULATE_READ, which Python's mmap does not name."""
_NOT_WEIGHTS = ("optimizer.", "rng_state", "common_state", "rerun_state")


# ---- Reading --------------------------------------------------------------------------------------------


class CheckpointReader:
    """The tensors of one checkpoint, read a block at a time in one process."""

    def __init__(self, folder: Path) -> None:
        """Read the metadata of `folder`, an `iter_…` or `release` folder.

        Raises:
            ConfigError: it is no complete `torch_dist` checkpoint.
        """
        restrict_metadata()
        self.folder = folder
        self._storage = _Storage(folder)
        metadata = self._storage.read_metadata()
        self._storage.set_up_storage_reader(metadata, is_coordinator=True)
        self._check_files(metadata)
        entries = metadata.state_dict_metadata
        self.tensors = {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
        self._chunks_at: dict[str, dict[int, list[ChunkStorageMetadata]]] = {}

    def _check_files(self, metadata: Metadata) -> None:
        ends: dict[str, int] = {}
        for info in metadata.storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in sorted(ends.items()):
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else None
            if size is None or size < end:
                raise ConfigError(
                    f"{path} {'is missing' if size is None else f'has {size} bytes, and {end} are needed'}: "
                    "the checkpoint is not complete; take another"
                )

    @property
    def digest(self) -> str:
        """Of the metadata: which tensors, where, written when."""
        return hashlib.sha256((self.folder / METADATA).read_bytes()).hexdigest()

    def weights(self) -> dict[str, TensorStorageMetadata]:
        """The model's tensors: without optimizer, random state and the like."""
        return {key: entry for key, entry in self.tensors.items() if not key.startswith(_NOT_WEIGHTS)}

    def key(self, parameter: Parameter) -> str:
        """The parameter's key here. Raises ConfigError if there is none (see `check`)."""
        for key in parameter.entry.checkpoint_keys:
            if key in self.tensors:
                return key
        raise ConfigError(f"{self.folder} lacks {parameter.entry.checkpoint_keys[0]}")

    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.tensors["embedding.word_embeddings.weight"].size[0]

    def check(self, architecture: Architecture) -> None:
        """Compare the weights' keys and shapes with what `architecture` has.

        Raises:
            ConfigError: one is missing, superfluous, or of another shape.
        """
        missing, superfluous = compare_keys(self, architecture)
        if missing or superfluous:
            faults = [f"lacks {some(missing)}"] * bool(missing)
            faults += [f"has {some(superfluous)} beyond it"] * bool(superfluous)
            raise ConfigError(f"{self.folder} is not of the model of {architecture.folder}: it {' and '.join(faults)}")
        rows = self.padded_vocab_size()
        if rows < architecture.vocab_size:
            raise ConfigError(
                f"{self.folder} has {rows} rows of vocabulary, fewer than the {architecture.vocab_size} of "
                f"{architecture.folder}: give the folder of its own model"
            )
        for parameter in owned_parameters(architecture):
            key = self.key(parameter)
            [chunk, *_] = parameter.chunks(key, 1, rows)
            if tuple(self.tensors[key].size) != chunk.global_shape:
                raise ConfigError(
                    f"{key} in {self.folder} has shape {tuple(self.tensors[key].size)}, and {architecture.folder} "
                    f"needs {chunk.global_shape}: give the folder of its own model"
                )

    def read(self, chunk: Chunk) -> torch.Tensor:
        """One block, in the dtype of the checkpoint, shaped `chunk.shape`. It may be a view of the mapped file."""
        entry = self.tensors[chunk.key]
        wanted = ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
        near = TensorStorageMetadata(entry.properties, entry.size, self._near(chunk))
        items = create_read_items_for_chunk_list(chunk.key, near, [wanted])
        if len(items) == 1:
            return self._storage.part(items[0]).reshape(chunk.shape)
        target = torch.empty(chunk.sizes, dtype=entry.properties.dtype)
        for item in items:
            target[_spans(item.dest_offsets, item.lengths)] = self._storage.part(item)
        return target.view(chunk.shape)

    def release(self) -> None:
        """Let go of the memory that files are mapped to, once the blocks that were read are gone too."""
        self._storage.mapped.clear()

    def _near(self, chunk: Chunk) -> list[ChunkStorageMetadata]:
        """The stored blocks that share the first axis' index with `chunk`: with many experts there are thousands."""
        stacked = len(chunk.offsets) > len(chunk.shape)
        if chunk.key not in self._chunks_at:
            by_index: dict[int, list[ChunkStorageMetadata]] = {}
            for stored in self.tensors[chunk.key].chunks:
                covered = range(stored.offsets[0], stored.offsets[0] + stored.sizes[0]) if stacked else [0]
                for index in covered:
                    by_index.setdefault(index, []).append(stored)
            self._chunks_at[chunk.key] = by_index
        return self._chunks_at[chunk.key][chunk.offsets[0] if stacked else 0]

    def pieces(self, parameter: Parameter) -> Iterator[tuple[str, torch.Tensor]]:
        """The Hugging Face tensors that a parameter is made of, contiguous."""
        for chunk in parameter.chunks(self.key(parameter), 1, self.padded_vocab_size()):
            block = self.read(chunk)
            for slab in chunk.slabs:
                yield slab.piece.name, slab.view(block).reshape(slab.piece.shape).contiguous()

    def fill(self, parameter: Parameter, weight: torch.Tensor) -> None:
        """Read all of a parameter into `weight`, shaped and typed as a model without parallelism has it."""
        chunks = parameter.chunks(self.key(parameter), 1, self.padded_vocab_size())
        weight.copy_(torch.cat([self.read(chunk) for chunk in chunks]))

    def num_layers(self) -> int:
        """Layers of the stored model."""
        return self.tensors["decoder.layers.self_attention.linear_qkv.weight"].size[0]

    def dtype(self, parameter: Parameter) -> torch.dtype:
        """Of the stored parameter."""
        return self.tensors[self.key(parameter)].properties.dtype


def compare_keys(reader: CheckpointReader, architecture: Architecture) -> tuple[list[str], list[str]]:
    """Keys of weights that `architecture` has and the checkpoint lacks, and the reverse."""
    stored = reader.weights().keys()
    known: set[str] = set()
    missing = []
    for parameter in owned_parameters(architecture):
        keys = parameter.entry.checkpoint_keys
        known.update(keys)
        if not any(key in stored for key in keys):
            missing.append(keys[0])
    return sorted(set(missing)), sorted(stored - known)


def _spans(offsets: Sequence[int], lengths: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))


class _Storage(FileSystemReader):
    """Torch's reader, but blocks are views of mapped files: torch's own way copies each byte three times."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.mapped: dict[str, mmap.mmap] = {}

    def part(self, item: ReadItem) -> torch.Tensor:
        """What `item` needs of a stored block."""
        place = self.storage_data[item.storage_index]
        with (Path(self.path) / place.relative_path).open("rb") as file:
            # Under a fake tensor mode torch.load reads no data, and says where it lies in the file.
            with FakeTensorMode():
                fake = torch.load(self._slice_file(file, place), weights_only=True, map_location="cpu")
            if place.relative_path not in self.mapped:
                self.mapped[place.relative_path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        storage = fake.untyped_storage()
        mapped, offset = self.mapped[place.relative_path], place.offset + storage._checkpoint_offset
        page = offset - offset % mmap.PAGESIZE
        with suppress(OSError):  # kernels before 5.14 do not know it, and then bring in pages a few at a time: slower
            mapped.madvise(_POPULATE_READ, page, offset + storage.nbytes() - page)
        count = storage.nbytes() // fake.dtype.itemsize
        flat = torch.frombuffer(mapped, dtype=fake.dtype, count=count, offset=offset)
        block = flat.as_strided(fake.shape, fake.stride(), fake.storage_offset())
        return block[_spans(item.storage_offsets, item.lengths)]


# ---- Writing --------------------------------------------------------------------------------------------


class CheckpointWriter:
    """A checkpoint in the making: parts, each one file, which any processes may write in any order.

    A part that was written leaves a receipt, so that work that was cut off goes on after it.
    """

    def __init__(
        self,
        folder: Path,
        architecture: Architecture,
        dtype_of: Callable[[Parameter], torch.dtype],
        padded_vocab_size: int,
        tensor: int,
        part_bytes: int,
    ) -> None:
        """Plan the parts.

        Args:
            dtype_of: of a parameter in the checkpoint.
            padded_vocab_size: rows of embedding and output layer.
            tensor: blocks are cut for this tensor parallel size; any other can load them.
            part_bytes: about the size of a part.
        """
        self._folder = folder
        # Nothing is copied ahead: a block's memory is used again for the next of its shape.
        self._writer = FileSystemWriter(folder, sync_files=False, per_thread_copy_ahead=0)
        self._writer.fs = _PieceWrites()
        self._blocks: dict[tuple[tuple[int, ...], torch.dtype], torch.Tensor] = {}
        self._chunks: dict[tuple[str, torch.Size], tuple[Chunk, torch.dtype]] = {}
        parts: list[list[WriteItem]] = [[]]
        sizes = [0]
        for parameter in owned_parameters(architecture):
            dtype = dtype_of(parameter)
            for key in parameter.entry.checkpoint_keys:
                for chunk in parameter.chunks(key, tensor, padded_vocab_size):
                    item = _tensor_item(chunk, dtype)
                    self._chunks[chunk.key, torch.Size(chunk.offsets)] = chunk, dtype
                    nbytes = torch.Size(chunk.shape).numel() * dtype.itemsize
                    if parts[-1] and sizes[-1] + nbytes > part_bytes:
                        parts.append([])
                        sizes.append(0)
                    parts[-1].append(item)
                    sizes[-1] += nbytes
        objects = [*_extra_state_keys(architecture), COMMON_STATE]
        parts[-1] += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in objects]
        self._plans = self._writer.prepare_global_plan([SavePlan(items) for items in parts])
        self.part_bytes = sizes

    def written(self, part: int) -> bool:
        """Whether a part is on disk, whole."""
        return self._receipt(part).is_file()

    def write(
        self, part: int, fill: Callable[[Sequence[Any], torch.Tensor], None], common_state: dict
    ) -> Callable[[], None]:
        """Write a part.

        Args:
            fill: puts the given slabs into a block (see `HuggingFaceWeights.fill`).
            common_state: for the part that holds it, the last.

        Returns:
            What is still to be done, in any thread: sync the part, then leave its receipt.
        """
        self._receipt(part).parent.mkdir(parents=True, exist_ok=True)
        planner = _Source(self._chunks, self._blocks, fill, common_state)
        checksums = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)  # torch's readers do not look at them
        results = self._writer.write_data(self._plans[part], planner).wait()
        torch.serialization.set_crc32_options(checksums)

        def settle() -> None:
            for name in {result.storage_data.relative_path for result in results}:
                sync_path(self._folder / name)  # torch's own sync comes before the last bytes leave its buffer
            write_atomically(self._receipt(part), pickle.dumps(results))

        return settle

    def finish(self) -> None:
        """After all parts: the metadata, which makes it a checkpoint.

        Raises:
            ConfigError: a part's receipt is not what was left for it.
        """
        results = [self._read_receipt(part) for part in range(len(self._plans))]
        _, metadata = create_default_global_save_plan(self._plans)
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        write_atomically(self._folder / FORMAT, json.dumps(backend).encode())
        self._writer.finish(metadata, results)
        sync_path(self._folder / METADATA)
        for part in range(len(self._plans)):
            self._receipt(part).unlink()
        self._receipt(0).parent.rmdir()

    def _read_receipt(self, part: int) -> list[WriteResult]:
        path = self._receipt(part)
        try:
            return load_metadata(path.read_bytes())
        except (pickle.UnpicklingError, EOFError) as error:
            raise ConfigError(
                f"{path} is not what a conversion leaves ({error}): remove the folder, and begin anew"
            ) from None

    def _receipt(self, part: int) -> Path:
        return self._folder / "receipts" / f"{part:06d}"


class _PieceWrites(FileSystem):
    """Files written in pieces, where torch.save hands over a whole tensor."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        assert mode == "wb"
        with PieceWriter(Path(path)) as stream:
            yield stream


class _Source(DefaultSavePlanner):
    """Makes each block when torch's writer asks for it."""

    def __init__(
        self,
        chunks: Mapping[tuple[str, torch.Size], tuple[Chunk, torch.dtype]],
        blocks: dict[tuple[tuple[int, ...], torch.dtype], torch.Tensor],
        fill: Callable[[Sequence[Any], torch.Tensor], None],
        common_state: dict,
    ) -> None:
        super().__init__()
        self._chunks, self._blocks, self._fill, self._common_state = chunks, blocks, fill, common_state

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        key = write_item.index.fqn
        if write_item.type is WriteItemType.BYTE_IO:
            stored = io.BytesIO()
            # Megatron keeps a list, of one object for each rank of a shard. An empty extra state means: none.
            torch.save([self._common_state if key == COMMON_STATE else torch.empty(0, dtype=torch.uint8)], stored)
            return stored
        assert write_item.index.offset is not None
        chunk, dtype = self._chunks[key, write_item.index.offset]
        if (chunk.shape, dtype) not in self._blocks:
            self._blocks[chunk.shape, dtype] = torch.empty(chunk.shape, dtype=dtype)
        block = self._blocks[chunk.shape, dtype]
        self._fill(chunk.slabs, block)
        return block.view(chunk.sizes)


def _tensor_item(chunk: Chunk, dtype: torch.dtype) -> WriteItem:
    offsets = torch.Size(chunk.offsets)
    data = TensorWriteData(
        ChunkStorageMetadata(offsets, torch.Size(chunk.sizes)),
        TensorProperties(dtype=dtype),
        torch.Size(chunk.global_shape),
    )
    return WriteItem(MetadataIndex(chunk.key, offsets), WriteItemType.SHARD, tensor_data=data)


def _extra_state_keys(architecture: Architecture) -> Iterator[str]:
    """The keys of the FP8 state that Transformer Engine's linear layers and norms look for when they load.

    Megatron's local linear layers look for theirs too. Nothing is in them until FP8 was used.
    """
    for parameter in owned_parameters(architecture):
        module, _, name = parameter.entry.checkpoint_keys[0].rpartition(".")
        kind = module.rpartition(".")[2]
        if name != "weight" or not (kind.startswith("linear_") or kind.endswith("layernorm")):
            continue
        [chunk, *_] = parameter.chunks(f"{module}.{name}", 1, architecture.vocab_size)
        axes = len(chunk.offsets) - len(chunk.shape)
        offsets, sizes = (chunk.offsets[:axes], chunk.global_shape[:axes]) if axes else ((0,), (1,))
        yield f"{module}{_EXTRA_STATE}{'.'.join(map(str, offsets))}_{'.'.join(map(str, sizes))}"

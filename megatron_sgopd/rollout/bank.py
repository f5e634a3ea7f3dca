"""Rollouts of a fixed model on disk: verified, kept with the reasons, and looked up by problem.

The teacher's own rollouts are kept so, and the responses of an evaluation. A bank is a folder:

    bank.json            whose rollouts these are: model, tokenizer, prompts, sampling, verifier
    NAME-000000.parquet  rollouts, one a row, those of a problem together
    NAME-000000.json     the part's rows, its problems by row group, and a digest of each row group
    NAME.lock            held by the writer NAME while it runs

A part counts once its .json is there, and that is written last.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from megatron_sgopd.checkpoint.files import locked, new_file, sync_path, write_atomically
from megatron_sgopd.common.data_files import read_bytes
from megatron_sgopd.errors import ConfigError

IDENTITY = "bank.json"
"""File that makes a folder a bank."""
_SCHEMA = pa.schema(
    [
        ("problem", pa.string()),
        ("sample", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("response", pa.string()),
        ("truncated", pa.bool_()),
        ("outcome", pa.int8()),
        ("extracted", pa.string()),
        ("reason", pa.string()),
        ("vote", pa.string()),
    ]
)
_TEXTS = ["problem", "response", "extracted", "reason", "vote"]
_LARGEST_GROUP = 1 << 29
_GROUP_ROLLOUTS = 1024
"""About how many rollouts are read at a time, to look up one problem's,"""
_GROUP_TOKENS = 1 << 17
"""and about how many tokens, where that makes fewer rollouts; a problem's own are never divided."""
_CACHED = 16
"""Row groups that a reader keeps."""


@dataclass(frozen=True)
class BankIdentity:
    """What the rollouts of a bank have in common; a bank with another one is refused."""

    model: str
    """Digest of the model's files."""
    tokenizer: str
    """Digest of its vocabulary."""
    prompts: str
    """Digest of the prompt set."""
    samples: int
    """Rollouts of each problem."""
    temperature: float
    top_p: float
    top_k: int
    stop: str
    """JSON list."""
    max_new_tokens: int
    seed: int
    verifier: str


@dataclass(frozen=True)
class StoredRollout:
    """One response, judged."""

    problem: str
    """Id of the prompt, without an epoch."""
    sample: int
    token_ids: array[int]
    """Response tokens as 32-bit numbers, the end-of-sequence token included where there is one."""
    response: str
    """As text, without special tokens."""
    truncated: bool
    outcome: int
    """1: the verifier approved it."""
    extracted: str | None
    """The answer as found in the response."""
    reason: str
    """Of the verifier."""
    vote: str | None = None
    """As of VerifierResult."""


@dataclass(frozen=True)
class _Span:
    """Bytes of a part's parquet file."""

    offset: int
    bytes: int
    digest: str


@dataclass(frozen=True)
class _RowGroup(_Span):
    problems: tuple[str, ...]
    """In their order."""


@dataclass(frozen=True)
class _Part:
    """What the .json of a part says."""

    rows: int
    approved: int
    row_groups: tuple[_RowGroup, ...]
    footer: _Span


_PART = TypeAdapter(_Part)
_IDENTITY_VALUES = TypeAdapter(dict[str, str | int | float])


class RolloutBank:
    """A bank, read a row group at a time."""

    def __init__(self, folder: Path) -> None:
        """Read which problems the bank has; `refresh` takes in what was written since.

        Raises:
            ConfigError: a part's description cannot be read.
        """
        self.folder = folder
        self._parts: dict[str, _Part] = {}
        self._places: dict[str, tuple[str, int]] = {}
        self._read: OrderedDict[tuple[str, int], tuple[pa.Table, dict[str, tuple[int, int]]]] = OrderedDict()
        self.refresh()

    def refresh(self) -> None:
        """Take in parts that were finished since."""
        for path in sorted(self.folder.glob("*-*.json")):
            if path.stem in self._parts:
                continue
            try:
                part = _PART.validate_json(read_bytes(path))
            except (OSError, ValidationError) as error:
                reason = " ".join(str(error).split())
                raise ConfigError(
                    f"{path} cannot be read ({reason}): remove it, and its problems are made again"
                ) from None
            self._parts[path.stem] = part
            for index, group in enumerate(part.row_groups):
                self._places.update(dict.fromkeys(group.problems, (path.stem, index)))

    def __contains__(self, problem: str) -> bool:
        return problem in self._places

    def __len__(self) -> int:
        return len(self._places)

    @property
    def rollouts(self) -> int:
        """Rollouts of all problems."""
        return sum(part.rows for part in self._parts.values())

    @property
    def approved(self) -> int:
        """How many of them the verifier approved."""
        return sum(part.approved for part in self._parts.values())

    def of(self, problem: str) -> list[StoredRollout]:
        """All rollouts of a problem, in order of sample; none if the bank has none.

        Raises:
            ConfigError: the part that holds them is damaged; names file and row group.
        """
        if problem not in self._places:
            return []
        place = self._places[problem]
        if place not in self._read:
            self._read[place] = self._row_group(*place)
            if len(self._read) > _CACHED:
                self._read.popitem(last=False)
        self._read.move_to_end(place)
        table, spans = self._read[place]
        own = table.slice(*spans[problem])
        rows = zip(own.drop_columns("token_ids").to_pylist(), own["token_ids"], strict=True)
        return [StoredRollout(**row, token_ids=self._tokens(tokens, place)) for row, tokens in rows]

    def _tokens(self, tokens: Any, place: tuple[str, int]) -> array[int]:
        values = None if tokens.values is None or tokens.values.null_count else tokens.values.to_numpy()
        if values is None or (len(values) and values.min() < 0):
            raise ConfigError(
                f"{self.folder / place[0]}.parquet, row group {place[1]} has no token ids: {_mend(place[0])}"
            )
        return array("i", values.tobytes())

    def _row_group(self, name: str, index: int) -> tuple[pa.Table, dict[str, tuple[int, int]]]:
        """The rollouts, and first row and number of each problem's."""
        path = self.folder / f"{name}.parquet"
        described = self._parts[name].row_groups[index]
        try:
            with path.open("rb") as file:
                for what, span in (("footer", self._parts[name].footer), (f"row group {index}", described)):
                    file.seek(span.offset)
                    if _digest(file.read(span.bytes)) != span.digest:
                        raise ConfigError(
                            f"{path}, {what}: the bytes are not those that were written: the disk or a copy damaged "
                            f"them; {_mend(name)}"
                        )
                # Texts that are the same take their space once, however often they stand there.
                opened = pq.ParquetFile(file, read_dictionary=_TEXTS)
                tokens = opened.schema_arrow.names == _SCHEMA.names and opened.schema_arrow.field("token_ids").type
                if not tokens or not pa.types.is_list(tokens) or tokens.value_type != pa.int32():
                    raise ConfigError(f"{path} has other columns than a bank: {_mend(name)}")
                if opened.metadata.row_group(index).total_byte_size > _LARGEST_GROUP:
                    raise ConfigError(
                        f"{path}, row group {index} has more than {_LARGEST_GROUP >> 20} MiB: {_mend(name)}"
                    )
                # Arrow's threads end a process that ends, now and then, by SIGABRT (seen twice in ninety).
                table = opened.read_row_group(index, use_threads=False)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
        except (pa.ArrowException, KeyError) as error:  # the latter of a column that is not there
            raise ConfigError(f"{path} cannot be read ({' '.join(str(error).split())}): {_mend(name)}") from None
        problems = table["problem"].to_pylist()
        runs = [(problem, len(list(same))) for problem, same in itertools.groupby(problems)]
        starts = itertools.accumulate((count for _, count in runs), initial=0)
        spans = {problem: (start, count) for (problem, count), start in zip(runs, starts, strict=False)}
        if tuple(spans) != described.problems:
            raise ConfigError(
                f"{path.with_suffix('.json')} names other problems than row group {index} has: {_mend(name)}"
            )
        return table, spans


def _mend(part: str) -> str:
    return f"remove {part}.parquet and {part}.json, and their problems are made again"


class BankWriter:
    """Adds parts to a bank under a name that no other process uses at the time."""

    def __init__(self, folder: Path, name: str) -> None:
        """Use `writing` to get one."""
        self._folder, self._name = folder, name
        self._next = 1 + max((int(path.stem.rpartition("-")[2]) for path in folder.glob(f"{name}-*.json")), default=-1)

    def write(self, rollouts: Sequence[StoredRollout]) -> None:
        """Write a part; it is there whole or not at all. Rollouts of a problem stand together."""
        path = self._folder / f"{self._name}-{self._next:06d}.parquet"
        temporary = path.with_name(f"{path.name}.tmp")
        groups = list(_row_groups(rollouts))
        with new_file(temporary) as file, pq.ParquetWriter(file, _SCHEMA) as writer:
            for group in groups:
                writer.write_table(_as_table(group))
        *spans, footer = _spans(temporary)
        row_groups = tuple(
            _RowGroup(**vars(span), problems=tuple(dict.fromkeys(rollout.problem for rollout in group)))
            for group, span in zip(groups, spans, strict=True)
        )
        part = _Part(len(rollouts), sum(rollout.outcome for rollout in rollouts), row_groups, footer)
        sync_path(temporary)
        temporary.rename(path)
        write_atomically(path.with_suffix(".json"), _PART.dump_json(part))
        self._next += 1


@contextmanager
def writing(folder: Path, identity: BankIdentity, name: str) -> Iterator[BankWriter]:
    """A writer of the bank in `folder`, which is made if there is none.

    Args:
        name: `FAMILY-MEMBER`: writers of one family share out the problems, so they may run together.

    Raises:
        ConfigError: the bank is another one, or somebody writes under this name or for another family.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("a") as lock:
        if not locked(lock):
            raise ConfigError(f"{folder}: another process writes as {name}: wait for it, or take another shard")
        family = name.rpartition("-")[0]
        for path in folder.glob("*.lock"):
            if path.stem.rpartition("-")[0] == family:
                continue
            with path.open("a") as other:
                if not locked(other):
                    raise ConfigError(
                        f"{folder}: {path.stem} is being written, and would do the same problems as {name}: "
                        "give all workers the same number of shards, and one run at a time"
                    )
        _claim(folder, identity, name)
        yield BankWriter(folder, name)


def _claim(folder: Path, identity: BankIdentity, name: str) -> None:
    """Mark a new folder as the bank of `identity`; the first of several workers does."""
    own = folder / f"{IDENTITY}.{name}"
    write_atomically(own, json.dumps(asdict(identity), indent=1).encode())
    try:
        os.link(own, folder / IDENTITY)
    except FileExistsError:
        check_identity(folder, identity)
    finally:
        own.unlink()


def check_identity(folder: Path, identity: BankIdentity) -> None:
    """Check that a bank is what a run needs.

    Raises:
        ConfigError: there is none, or it differs; names what differs.
    """
    path = folder / IDENTITY
    try:
        stored = _IDENTITY_VALUES.validate_json(read_bytes(path))
    except (OSError, ValidationError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{folder} is no bank of rollouts ({path.name}: {reason}): make one with `megatron-sgopd teacher-rollouts "
            "RECIPE`, or `megatron-sgopd eval`"
        ) from None
    wanted = asdict(identity)
    different = [name for name in wanted if stored.get(name) != wanted[name]]
    if different:
        first = different[0]
        raise ConfigError(
            f"{folder} is a bank with another {', '.join(different)} ({first} is {stored.get(first)!r}, and the recipe "
            f"has {wanted[first]!r}): choose another folder, or the recipe that the bank was made with"
        )


def _row_groups(rollouts: Sequence[StoredRollout]) -> Iterator[list[StoredRollout]]:
    """Pieces of about `_GROUP_ROLLOUTS` rollouts or `_GROUP_TOKENS` tokens that keep a problem's together."""
    group: list[StoredRollout] = []
    tokens = 0
    for rollout in rollouts:
        full = len(group) >= _GROUP_ROLLOUTS or tokens >= _GROUP_TOKENS
        if full and rollout.problem != group[-1].problem:
            yield group
            group, tokens = [], 0
        group.append(rollout)
        tokens += len(rollout.token_ids)
    if group:
        yield group


def _as_table(rollouts: Sequence[StoredRollout]) -> pa.Table:
    flat, ends = array("i"), array("i", [0])
    for rollout in rollouts:
        flat.extend(rollout.token_ids)
        ends.append(len(flat))
    offsets, values = (pa.Array.from_buffers(pa.int32(), len(a), [None, pa.py_buffer(a)]) for a in (ends, flat))
    columns = {name: [getattr(rollout, name) for rollout in rollouts] for name in _SCHEMA.names if name != "token_ids"}
    return (
        pa.table(columns | {"token_ids": pa.ListArray.from_arrays(offsets, values)}).select(_SCHEMA.names).cast(_SCHEMA)
    )


def _spans(path: Path) -> list[_Span]:
    """Offset, bytes and digest of each row group of a parquet file, and of the rest."""
    with path.open("rb") as file:
        metadata = pq.ParquetFile(file).metadata
        ends = [4]  # the format's mark
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            columns = [group.column(column) for column in range(group.num_columns)]
            ends.append(max(_start(column) + column.total_compressed_size for column in columns))
        ends.append(path.stat().st_size)
        spans = []
        for start, stop in itertools.pairwise(ends):
            file.seek(start)
            spans.append(_Span(start, stop - start, _digest(file.read(stop - start))))
    return spans


def _start(column: Any) -> int:
    return column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()

"""Prompts: tokenized, kept in a file that is mapped into memory, and drawn in an order that a seed fixes."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jinja2 import TemplateError

from megatron_sgopd.config import PromptSettings
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.rollout.sources import Problems, Row, read_rows, short
from megatron_sgopd.verify.reading import final_answer

_EPOCH_END = ", "


@dataclass(frozen=True)
class Prompt:
    """One problem, ready for the model."""

    id: str
    """Unique within its source and the same in every file format; drawn prompts carry the epoch too."""
    text: str
    """After the chat template."""
    token_ids: tuple[int, ...]
    answer: str
    task: str
    """Name of the reasoning-gym task; empty for files."""
    metadata: dict[str, Any]
    """What the task's own scorer needs; JSON values."""

    @property
    def problem(self) -> str:
        """The id without the epoch."""
        return self.id.rpartition(_EPOCH_END)[2]


@dataclass(frozen=True)
class SourcedPrompt:
    """A prompt, and what its source says beside it."""

    prompt: Prompt
    place: str
    """Where it stands in its source."""
    solved: str | None
    """The final answer of the source's own worked solution, empty where none can be read; None without a solution."""


_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.large_string()),
        ("token_ids", pa.list_(pa.int32())),
        ("answer", pa.string()),
        ("task", pa.string()),
        ("metadata", pa.string()),
        ("text_hash", pa.uint64()),
        ("place", pa.string()),
        ("solved", pa.string()),
    ]
)
_BESIDE = ("text_hash", "place", "solved")
"""Columns that are no fields of a prompt."""
_KEPT_PROBLEMS = 100
_SET_INFO = b"megatron_sgopd"
_BATCH_CHARACTERS = 1 << 22
"""About how many are tokenized at a time; a tokenizer's output is many times larger than what is kept of it."""
_BATCH_PROMPTS = 2000


class NamedRows:
    """Rows with something wrong: how many, and what it is with the first of them."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def __call__(self, problem: str) -> None:
        """Count one."""
        self.count += 1
        if self.count <= _KEPT_PROBLEMS:
            self.first.append(problem)


def write_prompts(prompts: Iterable[SourcedPrompt], sink: Any, left_out: NamedRows | None = None) -> None:
    """Write prompts as an Arrow file, which `PromptSet` maps into memory; a part of them is held at a time.

    Args:
        sink: file open for writing, in bytes.
        left_out: what reading them has left out, by the end.
    """
    digest, tasks = hashlib.blake2b(digest_size=16), set[str]()
    with pa.ipc.new_file(sink, _SCHEMA) as writer:
        for batch in batched_by_size(prompts, lambda one: len(one.prompt.text)):
            rows = [vars(one.prompt) | {"metadata": json.dumps(one.prompt.metadata, sort_keys=True)} for one in batch]
            for row, one in zip(rows, batch, strict=True):
                row["text_hash"] = _hash(row["text"])
                digest.update(json.dumps(row, sort_keys=True).encode())
                row |= {"place": one.place, "solved": one.solved}
            tasks.update(one.prompt.task for one in batch)
            writer.write_batch(pa.RecordBatch.from_pylist(rows, _SCHEMA))
        known: dict[str, Any] = {"digest": digest.hexdigest(), "tasks": sorted(tasks)}
        known |= {"unusable": left_out.count if left_out else 0, "problems": left_out.first if left_out else []}
        info = json.dumps(known)
        writer.write_batch(pa.RecordBatch.from_pylist([], _SCHEMA), custom_metadata={_SET_INFO: info.encode()})


def batched_by_size[T](items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Lists of at most _BATCH_PROMPTS items, and of about _BATCH_CHARACTERS by their sizes."""
    batch: list[T] = []
    total = 0
    for item in items:
        batch.append(item)
        total += size(item)
        if len(batch) == _BATCH_PROMPTS or total >= _BATCH_CHARACTERS:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class PromptSet(Sequence[Prompt]):
    """Prompts in the order of their source, in a file that is mapped into memory: a look-up reads its own rows."""

    def __init__(self, source: Any) -> None:
        """Open what `write_prompts` has written: a path, or a buffer."""
        mapped = pa.memory_map(str(source)) if isinstance(source, Path) else pa.BufferReader(source)
        reader = pa.ipc.open_file(mapped)
        self._table = reader.read_all()
        _, info = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
        known = json.loads(info[_SET_INFO])
        self.tasks: list[str] = known["tasks"]
        """Names of the reasoning-gym tasks that they are of; an empty one for those of files."""
        self._digest: str = known["digest"]
        self.unusable: int = known["unusable"]
        """Rows of the source that were left out, since they cannot be used."""
        self.problems: list[str] = known["problems"]
        """What is wrong with the first of them."""
        self._rows = np.arange(len(self._table))
        self.excluded = 0
        """How many prompts were left out."""

    @classmethod
    def of(cls, prompts: Iterable[Prompt]) -> PromptSet:
        """Prompts that are there already, without a file."""
        sink = pa.BufferOutputStream()
        write_prompts((SourcedPrompt(prompt, prompt.id, None) for prompt in prompts), sink)
        return cls(sink.getvalue())

    def without(self, others: Iterable[Prompt]) -> PromptSet:
        """The set without prompts whose text, after the chat template, is one of the others'."""
        texts = {prompt.text for prompt in others}
        hashes = np.array([_hash(text) for text in texts], dtype=np.uint64)
        alike = np.flatnonzero(np.isin(self.text_hashes(), hashes))
        out = [place for place in alike.tolist() if self[place].text in texts]
        rest = copy.copy(self)
        rest._rows = np.delete(self._rows, out)
        rest.excluded = self.excluded + len(out)
        return rest

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = int(self._rows[range(len(self))[index]])
        return _prompt(self._table.slice(row, 1).to_pylist()[0])

    def find(self, problem: str) -> Prompt | None:
        """The prompt with that id, also if it was left out."""
        row = pa.compute.index(self._table["id"], problem).as_py()
        return None if row < 0 else _prompt(self._table.slice(row, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Prompt]:
        return (one.prompt for one in self.sourced())

    def sourced(self) -> Iterator[SourcedPrompt]:
        """Each prompt, and what its source says beside it."""
        for start in range(0, len(self), _BATCH_PROMPTS):
            rows = self._table.take(self._rows[start : start + _BATCH_PROMPTS]).to_pylist()
            yield from (SourcedPrompt(_prompt(row), row["place"], row["solved"]) for row in rows)

    def place(self, index: int) -> str:
        """Where a prompt stands in its source."""
        return self._table["place"][int(self._rows[index])].as_py()

    def lengths(self) -> np.ndarray:
        """int32 [N]: tokens of each prompt."""
        return pa.compute.list_value_length(self._table["token_ids"]).to_numpy()[self._rows]

    def text_hashes(self) -> np.ndarray:
        """uint64 [N]: the same for prompts of the same text."""
        return self._table["text_hash"].to_numpy()[self._rows]

    @cached_property
    def digest(self) -> str:
        """Hexadecimal digest of every field of every prompt, and of their order."""
        if not self.excluded:
            return self._digest
        return hashlib.blake2b(self._digest.encode() + self._rows.tobytes(), digest_size=16).hexdigest()


def _prompt(row: dict[str, Any]) -> Prompt:
    fields = {name: value for name, value in row.items() if name not in _BESIDE}
    return Prompt(**fields | {"token_ids": tuple(row["token_ids"]), "metadata": json.loads(row["metadata"])})


def check_usable(prompts: PromptSet, settings: PromptSettings) -> None:
    """Refuse a source of which a row was left out, unless the settings allow it.

    Raises:
        ConfigError: naming how many, and the first three.
    """
    if prompts.unusable and settings.unusable_rows == "refuse":
        more = f"; {prompts.unusable} rows in all cannot be used: unusable_rows: skip leaves them out"
        raise ConfigError("; ".join(prompts.problems[:3]) + more * (prompts.unusable > 1))


def check_not_empty(prompts: PromptSet, source: str) -> None:
    """Check that there are prompts.

    Raises:
        ConfigError: there are none, or all of them were left out.
    """
    if not prompts and prompts.excluded:
        raise ConfigError(
            f"{source}: all {prompts.excluded} prompts are among the held-out ones: give another source, "
            "or for reasoning-gym more problems, another seed or a wider task"
        )
    if not prompts:
        raise ConfigError(f"{source} holds no prompts: give a source with at least one row")


def read_prompts(
    settings: PromptSettings, tokenizer: Any, problem: Problems, progress: Callable[[int], None] = lambda _: None
) -> Iterator[SourcedPrompt]:
    """Read the prompts of a source and tokenize them, some at a time.

    Args:
        tokenizer: a `transformers` tokenizer; None to leave prompts as they are written, without tokens.
        problem: told of each row that cannot be used, by file and line; it is left out.
        progress: called with the number of rows so far, for each of them.

    Raises:
        ConfigError: naming the file, or the setting, that is wrong.
    """
    if tokenizer is not None:
        _check_chat_template(settings, tokenizer)
    for batch in batched_by_size(_usable(settings, tokenizer, problem, progress), lambda one: len(one.text)):
        token_ids = _tokenized([prompt.text for prompt in batch], settings, tokenizer)
        for prompt, ids in zip(batch, token_ids, strict=True):
            if settings.max_prompt_tokens is not None and len(ids) > settings.max_prompt_tokens:
                problem(
                    f"{prompt.place}: the prompt has {len(ids)} tokens, but at most {settings.max_prompt_tokens} are "
                    "allowed: leave it out, raise max_prompt_tokens, or raise train.row_tokens"
                )
                continue
            whole = Prompt(prompt.id, prompt.text, tuple(ids), prompt.answer, prompt.task, prompt.metadata)
            yield SourcedPrompt(whole, _valid(prompt.place.removeprefix(f"{settings.source}, ")), prompt.solved)


def _check_chat_template(settings: PromptSettings, tokenizer: Any) -> None:
    """There is one where it is wanted; it reads the arguments that it is given; and it begins the answer: else a model
    would go on with the question, or answer as the user."""
    arguments = settings.chat_template_arguments
    if not settings.chat_template:
        if arguments:
            raise ConfigError(f"chat_template_arguments={arguments} has no use with chat_template: false: remove one")
        if settings.system_prompt is not None:
            raise ConfigError("system_prompt has no use with chat_template: false: remove one of them")
        return
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer in {tokenizer.name_or_path} has no chat template: set chat_template: false to use "
            "prompts as they are, or take an instruction-tuned model's tokenizer"
        )
    ours = inspect.signature(tokenizer.apply_chat_template).parameters
    for name in arguments:
        if name in ours or not re.search(rf"\b{re.escape(name)}\b", tokenizer.get_chat_template()):
            raise ConfigError(
                f"chat_template_arguments has {name!r}, which the chat template of {tokenizer.name_or_path} does not "
                "read: correct its spelling, or leave it out"
            )
    messages = [{"role": "user", "content": "1"}]
    try:
        with_it, without = (
            tokenizer.apply_chat_template(messages, add_generation_prompt=wanted, tokenize=False, **arguments)
            for wanted in (True, False)
        )
    except Exception:  # what is wrong with it is said of the first prompt, by its line
        return
    if with_it == without:
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path} has no generation prompt: it would not begin the model's "
            "answer; take an instruction-tuned model's tokenizer, or set chat_template: false"
        )


@dataclass(frozen=True)
class _Usable:
    """A row that holds a prompt and an answer."""

    place: str
    id: str
    text: str
    answer: str
    task: str
    metadata: dict[str, Any]
    solved: str | None


def _usable(
    settings: PromptSettings, tokenizer: Any, problem: Problems, progress: Callable[[int], None]
) -> Iterator[_Usable]:
    for index, row in enumerate(read_rows(settings, problem)):
        progress(index)
        try:
            text, answer = _text(row, settings, tokenizer), _answer(row)
        except ConfigError as error:
            problem(str(error))
            continue
        solved = _valid(final_answer(row.solution) or "") if isinstance(row.solution, str) else None
        yield _Usable(row.place, f"problem {index}", text, answer, row.task, row.metadata, solved)


def _valid(text: str) -> str:
    """As much of it as is Unicode: names of files, and solutions, may hold anything."""
    return text.encode(errors="replace").decode()


def _tokenized(texts: list[str], settings: PromptSettings, tokenizer: Any) -> list[list[int]]:
    if tokenizer is None:
        return [[] for _ in texts]
    plain = not settings.chat_template
    return tokenizer(texts, add_special_tokens=plain, return_attention_mask=False, verbose=False).input_ids


def _text(row: Row, settings: PromptSettings, tokenizer: Any) -> str:
    """What the model reads."""
    name = row.prompt_field
    messages = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
    if not _are_messages(messages):
        raise ConfigError(
            f"{row.place}: {name!r} must be text or a list of chat messages with role and content, not "
            f"{short(row.prompt)}"
        )
    if not any(message["content"].strip() for message in messages):
        raise ConfigError(f"{row.place}: {name!r} is empty: fill it in or leave the row out")
    for message in messages:
        _check_unicode(message["role"], row.place, name)
        _check_unicode(message["content"], row.place, name)
    if tokenizer is None:
        return "\n".join(message["content"] for message in messages)
    if not settings.chat_template:
        if not isinstance(row.prompt, str):
            raise ConfigError(f"{row.place}: {name!r} holds chat messages, which need chat_template: true")
        return row.prompt + settings.prompt_suffix
    if settings.system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": settings.system_prompt}, *messages]
    messages = [*messages[:-1], messages[-1] | {"content": messages[-1]["content"] + settings.prompt_suffix}]
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **settings.chat_template_arguments
        )
    except MemoryError:
        raise
    except Exception as error:  # a template is a program, of whoever made the model
        reason = str(error) if isinstance(error, TemplateError) else repr(error)
        raise ConfigError(
            f"{row.place}: the tokenizer's chat template refuses the messages ({reason}): change their roles or order"
        ) from None


def _are_messages(messages: Any) -> bool:
    return isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )


def _answer(row: Row) -> str:
    """The reference answer; datasets often hold numbers as numbers."""
    answer, name = row.answer, row.answer_field
    if row.answer_form == "list" and isinstance(answer, list) and len(answer) == 1:
        [answer] = answer
    if answer is None or (isinstance(answer, float) and math.isnan(answer)) or not str(answer).strip():
        raise ConfigError(
            f"{row.place}: {name!r} is missing or empty ({short(answer)}), but every prompt needs a reference "
            + ("answer: choose another task" if row.task else "answer: fill it in or leave the row out")
        )
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or answer in (math.inf, -math.inf):
        raise ConfigError(f"{row.place}: {name!r} must be text or a number, not {short(answer)}: write it as text")
    if isinstance(answer, (int, float)):
        return decimal_text(answer)
    _check_unicode(answer, row.place, name)
    if row.answer_form == "plain" or row.answer_form == "list":
        return answer
    if row.answer_form == "worked":
        found, where = (answer.rpartition("####")[2].strip() if "####" in answer else None), "after ####"
    else:
        found, where = (final_answer(answer) if "\\boxed" in answer else None), "in a box"
    if not found:
        raise ConfigError(f"{row.place}: {name!r} has no answer {where} ({short(answer[-40:])}): leave the row out")
    return found


def decimal_text(number: float) -> str:
    """The shortest decimal of a number, without an exponent: 0.00005, and 3 of 3.0."""
    return format(Decimal(repr(number)).normalize(), "f")


def _check_unicode(text: str, place: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{place}: {name!r} is no valid Unicode text: {short(text)}: save it as UTF-8, or leave the row out"
        ) from None


# ---- Order -----------------------------------------------------------------------------------------------


class PromptStream:
    """Prompts without end: each epoch holds every prompt once, in an order that seed and epoch alone fix.

    All ranks draw the same prompts; the position is the number drawn so far, so it follows from the step.
    """

    def __init__(self, prompts: PromptSet, seed: int) -> None:
        self._prompts, self._seed = prompts, seed
        self._position = 0
        self._order = (0, _shuffled(len(prompts), seed, 0))

    def seek(self, position: int) -> None:
        """Go on after `position` prompts from the beginning."""
        self._position = position

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts; their ids name the epoch, so that they are unique over its border."""
        drawn = []
        for position in range(self._position, self._position + count):
            epoch, place = divmod(position, len(self._prompts))
            if epoch != self._order[0]:
                self._order = (epoch, _shuffled(len(self._prompts), self._seed, epoch))
            prompt = self._prompts[int(self._order[1][place])]
            drawn.append(dataclasses.replace(prompt, id=f"epoch {epoch}{_EPOCH_END}{prompt.id}"))
        self._position += count
        return drawn


def _shuffled(size: int, seed: int, epoch: int) -> np.ndarray:
    # Raw generator output: numpy promises it across versions, which it does not of permutation().
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(size), kind="stable")

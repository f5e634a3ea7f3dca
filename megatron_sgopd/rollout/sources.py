"""Rows of a source: files, data set folders, and problems that reasoning-gym makes. All but the latter are hostile.

Nothing of a data set is executed, fetched, or read from outside of its folder; files are read a few rows at a time,
and only the columns that are asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_sgopd.common.data_files import check_inside
from megatron_sgopd.config import PromptSettings
from megatron_sgopd.errors import ConfigError

REASONING_GYM = "reasoning_gym:"
_ROWS = 64
"""Read at a time: a column may unpack to far more than its file has."""


@dataclass(frozen=True)
class Row:
    place: str
    """Source and line or row, for messages."""
    prompt: Any
    """Text, or chat messages."""
    answer: Any
    task: str = ""
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    answer_form: Literal["plain", "worked", "boxed", "list"] = "plain"
    solution: Any = None
    """The source's own worked solution, where it has one beside the answer or around it."""


def short(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


Problems = Callable[[str], None]
"""Takes what is wrong with a row that is left out."""


def read_rows(settings: PromptSettings, problem: Problems) -> Iterator[Row]:
    """The rows of a source, as they stand there.

    Args:
        problem: told of rows that cannot be read.

    Raises:
        ConfigError: naming the file, or the setting, that is wrong.
    """
    if settings.source.startswith(REASONING_GYM):
        return _mixed_problems(settings, settings.source.removeprefix(REASONING_GYM).split("+"))
    path = Path(settings.source)
    if path.is_dir():
        return _as_rows(_folder_rows(path, settings, problem), settings, problem)
    if not path.exists():
        raise ConfigError(
            f"{settings.source} does not exist: give a .jsonl or .parquet file, a dataset folder, or "
            f"{REASONING_GYM}TASK"
        )
    if path.suffix == ".jsonl":
        return _as_rows(_json_lines(path, problem), settings, problem)
    if path.suffix == ".parquet":
        return _as_rows(_parquet_rows([str(path)], path, settings), settings, problem)
    raise ConfigError(
        f"{settings.source} has an unknown suffix {path.suffix!r}: give a .jsonl or .parquet file, or a dataset folder"
    )


Placed = tuple[str, dict[str, Any]]
"""Source and line or row, and its columns."""


def _as_rows(placed: Iterable[Placed], settings: PromptSettings, problem: Problems) -> Iterator[Row]:
    fields: Fields | None = None
    for place, columns in placed:
        if fields is None:
            fields = fields_of(columns, settings, place)
        prompt, answer = value_at(columns, fields.prompt), value_at(columns, fields.answer)
        if prompt is _MISSING or answer is _MISSING:
            name, setting = (fields.prompt, "prompt_field") if prompt is _MISSING else (fields.answer, "answer_field")
            problem(str(_no_field(list(columns), place, setting, name)))
            continue
        yield Row(
            place,
            prompt,
            answer,
            prompt_field=fields.prompt,
            answer_field=fields.answer,
            answer_form=fields.form,
            solution=answer if fields.form == "worked" else columns.get(_SOLUTION),
        )


def _json_lines(path: Path, problem: Problems) -> Iterator[Placed]:
    # A reader of our own: errors must name the line, and `datasets` turns the text "1" into the number 1 where
    # other rows of its column hold something else than text.
    try:
        file = path.open(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): change its permissions") from None
    with file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            place = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                problem(f"{place} is no JSON ({error}): {short(line.strip())}: correct or remove it")
                continue
            if not isinstance(value, dict):
                problem(f"{place} must be an object with fields, not {short(value)}: correct or remove it")
                continue
            yield place, value


def _folder_rows(path: Path, settings: PromptSettings, problem: Problems) -> Iterator[Placed]:
    import datasets

    _check_folder(path)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        with _datasets_errors(path):
            saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            _check_split(saved, path, settings)
            saved = saved[settings.split]
        return _rows(saved.select_columns(_columns(saved.column_names, path, settings)), path)
    with _datasets_errors(path):
        builder = datasets.load_dataset_builder(str(path))
    _check_split(builder.config.data_files, path, settings)
    files = builder.config.data_files[settings.split]
    if addresses := [file for file in files if "://" in file or "::" in file]:
        raise ConfigError(f"{path} names {addresses[0]!r}, which is not in its folder: remove that entry")
    check_inside(path, map(Path, files))
    if all(file.endswith(".jsonl") for file in files):
        return itertools.chain.from_iterable(_json_lines(Path(file), problem) for file in files)
    if all(file.endswith(".parquet") for file in files):
        return _parquet_rows(files, path, settings)
    with _datasets_errors(path):  # streamed: nothing of it is unpacked into a cache
        return _rows(builder.as_streaming_dataset(split=settings.split), path)


def _check_folder(path: Path) -> None:
    """Check that what a data set says of itself names nothing outside of its folder, and no network address.

    Raises:
        ConfigError: naming the file.
    """
    check_inside(path, (file for file in path.rglob("*") if file.is_symlink()))
    card = path / "README.md"
    said: list[tuple[Path, Any]] = [(card, _front_matter(card))] if card.is_file() else []
    for name in ("state.json", "dataset_dict.json"):
        for file in path.rglob(name):
            with contextlib.suppress(ValueError, RecursionError):  # whoever reads it says what is wrong
                said.append((file, json.loads(file.read_bytes())))
    for file, value in said:
        keys = ("_data_files", "filename", "splits") if file.suffix == ".json" else ("data_files", "data_dir", "path")
        for text in _texts_under(value, keys):
            if "://" in text or "::" in text or text.startswith(("/", "~")) or ".." in Path(text).parts:
                raise ConfigError(f"{file} names {text!r}, which is not in its folder: remove that entry")


_FRONT_MATTER = re.compile(r"\s*---[^\S\r\n]*[\r\n](.*?)[\r\n]---", re.DOTALL)
"""Of a card, as lenient as those who would follow what it says."""


def _front_matter(card: Path) -> Any:
    import yaml

    block = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))
    if block is None:
        return None
    try:
        return yaml.safe_load(block[1])
    except (yaml.YAMLError, RecursionError):
        return None  # `datasets` says what is wrong


def _texts_under(value: Any, keys: Sequence[str], within: bool = False) -> Iterator[str]:
    """Texts in plain values that stand under one of `keys`."""
    if isinstance(value, str) and within:
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts_under(inner, keys, within or key in keys)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts_under(inner, keys, within)


def _parquet_rows(files: Sequence[str], path: Path, settings: PromptSettings) -> Iterator[Placed]:
    from pyarrow.parquet import ParquetFile

    index = itertools.count()
    for file in files:
        with _datasets_errors(path):
            opened = ParquetFile(file)
        if not opened.metadata.num_rows:
            continue
        columns = _columns(opened.schema_arrow.names, path, settings)
        batches = opened.iter_batches(_ROWS, columns=columns, use_threads=False)  # see bank.py
        while True:
            with _datasets_errors(path):
                batch = next(batches, None)
                rows = [] if batch is None else _to_rows(batch)
            if batch is None:
                break
            for row in rows:
                yield f"{path}, row {next(index)}", row


def _to_rows(batch: Any) -> list[dict[str, Any]]:
    """Rows of a batch; numbers of few bits as the shortest decimal that is theirs, not as the longer one of many."""
    import pyarrow as pa

    rows = batch.to_pylist()
    for name, kind in zip(batch.schema.names, batch.schema.types, strict=True):
        if pa.types.is_float32(kind) or pa.types.is_float16(kind):
            narrow = kind.to_pandas_dtype()
            for row in rows:
                row[name] = row[name] and float(str(narrow(row[name])))
    return rows


def _rows(dataset: Iterable[dict[str, Any]], path: Path) -> Iterator[Placed]:
    rows, index = iter(dataset), itertools.count()
    while True:
        with _datasets_errors(path):
            some = list(itertools.islice(rows, _ROWS))
        for row in some:
            yield f"{path}, row {next(index)}", row
        if not some:
            return


def _columns(names: Sequence[str], path: Path, settings: PromptSettings) -> list[str]:
    """Those that the prompts and answers are in, or may be; no other is read."""
    wanted = [
        known if given is None else [given]
        for given, known in ((settings.prompt_field, _PROMPTS), (settings.answer_field, [*_ANSWERS, _SOLUTION]))
    ]
    found = [[name for name in names if any(name in (w, w.partition(".")[0]) for w in some)] for some in wanted]
    for some, setting in zip(found, ("prompt_field", "answer_field"), strict=True):
        if not some:
            raise _no_field(names, str(path), setting, getattr(settings, setting))
    return list(dict.fromkeys(itertools.chain.from_iterable(found)))


# ---- Columns --------------------------------------------------------------------------------------------

_PROMPTS = ("prompt", "problem", "Problem", "question")
_ANSWERS = ("reward_model.ground_truth", "final_answer", "expected_answer", "answer", "Answer")
_SOLUTION = "solution"
"""Holds the answer in a box, where no column has it alone."""
_MISSING = object()


@dataclass(frozen=True)
class Fields:
    """Where a data set has its prompts and answers."""

    prompt: str
    answer: str
    form: Literal["plain", "worked", "boxed", "list"]


def value_at(columns: Mapping[str, Any], name: str) -> Any:
    """The value of a column, or at a path into one; `_MISSING` where there is none."""
    if name in columns:
        return columns[name]
    first, _, rest = name.partition(".")
    inner = columns.get(first)
    return value_at(inner, rest) if rest and isinstance(inner, dict) else _MISSING


def fields_of(columns: Mapping[str, Any], settings: PromptSettings, place: str) -> Fields:
    """The fields that the settings name, else those that public data sets have.

    Raises:
        ConfigError: there are none, or several that could be meant.
    """
    prompt = settings.prompt_field or _one_of(_PROMPTS, columns, place, "prompt_field")
    answer = settings.answer_field
    if answer is None and any(value_at(columns, name) is not _MISSING for name in _ANSWERS):
        answer = _one_of(_ANSWERS, columns, place, "answer_field")
    answer = answer or (_SOLUTION if value_at(columns, _SOLUTION) is not _MISSING else None)
    for name, setting in ((prompt, "prompt_field"), (answer, "answer_field")):
        if name is None or value_at(columns, name) is _MISSING:
            raise _no_field(list(columns), place, setting, name)
    assert answer is not None
    value = value_at(columns, answer)
    form: Literal["plain", "worked", "boxed", "list"] = "plain"
    if isinstance(value, list):
        form = "list"
    elif "\n####" in str(value):
        form = "worked"
    elif answer == _SOLUTION and settings.answer_field is None:
        form = "boxed"
    return Fields(prompt, answer, settings.answer_form or form)


def _one_of(names: Sequence[str], columns: Mapping[str, Any], place: str, setting: str) -> str:
    found = [name for name in names if value_at(columns, name) is not _MISSING]
    if len(found) > 1:
        raise ConfigError(f"{place}: {' and '.join(found)} could be meant: set {setting} to one of them")
    if not found:
        raise _no_field(list(columns), place, setting, None)
    return found[0]


def _no_field(names: Sequence[str], place: str, setting: str, name: str | None) -> ConfigError:
    has = f"it has {', '.join(names) or 'none'}: set {setting}"
    if name is None:
        return ConfigError(f"{place} has no column of a name that is known for {setting}, {has}")
    return ConfigError(f"{place} has no field {name!r}, {has}" + _did_you_mean(name, names))


# ---- Data sets by their library -------------------------------------------------------------------------


@contextlib.contextmanager
def _datasets_errors(path: Path) -> Iterator[None]:
    """One message for what `datasets` cannot read, and neither its progress bars nor its log of the same error."""
    import datasets

    verbosity, bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    except IndexError:  # how it answers to a saved folder that has no rows
        raise ConfigError(f"{path} holds no prompts: give a source with at least one row") from None
    except (OSError, ValueError, OverflowError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ConfigError(
            f"{path} cannot be read as a dataset ({reason}): write it again, or give a .jsonl file"
        ) from None
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def _check_split(splits: Iterable[str], path: Path, settings: PromptSettings) -> None:
    names = [str(name) for name in splits]
    if settings.split not in names:
        raise ConfigError(
            f"{path} has no split {settings.split!r}, it has {', '.join(names)}: set split to one of them"
        )


def _mixed_problems(settings: PromptSettings, tasks: list[str]) -> Iterator[Row]:
    """Problems of one task, or of several in turn, each with settings of its own under its name."""
    if len(tasks) == 1:
        yield from _problems(settings, tasks[0])
        return
    for name, own in settings.task_settings.items():
        if name not in tasks:
            raise ConfigError(
                f"task_settings.{name} is not of one of the tasks in {settings.source}" + _did_you_mean(name, tasks)
            )
        if not isinstance(own, dict):
            raise ConfigError(f"task_settings.{name} must hold the settings of that task, not {short(own)}")
    if len(set(tasks)) < len(tasks) or settings.size < len(tasks):
        raise ConfigError(f"{settings.source} must name different tasks, and size be at least their number")
    streams = [
        _problems(
            dataclasses.replace(
                settings,
                source=REASONING_GYM + task,
                size=len(range(index, settings.size, len(tasks))),
                task_settings=settings.task_settings.get(task, {}),
            ),
            task,
        )
        for index, task in enumerate(tasks)
    ]
    for rows in itertools.zip_longest(*streams):
        yield from (row for row in rows if row is not None)


def _problems(settings: PromptSettings, task: str) -> Iterator[Row]:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise ConfigError(
            f"reasoning-gym has no task {task!r}" + _did_you_mean(task, DATASETS) + ": see the gallery of its "
            "repository for all of them"
        )
    known = {field.name for field in dataclasses.fields(DATASETS[task][1])} - {"size", "seed"}
    for name in settings.task_settings:
        if name in ("size", "seed"):
            raise ConfigError(f"task_settings.{name} is not read: set {name} itself, beside task_settings")
        if name not in known:
            raise ConfigError(
                f"{task} has no setting {name!r}" + _did_you_mean(name, known) + f", it has {', '.join(sorted(known))}"
            )
    with _task_errors(task, settings):
        dataset = reasoning_gym.create_dataset(task, size=settings.size, seed=settings.seed, **settings.task_settings)
    for index in range(len(dataset)):
        with _task_errors(task, settings):
            entry = dataset[index]
        metadata = json.loads(json.dumps(entry["metadata"]))
        if index == 0 and entry["answer"] is not None:
            _check_survives(task, dataset, entry, metadata)
        yield Row(f"{settings.source}, problem {index}", entry["question"], entry["answer"], task, metadata)


@contextlib.contextmanager
def _task_errors(task: str, settings: PromptSettings) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # tasks check their settings as they like, or fail on them anywhere
        raise ConfigError(
            f"{task} does not work with task_settings {settings.task_settings}: {' '.join(repr(error).split())}: "
            "change the setting that it names"
        ) from None


def _check_survives(task: str, dataset: Any, entry: dict[str, Any], metadata: dict[str, Any]) -> None:
    # JSON makes lists of tuples, and a scorer that compares tuples would then call every answer wrong.
    scores = [dataset.score_answer(entry["answer"], entry | {"metadata": m}) for m in (entry["metadata"], metadata)]
    if scores[0] != scores[1]:
        raise ConfigError(
            f"reasoning-gym's scorer of {task!r} gives its own answer {scores[1]} instead of {scores[0]} once the "
            "problem has been written as JSON, as our records are: choose another task"
        )


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f" (did you mean {' or '.join(near)}?)" if near else ""

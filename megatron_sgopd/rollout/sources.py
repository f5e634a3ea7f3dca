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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def short(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_rows(settings: PromptSettings) -> Iterator[Row]:
    """The rows of a source, as they stand there.

    Raises:
        ConfigError: naming the file and line, or the setting, that is wrong.
    """
    if settings.source.startswith(REASONING_GYM):
        return _mixed_problems(settings, settings.source.removeprefix(REASONING_GYM).split("+"))
    path = Path(settings.source)
    if path.is_dir():
        return _folder_rows(path, settings)
    if not path.exists():
        raise ConfigError(
            f"{settings.source} does not exist: give a .jsonl or .parquet file, a dataset folder, or "
            f"{REASONING_GYM}TASK"
        )
    if path.suffix == ".jsonl":
        return _json_lines(path, settings)
    if path.suffix == ".parquet":
        return _parquet_rows([str(path)], path, settings)
    raise ConfigError(
        f"{settings.source} has an unknown suffix {path.suffix!r}: give a .jsonl or .parquet file, or a dataset folder"
    )


def _json_lines(path: Path, settings: PromptSettings) -> Iterator[Row]:
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
                raise ConfigError(
                    f"{place} is no JSON ({error}): {short(line.strip())}: correct or remove it"
                ) from None
            if not isinstance(value, dict):
                raise ConfigError(f"{place} must be an object with fields, not {short(value)}: correct or remove it")
            _check_fields(value, place, settings)
            yield Row(place, value[settings.prompt_field], value[settings.answer_field])


def _folder_rows(path: Path, settings: PromptSettings) -> Iterator[Row]:
    import datasets

    _check_folder(path)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        with _datasets_errors(path):
            saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            _check_split(saved, path, settings)
            saved = saved[settings.split]
        _check_fields(saved.column_names, str(path), settings)
        return _rows(saved.select_columns(_columns(settings)), path, settings)
    with _datasets_errors(path):
        builder = datasets.load_dataset_builder(str(path))
    _check_split(builder.config.data_files, path, settings)
    files = builder.config.data_files[settings.split]
    check_inside(path, map(Path, files))
    if all(file.endswith(".jsonl") for file in files):
        return itertools.chain.from_iterable(_json_lines(Path(file), settings) for file in files)
    if all(file.endswith(".parquet") for file in files):
        return _parquet_rows(files, path, settings)
    with _datasets_errors(path):  # streamed: nothing of it is unpacked into a cache
        return _rows(builder.as_streaming_dataset(split=settings.split), path, settings)


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
            if "://" in text or text.startswith(("/", "~")) or ".." in Path(text).parts:
                raise ConfigError(f"{file} names {text!r}, which is not in its folder: remove that entry")


def _front_matter(card: Path) -> Any:
    import yaml

    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return None
    try:
        return yaml.safe_load(text.removeprefix("---").partition("\n---")[0])
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


def _parquet_rows(files: Sequence[str], path: Path, settings: PromptSettings) -> Iterator[Row]:
    from pyarrow.parquet import ParquetFile

    index = itertools.count()
    for file in files:
        with _datasets_errors(path):
            opened = ParquetFile(file)
        if not opened.metadata.num_rows:
            continue
        _check_fields(opened.schema_arrow.names, file, settings)
        batches = opened.iter_batches(_ROWS, columns=_columns(settings))
        while True:
            with _datasets_errors(path):
                batch = next(batches, None)
                rows = [] if batch is None else batch.to_pylist()
            if batch is None:
                break
            for row in rows:
                yield Row(f"{path}, row {next(index)}", row[settings.prompt_field], row[settings.answer_field])


def _rows(dataset: Iterable[dict[str, Any]], path: Path, settings: PromptSettings) -> Iterator[Row]:
    rows, index = iter(dataset), itertools.count()
    while True:
        with _datasets_errors(path):
            some = list(itertools.islice(rows, _ROWS))
        for row in some:
            _check_fields(row, str(path), settings)
            yield Row(f"{path}, row {next(index)}", row[settings.prompt_field], row[settings.answer_field])
        if not some:
            return


def _columns(settings: PromptSettings) -> list[str]:
    return list(dict.fromkeys([settings.prompt_field, settings.answer_field]))


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
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
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


def _check_fields(fields: Iterable[str], place: str, settings: PromptSettings) -> None:
    names = list(fields)
    for setting in ("prompt_field", "answer_field"):
        name = getattr(settings, setting)
        if name not in names:
            raise ConfigError(
                f"{place} has no field {name!r}, it has {', '.join(names) or 'none'}: set {setting}"
                + _did_you_mean(name, names)
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

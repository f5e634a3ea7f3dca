"""Files of JSON lines that a run appends to: read from the start, from the end, or as they grow, and cut back."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sgopd.checkpoint.files import new_file
from megatron_sgopd.errors import ConfigError

_LONGEST = 1 << 26
"""Bytes of a line; a run writes none that comes near."""
_BLOCK = 1 << 16
"""Bytes that are read at a time from the end."""


def append_json_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line to a file. JSON has neither NaN nor infinity: they are written as null."""
    with path.open("a") as file:
        file.write(json.dumps(finite(line), allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The plain value with None in place of numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file that a run writes, one at a time; the last one may have been cut off with it.

    Raises:
        ConfigError: a line is no JSON object.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), start=1):
            if line.endswith(b"\n"):
                yield parsed_line(line, f"{path}, line {number}")
            elif len(line) == _LONGEST:
                raise ConfigError(f"{path}, line {number} has more than {_LONGEST >> 20} MiB: remove that line")


def last_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file, the last one first, without reading what is before those that are asked for.

    Raises:
        ConfigError: a line is no JSON object.
    """
    for start, line in _backwards(path):
        yield parsed_line(line, f"{path}, the line at byte {start}")


def parsed_line(line: bytes, place: str) -> dict[str, Any]:
    """A line as the object that it is.

    Raises:
        ConfigError: it is none.
    """
    try:
        value = json.loads(line)
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON ({error}): mend or remove that line") from None
    return value


def drop_later_steps(path: Path, step: int, aside: Path | None = None) -> None:
    """Cut a file back to the lines of steps up to `step`, where it stands; of step 0 none is kept.

    The work is that of what is dropped, however much is before it.

    Args:
        aside: file that the dropped lines are added to.

    Raises:
        ConfigError: a line is no JSON object.
    """
    if not path.is_file():
        return
    end = keep = next((start + len(line) for start, line in _backwards(path)), 0)
    for start, line in _backwards(path):
        if parsed_line(line, f"{path}, the line at byte {start}")["step"] <= step and step > 0:
            break
        keep = start
    os.truncate(path, end)
    if aside is not None and keep < end:
        with path.open("rb") as file, aside.open("ab") as kept:
            file.seek(keep)
            shutil.copyfileobj(file, kept)
    os.truncate(path, keep)


def halve_steps(path: Path) -> None:
    """Drop every second of the steps that a file has lines of; the first and the last one stay."""
    with path.open("rb") as file:
        steps = sorted({parsed_line(line, str(path))["step"] for line in file if line.endswith(b"\n")})
    kept = {*steps[::2], *steps[-1:]}
    temporary = path.with_name(f"{path.name}.tmp")
    with path.open("rb") as file, new_file(temporary) as thinned:
        for line in file:
            if line.endswith(b"\n") and parsed_line(line, str(path))["step"] in kept:
                thinned.write(line)
    temporary.rename(path)


def is_cut(path: Path) -> bool:
    """Whether the last line of a file was cut off."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


class Growing:
    """The lines of a file that grows, each given once, and all of them anew where the file was cut back meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._end, self._last = 0, b""

    def forget(self) -> None:
        """Give all lines anew the next time: what they were read for has failed."""
        self._end, self._last = 0, b""

    def new_lines(self) -> tuple[bool, Iterator[tuple[int, bytes]]]:
        """Whether lines that were given before are no longer what the file has, and its new lines with their places."""
        if not self.path.is_file():
            again = self._end > 0
            self.forget()
            return again, iter(())
        with self.path.open("rb") as file:
            file.seek(self._end - len(self._last))
            again = file.read(len(self._last)) != self._last
        if again:
            self.forget()
        return again, self._read()

    def _read(self) -> Iterator[tuple[int, bytes]]:
        with self.path.open("rb") as file:
            file.seek(self._end)
            for line in iter(lambda: file.readline(_LONGEST), b""):
                if not line.endswith(b"\n"):
                    return
                start, self._end, self._last = self._end, self._end + len(line), line
                yield start, line


def _backwards(path: Path) -> Iterator[tuple[int, bytes]]:
    """Place and bytes of each whole line, the last one first."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        position, size = file.seek(0, os.SEEK_END), _BLOCK
        held, end = b"", 0  # the file's bytes from `position` on, and how many of them were not given yet
        while True:
            before = held.rfind(b"\n", 0, max(end - 1, 0))
            if before < 0 and end > _LONGEST:
                raise ConfigError(f"{path} has a line of more than {_LONGEST >> 20} MiB: remove that line")
            if before < 0 and position > 0:
                block = min(size, position)
                position, size = position - block, 2 * size  # doubled, so that a long line is not joined over and over
                file.seek(position)
                held, end = file.read(block) + held[:end], end + block
                continue
            start, size = before + 1, _BLOCK
            if start == end:
                return
            if held[end - 1 : end] == b"\n":
                yield position + start, held[start:end]
            end = start

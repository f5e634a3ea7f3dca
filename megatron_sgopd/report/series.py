"""metrics.jsonl as columns of numbers, and what a page draws of them."""

from __future__ import annotations

import itertools
import math
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.monitor.lines import Growing, parsed_line

STAGE_PREFIX = "seconds/"
"""Of a stage's seconds among a step's numbers."""
_MOST_NAMES = 2000
_BATCH = 1000
"""Steps that are held as objects."""


class Series:
    """The numbers of a run's steps by name; 8 bytes each. What a step did not have is NaN."""

    def __init__(self, path: Path) -> None:
        self._file = Growing(path)
        self._columns: dict[str, array[float]] = {}
        self.steps = 0
        """How many there are."""

    def refresh(self) -> None:
        """Read what was added since.

        Raises:
            ConfigError: a line is no JSON object.
        """
        again, lines = self._file.new_lines()
        if again:
            self._columns, self.steps = {}, 0
        try:
            for batch in itertools.batched((line for _, line in lines), _BATCH):
                self._add([self._parsed(line, self.steps + offset) for offset, line in enumerate(batch, start=1)])
        except ConfigError:
            self._file.forget()
            self._columns, self.steps = {}, 0
            raise

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            numbers = from_json(line)  # three times as fast as Python's
        except ValueError:
            numbers = None
        if not isinstance(numbers, dict):
            numbers = parsed_line(line, f"{self._file.path}, line {number}")
        stages = numbers.pop("stage_seconds", {})
        named = stages.items() if isinstance(stages, dict) else ()
        return numbers | {STAGE_PREFIX + stage: seconds for stage, seconds in named}

    def _add(self, steps: list[dict[str, Any]]) -> None:
        for name in dict.fromkeys(itertools.chain.from_iterable(steps)):
            values = [step.get(name, math.nan) for step in steps]
            try:
                added = array("d", values)
            except (TypeError, OverflowError):
                known = [value if isinstance(value, float) or _is_small(value) else math.nan for value in values]
                if name not in self._columns and all(map(math.isnan, known)):
                    continue  # no number
                added = array("d", known)
            if len(self._columns) > _MOST_NAMES:
                raise ConfigError(f"{self._file.path} has more than {_MOST_NAMES} names: it is no run's")
            column = self._columns.setdefault(name, array("d"))
            column.extend(itertools.repeat(math.nan, self.steps - len(column)))
            column.extend(added)
        self.steps += len(steps)

    @property
    def names(self) -> list[str]:
        """Of the numbers that any step has."""
        return list(self._columns)

    def of(self, name: str) -> np.ndarray:
        """float64 [steps]; NaN where a step has no such number, or none that is finite."""
        column = self._columns.get(name, array("d"))
        values_N = np.full(self.steps, math.nan)
        values_N[: len(column)] = column
        values_N[~np.isfinite(values_N)] = math.nan
        return values_N


def _is_small(value: Any) -> bool:
    return isinstance(value, int) and abs(value) < 1 << 53


def thinned(values_N: np.ndarray, points: int) -> np.ndarray:
    """At most so many means of neighbours, NaN where none of them is known."""
    if not len(values_N):
        return values_N
    known_N = ~np.isnan(values_N)
    starts = np.arange(0, len(values_N), max(1, math.ceil(len(values_N) / points)))
    counts = np.add.reduceat(known_N.astype(float), starts)
    sums = np.add.reduceat(np.where(known_N, values_N, 0.0), starts)
    return np.divide(sums, counts, out=np.full(len(starts), math.nan), where=counts > 0)

"""What a run folder holds, read as it is: the run may be going on, or have died in the middle of a line."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sgopd.common.data_files import read_yaml
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.monitor.attempts import ATTEMPTS, OUTCOMES, read_attempts
from megatron_sgopd.monitor.diagnosis import diagnosis
from megatron_sgopd.monitor.lines import Growing, is_cut, last_json_lines, parsed_line, read_json_lines
from megatron_sgopd.monitor.output import (
    EVALUATIONS,
    EXIT_STOPPED,
    LOGS,
    METRICS,
    RESOLVED,
    SAMPLES,
    SUMMARY,
    is_claimed,
)

RECENT_STEPS = 20
_STEP = re.compile(rb'\{"step": (\d+),')


@dataclass(frozen=True)
class RunFolder:
    """A run as far as it got."""

    path: Path
    recipe: dict[str, Any]
    """With all defaults; empty for a run that was started by a Megatron script of the user's own."""
    recent: list[dict[str, Any]]
    """Metrics of the last steps, RECENT_STEPS at most, the oldest first."""
    ended: bool
    """The last step was reached."""
    alarms: list[str]
    """What stopped the run, and what a reader of its numbers should know."""

    @property
    def step(self) -> int:
        """Steps done."""
        return self.recent[-1]["step"] if self.recent else 0

    def evaluations(self) -> Iterator[dict[str, Any]]:
        """The scores on the held-out problems, the first ones first.

        Raises:
            ConfigError: a line is not what a run writes.
        """
        for number, line in enumerate(read_json_lines(self.path / EVALUATIONS), start=1):
            numbers = (line.get("step"), line.get("pass_rate"))
            if not (isinstance(line.get("name"), str) and all(map(_is_number, numbers))):
                raise ConfigError(
                    f"{self.path / EVALUATIONS}, line {number} is not as a run writes it: remove that line"
                )
            yield line


def read_run(path: Path) -> RunFolder:
    """Read what there is to say of a run now; its past, however long, is left on the disk.

    Raises:
        ConfigError: it is none, or its last lines are broken.
    """
    if not ((path / METRICS).is_file() or (path / ATTEMPTS).is_file()):
        raise ConfigError(
            f"{path} is not the folder of a run: it has no {METRICS}. Give the run_dir of a training run; those of a "
            "comparison are OUT/cells/VARIANT/seed_N"
        )
    recipe = _recipe(path / RESOLVED)
    recent = list(itertools.islice(last_json_lines(path / METRICS), RECENT_STEPS))[::-1]
    if not all(_is_number(line.get(name)) for line in recent for name in ("step", "seconds")):
        raise ConfigError(f"{path / METRICS} is not as a run writes it: a line has no step or no seconds")
    # A summary may be that of an earlier attempt with fewer steps.
    reached = not recipe or (recent and recent[-1]["step"] >= recipe["train"]["steps"])
    ended = (path / SUMMARY).is_file() and bool(reached)
    alarms = [] if _well(path, ended) else [said for said in [diagnosis(path)] if said]
    alarms += [
        f"{name}: its last line is cut off, as of a run that was killed, and is left out"
        for name in (METRICS, EVALUATIONS, SAMPLES)
        if is_cut(path / name)
    ]
    return RunFolder(
        path=path,
        recipe=recipe,
        recent=recent,
        ended=ended,
        alarms=alarms + _counted_faults(recent[-1] if recent else {}),
    )


def _is_number(value: Any) -> bool:
    """One that a run may have counted or measured."""
    return isinstance(value, int | float) and abs(value) < 1e15


def _recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    recipe = read_yaml(path)
    sections = ("train", "sgopd", "model", "teacher", "alarms")
    if not (isinstance(recipe, dict) and all(isinstance(recipe.get(name), dict) for name in sections)):
        raise ConfigError(f"{path} is not as a run writes it: it lacks one of the sections {', '.join(sections)}")
    if not isinstance(recipe["train"].get("steps"), int):
        raise ConfigError(f"{path} is not as a run writes it: train.steps is {recipe['train'].get('steps')!r}")
    return recipe


def _well(path: Path, ended: bool) -> bool:
    """Whether a run goes on, or its last attempt ended as it should: its ranks' last words tell of no death.

    Args:
        ended: all steps are there, which is all that is known of a run without attempts.
    """
    attempts = read_attempts(path)
    well = attempts[-1].outcome in (OUTCOMES[0], OUTCOMES[EXIT_STOPPED]) if attempts else ended
    return is_claimed(path) or well


class Samples:
    """Sampled responses of a run. The file may be far larger than what is read of it into memory."""

    def __init__(self, path: Path) -> None:
        self._file = Growing(path)
        self._lines: list[tuple[int, int, int]] = []
        """Step, first byte and length of each."""

    def refresh(self) -> None:
        """Note where those are that were added since.

        Raises:
            ConfigError: a line is not what a run writes.
        """
        again, lines = self._file.new_lines()
        if again:
            self._lines = []
        for start, line in lines:
            step = _STEP.match(line)
            if step is None:
                number = len(self._lines) + 1
                self._file.forget()
                self._lines = []
                raise ConfigError(f"{self._file.path}, line {number} is not a sampled response: remove that line")
            self._lines.append((int(step[1]), start, len(line)))

    def chosen(self, budget: int) -> tuple[list[dict[str, Any]], int]:
        """Some of them, and how many are left out to keep within `budget` bytes of their file.

        Their steps are at even distances, the last one among them, and remain chosen while a run goes on, until there
        are twice as many.

        Raises:
            ConfigError: one of them is no JSON.
        """
        steps = sorted({step for step, _, _ in self._lines})
        every = 1
        while True:
            chosen = {*steps[::every], *steps[-1:]}
            size = sum(length for step, _, length in self._lines if step in chosen)
            if size <= budget or every > len(steps):
                break
            every *= 2
        found, left = [], budget
        if not chosen:
            return [], 0
        with self._file.path.open("rb") as file:
            for number, (step, start, length) in enumerate(self._lines, start=1):
                if step not in chosen or length > left:
                    continue
                left -= length
                file.seek(start)
                found.append(parsed_line(file.read(length), f"{self._file.path}, line {number}"))
        return found, len(self._lines) - len(found)


def state(paths: Sequence[Path]) -> str:
    """Changes whenever something that a page shows does."""
    found: list[Any] = []
    for path in paths:
        named = [path / name for name in (RESOLVED, METRICS, EVALUATIONS, SAMPLES, SUMMARY, ATTEMPTS)]
        found.append(is_claimed(path))
        for file in (*named, *sorted((path / LOGS).glob("*.error"))):
            found.append((file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else None)
    return hashlib.blake2b(repr(found).encode(), digest_size=8).hexdigest()


def _counted_faults(last: dict[str, Any]) -> list[str]:
    """What a step's metrics say of all steps and answers until then."""
    skipped = last.get("skipped_steps", 0)
    said = [f"{skipped} steps had nothing to train on, since settings left every response out"] * bool(skipped)
    return said + [
        f"verifier: {last[name]} answers, those of evaluations included, are wrong for the fault "
        f"'{name.removeprefix('verifier_')}'"
        for name in sorted(name for name in last if name.startswith("verifier_"))
        if last[name]
    ]

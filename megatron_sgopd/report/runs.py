"""What a run folder holds, read as it is: the run may be going on, or have died in the middle of a line."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.monitor.attempts import ATTEMPTS, OUTCOMES, read_attempts
from megatron_sgopd.monitor.diagnosis import diagnosis
from megatron_sgopd.monitor.output import (
    EVALUATIONS,
    EXIT_STOPPED,
    LOGS,
    METRICS,
    SAMPLES,
    SUMMARY,
    is_claimed,
    is_cut,
    read_json_lines,
)
from megatron_sgopd.recipe import RESOLVED

_STEP = re.compile(rb'\{"step": (\d+),')


@dataclass(frozen=True)
class RunFolder:
    """A run as far as it got."""

    path: Path
    recipe: dict[str, Any]
    """With all defaults; empty for a run that was started by a Megatron script of the user's own."""
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    ended: bool
    """The last step was reached."""
    alarms: list[str]
    """What stopped the run, and what a reader of its numbers should know."""

    @property
    def step(self) -> int:
        """Steps done."""
        return self.metrics[-1]["step"] if self.metrics else 0


def read_run(path: Path) -> RunFolder:
    """Read a run folder, all but its sampled responses.

    Raises:
        ConfigError: it is none, or one of its files is broken before its last line.
    """
    if not ((path / METRICS).is_file() or (path / ATTEMPTS).is_file()):
        raise ConfigError(
            f"{path} is not the folder of a run: it has no {METRICS}. Give the run_dir of a training run; those of a "
            "comparison are OUT/cells/VARIANT/seed_N"
        )
    recipe = yaml.safe_load((path / RESOLVED).read_text()) if (path / RESOLVED).is_file() else {}
    metrics = read_json_lines(path / METRICS)
    # A summary may be that of an earlier attempt with fewer steps.
    reached = not recipe or (metrics and metrics[-1]["step"] >= recipe["train"]["steps"])
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
        metrics=metrics,
        evaluations=read_json_lines(path / EVALUATIONS),
        ended=ended,
        alarms=alarms + _verifier_faults(metrics),
    )


def _well(path: Path, ended: bool) -> bool:
    """Whether a run goes on, or its last attempt ended as it should: its ranks' last words tell of no death.

    Args:
        ended: all steps are there, which is all that is known of a run without attempts.
    """
    attempts = read_attempts(path)
    well = attempts[-1].outcome in (OUTCOMES[0], OUTCOMES[EXIT_STOPPED]) if attempts else ended
    return is_claimed(path) or well


def read_samples(path: Path, budget: int) -> tuple[list[dict[str, Any]], int]:
    """Sampled responses of a run, and how many are left out to keep within `budget` bytes of their file.

    Their steps are at even distances, the last one among them, and remain chosen while a run goes on, until there are
    twice as many. The file may be far larger than what is read of it into memory.

    Raises:
        ConfigError: a line is not what a run writes.
    """
    lines = _lines_by_step(path / SAMPLES)
    steps = sorted({step for step, _, _ in lines})
    every = 1
    while True:
        chosen = {*steps[::every], *steps[-1:]}
        size = sum(length for step, _, length in lines if step in chosen)
        if size <= budget or every > len(steps):
            break
        every *= 2
    found, left = [], budget
    if not chosen:
        return [], 0
    with (path / SAMPLES).open("rb") as file:
        for number, (step, start, length) in enumerate(lines, start=1):
            if step not in chosen or length > left:
                continue
            left -= length
            file.seek(start)
            try:
                found.append(json.loads(file.read(length)))
            except ValueError as error:
                raise ConfigError(f"{path / SAMPLES}, line {number} is not JSON ({error}): remove that line") from None
    return found, len(lines) - len(found)


def _lines_by_step(path: Path) -> list[tuple[int, int, int]]:
    """Step, first byte and length of each whole line."""
    if not path.is_file():
        return []
    lines, start = [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            step = _STEP.match(line)
            if step is None:
                raise ConfigError(f"{path}, line {number} is not a sampled response: remove that line")
            lines.append((int(step[1]), start, len(line)))
            start += len(line)
    return lines


def state(paths: Sequence[Path]) -> str:
    """Changes whenever something that a page shows does."""
    found = []
    for path in paths:
        named = [path / name for name in (RESOLVED, METRICS, EVALUATIONS, SAMPLES, SUMMARY)]
        for file in (*named, *sorted((path / LOGS).glob("*.error"))):
            found.append((file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else None)
    return hashlib.blake2b(repr(found).encode(), digest_size=8).hexdigest()


def _verifier_faults(metrics: Sequence[dict[str, Any]]) -> list[str]:
    """Sums over attempts: in each the counts begin anew."""
    faults = []
    for name in sorted(name for name in (metrics[-1] if metrics else {}) if name.startswith("verifier_")):
        counts = [0, *(line.get(name, 0) for line in metrics)]
        total = sum(now - before if now >= before else now for before, now in itertools.pairwise(counts))
        if total:
            fault = name.removeprefix("verifier_")
            faults.append(
                f"verifier: {total} answers, those of evaluations included, are wrong for the fault '{fault}'"
            )
    return faults

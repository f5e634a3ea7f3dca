"""What a run folder holds, read as it is: the run may be going on, or have died in the middle of a line."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.monitor.output import EVALUATIONS, LOGS, METRICS, SAMPLES, SUMMARY, read_json_lines
from megatron_sgopd.recipe import RESOLVED

_LONGEST_MESSAGE = 4000


@dataclass(frozen=True)
class RunFolder:
    """A run as far as it got."""

    path: Path
    recipe: dict[str, Any]
    """With all defaults; empty for a run that was started by a Megatron script of the user's own."""
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    ended: bool
    """The last step was reached."""
    alarms: list[str]
    """What stopped the run, and what a reader of its numbers should know."""


def read_run(path: Path) -> RunFolder:
    """Read a run folder.

    Raises:
        ConfigError: it is none, or one of its files is broken before its last line.
    """
    if not (path / METRICS).is_file():
        raise ConfigError(
            f"{path} is not the folder of a run: it has no {METRICS}. Give the run_dir of a training run; those of a "
            "comparison are OUT/cells/VARIANT/seed_N"
        )
    recipe = yaml.safe_load((path / RESOLVED).read_text()) if (path / RESOLVED).is_file() else {}
    metrics = read_json_lines(path / METRICS)
    alarms = [
        f"{error.stem} failed: {error.read_text().strip()[-_LONGEST_MESSAGE:]}"
        for error in sorted((path / LOGS).glob("*.error"), key=lambda error: error.stat().st_mtime)
    ]
    alarms += [
        f"{name}: its last line is cut off, as of a run that was killed, and is left out"
        for name in (METRICS, EVALUATIONS, SAMPLES)
        if _is_cut(path / name)
    ]
    last = metrics[-1] if metrics else {}
    alarms += [
        f"verifier: {last[name]} answers had the fault '{name.removeprefix('verifier_')}', and count as wrong"
        for name in sorted(last)
        if name.startswith("verifier_") and last[name]
    ]
    return RunFolder(
        path=path,
        recipe=recipe,
        metrics=metrics,
        evaluations=read_json_lines(path / EVALUATIONS),
        samples=read_json_lines(path / SAMPLES),
        # A summary may be that of an earlier attempt with fewer steps.
        ended=(path / SUMMARY).is_file() and not (recipe and last.get("step", 0) < recipe["train"]["steps"]),
        alarms=alarms,
    )


def state(paths: Sequence[Path]) -> str:
    """Changes whenever something that a page shows does."""
    found = []
    for path in paths:
        named = [path / name for name in (METRICS, EVALUATIONS, SAMPLES, SUMMARY)]
        for file in (*named, *sorted((path / LOGS).glob("*.error"))):
            found.append((file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else None)
    return hashlib.blake2b(repr(found).encode(), digest_size=8).hexdigest()


def _is_cut(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() != b"\n"

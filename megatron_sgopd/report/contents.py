"""What a page shows, as plain values: curves with intervals, series of a run thinned to a screen, sampled responses."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sgopd.compare.table import interval
from megatron_sgopd.report.runs import RunFolder, read_run, read_samples

SAMPLE_BYTES = 12_000_000
"""Of samples.jsonl that a page shows, over all its runs; packing makes a fourth of them."""
SERIES_POINTS = 1000
"""Of a page's series, over all its runs, where each has at least FEWEST_POINTS."""
FEWEST_POINTS = 50
CURVE_POINTS = 40
_FEWEST_STEPS = 4
"""Of a point of the training curve: the spread of its steps makes its interval."""
_RESAMPLES = 2000
_DIGITS = 5


def contents(paths: Sequence[Path]) -> dict[str, Any]:
    """Everything that a page shows about these run folders.

    Raises:
        ConfigError: one of them is none, or broken.
    """
    runs = [read_run(path) for path in dict.fromkeys(path.resolve() for path in paths)]
    names = _names([run.path for run in runs])
    groups: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        groups.setdefault(_same_but_for_seed(run), []).append(index)
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "groups": [
            _group([runs[i] for i in members])
            | {"name": _group_name(names, members, runs[members[0]]), "members": members}
            for members in groups.values()
        ],
        "runs": [_run(run, name, len(runs)) for run, name in zip(runs, names, strict=True)],
    }


def _same_but_for_seed(run: RunFolder) -> str:
    if not run.recipe:
        return str(run.path)
    train = {name: value for name, value in run.recipe["train"].items() if name != "seed"}
    return json.dumps(run.recipe | {"train": train, "run_dir": None}, sort_keys=True)


def _names(paths: Sequence[Path]) -> list[str]:
    """As short as tells them apart."""
    if len(paths) == 1:
        return [paths[0].name]
    common = os.path.commonpath(paths)
    return [os.path.relpath(path, common) for path in paths]


def _group_name(names: Sequence[str], members: Sequence[int], first: RunFolder) -> str:
    """The folder that its runs have for themselves, or the first of them."""
    if len(members) == 1:
        return names[members[0]]
    shared = os.path.commonpath([names[i] for i in members])
    others = [name for i, name in enumerate(names) if i not in members]
    if not shared or any(name.startswith(f"{shared}/") for name in others):
        shared = f"{first.recipe['sgopd']['method']}: {names[members[0]]}, …"
    return f"{shared} ({len(members)} runs)"


def _group(runs: Sequence[RunFolder]) -> dict[str, Any]:
    teacher = [line["pass_rate"] for run in runs for line in run.evaluations if line["name"] == "teacher"]
    return {
        "training": _training_curve(runs),
        "heldout": _heldout_curve(runs),
        "teacher": _rounded(float(np.mean(teacher))) if teacher else None,
    }


def _training_curve(runs: Sequence[RunFolder]) -> list[list[float]]:
    """Middle step, pass rate with its interval over runs and the steps around it, and how many runs got there."""
    # A step without a response of the student's has no rate.
    by_run = [
        {line["step"]: line["pass_rate"] for line in run.metrics if line["pass_rate"] is not None} for run in runs
    ]
    steps = max(run.step for run in runs)
    width = max(_FEWEST_STEPS, math.ceil(steps / CURVE_POINTS))
    points = []
    for first in range(1, steps - width + 2, width):
        members = range(first, first + width)
        values = [[rates[step] for step in members] for rates in by_run if all(step in rates for step in members)]
        if values:
            score = interval(np.array(values), resamples=_RESAMPLES)
            points.append(_point(first + (width - 1) / 2, score.mean, score.low, score.high, len(values)))
    return points


def _heldout_curve(runs: Sequence[RunFolder]) -> list[list[float]]:
    """Step, pass rate with its interval over runs and problems, and how many runs were evaluated there."""
    lines: dict[int, list[dict[str, Any]]] = {}
    for run in runs:
        for line in run.evaluations:
            if line["name"] != "teacher":
                lines.setdefault(line["step"], []).append(line)
    points = []
    for step, found in sorted(lines.items()):
        if len(found) == 1:  # the run has taken it
            score = found[0]["scores"][f"avg@{found[0]['samples']}"]
            points.append(_point(step, score["mean"], score["low"], score["high"], 1))
        else:
            both = interval(np.array([line["by_problem"] for line in found]), resamples=_RESAMPLES)
            points.append(_point(step, both.mean, both.low, both.high, len(found)))
    return points


def _point(step: float, mean: float, low: float, high: float, runs: int) -> list[float]:
    return [step, _rounded(mean), _rounded(low), _rounded(high), runs]


def _run(run: RunFolder, name: str, runs: int) -> dict[str, Any]:
    def setting(section: str, key: str) -> Any:
        return run.recipe[section][key] if run.recipe else None

    samples, left_out = read_samples(run.path, SAMPLE_BYTES // runs)
    alarms = list(run.alarms)
    if left_out:
        total = left_out + len(samples)
        alarms.append(f"tokens: {left_out} of {total} sampled responses are left out, to keep the page small")
    # An evaluation after the last step is an earlier attempt's if there were further steps.
    rates = {line["name"]: line["pass_rate"] for line in run.evaluations if line["step"] in (0, run.step)}
    return {
        "name": name,
        "method": setting("sgopd", "method"),
        "seed": setting("train", "seed"),
        "learning_rate": setting("train", "learning_rate"),
        "student": setting("model", "path"),
        "teacher": setting("teacher", "path"),
        "gap_limit": setting("alarms", "logprob_gap"),
        "step": run.step,
        "steps": setting("train", "steps"),
        "ended": run.ended,
        "before": rates.get("before"),
        "after": rates.get("after"),
        "seconds": sum(line["seconds"] for line in run.metrics),
        "alarms": alarms,
        "series": _series(run.metrics, max(FEWEST_POINTS, SERIES_POINTS // runs)),
        # The tokens' texts make the response's.
        "samples": [{key: value for key, value in line.items() if key != "response"} for line in samples],
        "samples_left_out": left_out,
    }


def _series(metrics: Sequence[dict[str, Any]], points: int) -> dict[str, list[float | None]]:
    """Each logged number over the steps, a stage's seconds under `seconds/STAGE`, in at most so many means."""
    lines = [
        {name: value for name, value in line.items() if isinstance(value, int | float) or value is None}
        | {f"seconds/{stage}": seconds for stage, seconds in line["stage_seconds"].items()}
        for line in metrics
    ]
    names = list(dict.fromkeys(name for line in lines for name in line))
    width = max(1, math.ceil(len(lines) / points))
    series = {}
    for name in names:
        # A stage that a step did not have took no time.
        missing = 0.0 if name.startswith("seconds/") else math.nan
        values_N = np.array([missing if (v := line.get(name, missing)) is None else v for line in lines], dtype=float)
        bins = [values_N[start : start + width] for start in range(0, len(values_N), width)]
        series[name] = [_rounded(float(np.mean(known))) if len(known := b[~np.isnan(b)]) else None for b in bins]
    return series


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")

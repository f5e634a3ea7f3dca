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
from megatron_sgopd.report.runs import RunFolder

SAMPLE_TOKENS = 150_000
"""Tokens of sampled responses on a page, about 15 bytes each; keeps it below 10 MB."""
SERIES_POINTS = 1000
CURVE_POINTS = 40
_FEWEST_STEPS = 4
"""Of a point of the training curve: the spread of its steps makes its interval."""
_RESAMPLES = 2000
_DIGITS = 5


def contents(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Everything that a page shows about these runs."""
    names = _names([run.path for run in runs])
    groups: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        groups.setdefault(_same_but_for_seed(run), []).append(index)
    budget = SAMPLE_TOKENS // len(runs)
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "groups": [
            _group([runs[i] for i in members], [names[i] for i in members]) | {"members": members}
            for members in groups.values()
        ],
        "runs": [_run(run, name, budget) for run, name in zip(runs, names, strict=True)],
    }


def _same_but_for_seed(run: RunFolder) -> str:
    if not run.recipe:
        return str(run.path)
    train = {name: value for name, value in run.recipe["train"].items() if name != "seed"}
    return json.dumps(run.recipe | {"train": train, "run_dir": None}, sort_keys=True)


def _names(paths: Sequence[Path]) -> list[str]:
    """As short as tells them apart."""
    resolved = [path.resolve() for path in paths]
    if len(resolved) == 1:
        return [resolved[0].name]
    common = os.path.commonpath(resolved)
    return [os.path.relpath(path, common) for path in resolved]


def _group(runs: Sequence[RunFolder], names: Sequence[str]) -> dict[str, Any]:
    shared = os.path.commonpath(names) if len(names) > 1 else names[0]
    return {
        "name": (shared or "runs") + (f" ({len(runs)} seeds)" if len(runs) > 1 else ""),
        "training": _training_curve(runs),
        "heldout": _heldout_curve(runs),
        "teacher": _teacher(runs),
    }


def _training_curve(runs: Sequence[RunFolder]) -> list[list[float]]:
    """Step, mean pass rate of the steps around it, and its interval over seeds and those steps."""
    steps = min(len(run.metrics) for run in runs)
    values_SN = np.array([[line["pass_rate"] for line in run.metrics[:steps]] for run in runs])
    width = max(_FEWEST_STEPS, math.ceil(steps / CURVE_POINTS))
    points = []
    for start in range(0, steps - steps % width, width):
        score = interval(values_SN[:, start : start + width], resamples=_RESAMPLES)
        middle = runs[0].metrics[start]["step"] + (width - 1) / 2
        points.append([middle, *(_rounded(x) for x in (score.mean, score.low, score.high))])
    return points


def _heldout_curve(runs: Sequence[RunFolder]) -> list[list[float]]:
    """Step, pass rate, and its interval over seeds and problems, at the steps that every run was evaluated at."""
    by_run = [
        {line["step"]: line["by_problem"] for line in run.evaluations if line["name"] != "teacher"} for run in runs
    ]
    points = []
    for step in sorted(set.intersection(*(set(found) for found in by_run))):
        score = interval(np.array([found[step] for found in by_run]), resamples=_RESAMPLES)
        points.append([step, *(_rounded(x) for x in (score.mean, score.low, score.high))])
    return points


def _teacher(runs: Sequence[RunFolder]) -> float | None:
    rates = [line["pass_rate"] for run in runs for line in run.evaluations if line["name"] == "teacher"]
    return _rounded(float(np.mean(rates))) if rates else None


def _run(run: RunFolder, name: str, budget: int) -> dict[str, Any]:
    recipe = run.recipe
    rates = {line["name"]: line["pass_rate"] for line in run.evaluations}
    samples, left_out = _within(run.samples, budget)
    alarms = list(run.alarms)
    if left_out:
        alarms.append(
            f"viewer: {left_out} of {len(run.samples)} sampled responses are left out, to keep the page small"
        )
    last = run.metrics[-1]["step"] if run.metrics else 0
    return {
        "name": name,
        "method": recipe["sgopd"]["method"] if recipe else None,
        "seed": recipe["train"]["seed"] if recipe else None,
        "learning_rate": recipe["train"]["learning_rate"] if recipe else None,
        "student": recipe["model"]["path"] if recipe else None,
        "teacher": recipe["teacher"]["path"] if recipe else None,
        "gap_limit": recipe["alarms"]["logprob_gap"] if recipe else None,
        "step": last,
        "steps": recipe["train"]["steps"] if recipe else None,
        "ended": run.ended,
        "before": rates.get("before"),
        "after": rates.get("after"),
        "seconds": sum(line["seconds"] for line in run.metrics),
        "alarms": alarms,
        "series": _series(run.metrics),
        "samples": samples,
    }


def _series(metrics: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Each logged number over the steps, a stage's seconds under `seconds/STAGE`, in at most SERIES_POINTS means."""
    lines = [
        {name: value for name, value in line.items() if isinstance(value, int | float) or value is None}
        | {f"seconds/{stage}": seconds for stage, seconds in line["stage_seconds"].items()}
        for line in metrics
    ]
    names = list(dict.fromkeys(name for line in lines for name in line))
    width = max(1, math.ceil(len(lines) / SERIES_POINTS))
    series = {}
    for name in names:
        # A stage that a step did not have took no time.
        missing = 0.0 if name.startswith("seconds/") else math.nan
        values_N = np.array([missing if (v := line.get(name, missing)) is None else v for line in lines], dtype=float)
        bins = [values_N[start : start + width] for start in range(0, len(values_N), width)]
        series[name] = [_rounded(float(np.mean(known))) if len(known := b[~np.isnan(b)]) else None for b in bins]
    return series


def _within(samples: Sequence[dict[str, Any]], budget: int) -> tuple[list[dict[str, Any]], int]:
    """Responses of steps at even distances that together have at most `budget` tokens, and how many are left out."""
    total = sum(len(line["tokens"]["text"]) for line in samples)
    steps = sorted({line["step"] for line in samples})
    if total > budget:
        count = max(1, len(steps) * budget // total)
        steps = [steps[round(i)] for i in np.linspace(0, len(steps) - 1, count)]
    kept, tokens = [], 0
    for line in samples:
        tokens += len(line["tokens"]["text"]) if line["step"] in steps else 0
        if line["step"] in steps and tokens <= budget:
            kept.append(line)
    return kept, len(samples) - len(kept)


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")

"""What a page shows, as plain values: curves with intervals, series of a run thinned to a screen, sampled responses."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sgopd.compare.table import interval
from megatron_sgopd.evaluation.protocol import MEASURED, differences, last_measured, measured_as
from megatron_sgopd.monitor.lines import finite
from megatron_sgopd.monitor.output import METRICS, SAMPLES
from megatron_sgopd.report.runs import RunFolder, Samples, read_run
from megatron_sgopd.report.series import STAGE_PREFIX, Series, thinned

SAMPLE_BYTES = 12_000_000
"""Of samples.jsonl that a page shows, over all its runs; packing makes a fourth of them."""
SERIES_POINTS = 1000
"""Of a page's series, over all its runs, where each has at least FEWEST_POINTS."""
FEWEST_POINTS = 50
CURVE_POINTS = 40
_FEWEST_STEPS = 4
"""Of a point of the training curve: the spread of its steps makes its interval."""
_MOST_BLOCKS = 50
"""Of a point of the training curve: where it has more steps, neighbours count as one for the interval."""
_DIGITS = 5


@dataclass(frozen=True)
class _Shown:
    """A run with all that a page shows of it."""

    run: RunFolder
    series: Series
    samples: Samples
    evaluations: list[dict[str, Any]]

    @property
    def path(self) -> Path:
        return self.run.path

    @property
    def recipe(self) -> dict[str, Any]:
        return self.run.recipe


class Contents:
    """Everything that a page shows about run folders; of metrics and samples each call reads what is new."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._folders = [
            (path, Series(path / METRICS), Samples(path / SAMPLES))
            for path in dict.fromkeys(path.resolve() for path in paths)
        ]
        self.private = True
        """Whether one of them is not for others to see; known once they were read."""

    def __call__(self) -> dict[str, Any]:
        """Plain values, without a number that is not finite.

        Raises:
            ConfigError: one of the folders is none of a run, or broken.
        """
        runs = []
        for path, series, samples in self._folders:
            run = read_run(path)
            series.refresh()
            samples.refresh()
            runs.append(_Shown(run, series, samples, list(run.evaluations())))
        runs = _alike(runs)
        self.private = any(run.recipe.get("private", True) for run in runs)
        return finite(_contents(runs))


def _alike(runs: Sequence[_Shown]) -> list[_Shown]:
    """The runs with those of their evaluations that may stand side by side: measured as the first run's last one."""
    like = next((last_measured(run.evaluations) for run in runs if run.evaluations), None)
    shown = []
    for run in runs:
        if others := [line for line in run.evaluations if line.get(MEASURED) != like]:
            said = differences(others[0].get(MEASURED), like)
            alarm = (
                f"{len(others)} evaluations are left out, since they were measured otherwise than others here: {said}"
            )
            run = dataclasses.replace(
                run,
                evaluations=measured_as(run.evaluations, like),
                run=dataclasses.replace(run.run, alarms=[*run.run.alarms, alarm]),
            )
        shown.append(run)
    return shown


def _contents(runs: Sequence[_Shown]) -> dict[str, Any]:
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


def _same_but_for_seed(run: _Shown) -> str:
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


def _group_name(names: Sequence[str], members: Sequence[int], first: _Shown) -> str:
    """The folder that its runs have for themselves, or the first of them."""
    if len(members) == 1:
        return names[members[0]]
    shared = os.path.commonpath([names[i] for i in members])
    others = [name for i, name in enumerate(names) if i not in members]
    if not shared or any(name.startswith(f"{shared}/") for name in others):
        shared = f"{first.recipe['sgopd'].get('method')}: {names[members[0]]}, …"
    return f"{shared} ({len(members)} runs)"


def _group(runs: Sequence[_Shown]) -> dict[str, Any]:
    teacher = [line["pass_rate"] for run in runs for line in run.evaluations if line["name"] == "teacher"]
    return {
        "training": _training_curve(runs),
        "heldout": _heldout_curve(runs),
        "teacher": _rounded(float(np.mean(teacher))) if teacher else None,
    }


def _training_curve(runs: Sequence[_Shown]) -> list[list[float]]:
    """Middle step, pass rate with its interval over runs and the steps around it, and how many runs got there."""
    # A step without a response of the student's has no rate.
    longest = max(run.series.steps for run in runs)
    rates_RS = np.full((len(runs), longest), np.nan)
    for rates_S, run in zip(rates_RS, runs, strict=True):
        rates_S[: run.series.steps] = run.series.of("pass_rate")
    width = max(_FEWEST_STEPS, math.ceil(longest / CURVE_POINTS))
    together = math.ceil(width / _MOST_BLOCKS)
    width = math.ceil(width / together) * together
    points = []
    for first in range(0, longest - width + 1, width):
        blocks_RB = rates_RS[:, first : first + width].reshape(len(runs), -1, together).mean(axis=2)
        values_RB = blocks_RB[~np.isnan(blocks_RB).any(axis=1)]
        if len(values_RB):
            score = interval(values_RB)
            points.append(_point(first + (width + 1) / 2, score.mean, score.low, score.high, len(values_RB)))
    return points


def _heldout_curve(runs: Sequence[_Shown]) -> list[list[float]]:
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
            both = interval(np.array([line["by_problem"] for line in found]))
            points.append(_point(step, both.mean, both.low, both.high, len(found)))
    return points


def _point(step: float, mean: float, low: float, high: float, runs: int) -> list[float]:
    return [step, _rounded(mean), _rounded(low), _rounded(high), runs]


def _run(run: _Shown, name: str, runs: int) -> dict[str, Any]:
    def setting(section: str, key: str) -> Any:
        return run.recipe[section].get(key) if run.recipe else None

    samples, left_out = run.samples.chosen(SAMPLE_BYTES // runs)
    alarms = list(run.run.alarms)
    if left_out:
        total = left_out + len(samples)
        alarms.append(f"tokens: {left_out} of {total} sampled responses are left out, to keep the page small")
    # An evaluation after the last step is an earlier attempt's if there were further steps.
    rates = {line["name"]: line["pass_rate"] for line in run.evaluations if line["step"] in (0, run.run.step)}
    return {
        "name": name,
        "method": setting("sgopd", "method"),
        "seed": setting("train", "seed"),
        "learning_rate": setting("train", "learning_rate"),
        "student": setting("model", "path"),
        "teacher": setting("teacher", "path"),
        "gap_limit": setting("alarms", "logprob_gap"),
        "step": run.run.step,
        "steps": setting("train", "steps"),
        "ended": run.run.ended,
        "before": rates.get("before"),
        "after": rates.get("after"),
        "seconds": float(np.nansum(run.series.of("seconds"))),
        "alarms": alarms,
        "series": _thinned(run.series, max(FEWEST_POINTS, SERIES_POINTS // runs)),
        # The tokens' texts make the response's.
        "samples": [{key: value for key, value in line.items() if key != "response"} for line in samples],
        "samples_left_out": left_out,
    }


def _thinned(series: Series, points: int) -> dict[str, list[float]]:
    """Each logged number over the steps, in at most so many means."""
    found = {}
    for name in series.names:
        values_N = series.of(name)
        if name.startswith(STAGE_PREFIX):
            values_N = np.nan_to_num(values_N)  # a stage that a step did not have took no time
        found[name] = [_rounded(value) for value in thinned(values_N, points).tolist()]
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")

"""What cells say together: means, intervals, paired differences, and which of them are more than chance."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mpmath
import numpy as np

from megatron_sgopd.evaluation.scores import Score
from megatron_sgopd.evaluation.statistics import LEVEL


@dataclass(frozen=True)
class Cell:
    """A finished run."""

    seed: int
    by_problem: tuple[float, ...]
    """Share of right responses to each held-out problem after training."""
    seconds: float
    tokens: float
    """Response tokens that the student was trained on."""

    @property
    def pass_rate(self) -> float:
        """Over all problems."""
        return float(np.mean(self.by_problem))


@dataclass(frozen=True)
class Variant:
    """Runs that differ in their seed alone."""

    name: str
    learning_rate: float
    cells: tuple[Cell, ...]
    failed: int = 0


@dataclass(frozen=True)
class Estimate:
    """A mean over S seeds and P problems, and how well it is known."""

    mean: float
    error: float
    """Standard error."""
    freedom: int
    """Degrees of freedom of Student's t."""
    seeds: int
    """S."""

    def interval(self, level: float = LEVEL) -> Score:
        """That holds the truth with a chance of `level`."""
        reach = t_quantile(1 - (1 - level) / 2, self.freedom) * self.error
        return Score(self.mean, self.mean - reach, self.mean + reach)

    @property
    def p_value(self) -> float:
        """Chance of a mean at least as far from 0 if the truth were 0."""
        if self.error == 0:
            return float(self.mean == 0)
        return 2 * (1 - t_chance(abs(self.mean) / self.error, self.freedom))


def estimate(values_SP: np.ndarray) -> Estimate:
    """The mean, with an error that holds for other seeds and other problems.

    Seeds and problems are crossed random effects, and the mean squares of the two-way table give

        Var(mean) = (MS_seeds + MS_problems - MS_rest) / (S P)

    which is not taken as less than either alone. The seeds are few, and known least: S - 1 degrees of freedom, whatever
    share of the error is theirs, so that a t test is right or too careful. One seed says nothing of others: then it is
    the problems' error, with P - 1.
    """
    seeds, problems = values_SP.shape
    mean = float(values_SP.mean())
    if min(seeds, problems) == 1:
        others = max(seeds, problems) - 1
        error = float(values_SP.std(ddof=1)) / math.sqrt(others + 1) if others else 0.0
        return Estimate(mean, error, max(others, 1), seeds)
    seeds_S, problems_P = values_SP.mean(axis=1), values_SP.mean(axis=0)
    rest_SP = values_SP - seeds_S[:, None] - problems_P[None, :] + mean
    of_seeds, of_problems = problems * seeds_S.var(ddof=1), seeds * problems_P.var(ddof=1)
    of_rest = (rest_SP**2).sum() / ((seeds - 1) * (problems - 1))
    squares = max(of_seeds + of_problems - of_rest, of_seeds, of_problems)
    return Estimate(mean, math.sqrt(squares / (seeds * problems)), seeds - 1, seeds)


@functools.cache
def t_chance(t: float, freedom: int) -> float:
    """Chance that Student's t is at most `t`, which is not negative."""
    return 1 - float(mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True)) / 2


@functools.cache
def t_quantile(chance: float, freedom: int) -> float:
    """Student's t that is not exceeded with a chance above one half."""
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_chance(middle, freedom) < chance else (low, middle)
    return high


def interval(values_SP: np.ndarray) -> Score:
    """Mean rate over S seeds and P problems, and its 95 % interval, which ends at 0 and 1."""
    found = estimate(values_SP).interval()
    return Score(found.mean, max(0.0, found.low), min(1.0, found.high))


def score(variant: Variant) -> Score:
    """Held-out pass rate."""
    return interval(np.array([cell.by_problem for cell in variant.cells]))


def difference(variant: Variant, baseline: Variant) -> Estimate | None:
    """Pass rate minus the baseline's, paired by seed and problem; None where no seed of both is finished."""
    theirs = {cell.seed: cell.by_problem for cell in baseline.cells}
    pairs = [(cell.by_problem, theirs[cell.seed]) for cell in variant.cells if cell.seed in theirs]
    return estimate(np.array([np.subtract(ours, other) for ours, other in pairs])) if pairs else None


def results_table(variants: Sequence[Variant], baseline: str) -> list[str]:
    """Markdown lines."""
    by_name = {variant.name: variant for variant in variants}
    lines = [
        f"| variant | learning rate | runs | pass rate | minus {baseline} | s a run | tokens a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant in variants:
        runs = f"{len(variant.cells)}" + (f" ({variant.failed} failed)" if variant.failed else "")
        if not variant.cells:
            lines.append(f"| {variant.name} | {variant.learning_rate:g} | {runs} | | | | |")
            continue
        apart = None if variant.name == baseline else difference(variant, by_name[baseline])
        said = "" if apart is None else _points(apart.interval())
        lines.append(
            f"| {variant.name} | {variant.learning_rate:g} | {runs} | {_percent(score(variant))} "
            f"| {said} | {np.median([c.seconds for c in variant.cells]):.0f} "
            f"| {np.mean([c.tokens for c in variant.cells]):,.0f} |"
        )
    return lines


def sweep_table(rates: Mapping[str, Mapping[float, Sequence[float]]]) -> list[str]:
    """Markdown lines: mean pass rate of each variant at each learning rate; failed runs are left out."""
    grid = sorted({rate for found in rates.values() for rate in found})
    lines = ["| variant | " + " | ".join(f"{rate:g}" for rate in grid) + " |", "|---" * (len(grid) + 1) + "|"]
    for name, found in rates.items():
        cells = (_swept(found[rate]) if rate in found else "" for rate in grid)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    edge = [name for name, found in rates.items() if beyond_edge(found) is not None]
    if edge:
        lines += ["", f"At the edge of the sweep, so that a better one may lie outside: {', '.join(edge)}."]
    return lines


def best_rate(found: Mapping[float, Sequence[float]]) -> float | None:
    """The learning rate with the highest mean; one at which a run failed is not taken while another has all."""
    most = max(len(rates) for rates in found.values())
    if most == 0:
        return None
    return max((rate for rate, rates in found.items() if len(rates) == most), key=lambda rate: np.mean(found[rate]))


def beyond_edge(found: Mapping[float, Sequence[float]]) -> float | None:
    """The learning rate to try next where the best one is the least or the greatest of several; None elsewhere."""
    grid, best = sorted(found), best_rate(found)
    if len(grid) < 2 or best not in (grid[0], grid[-1]):
        return None
    inner = grid[1] if best == grid[0] else grid[-2]
    return float(f"{best * best / inner:.3g}")


FEWEST_SEEDS = 3
"""Of both, for a verdict: with fewer, luck and method look alike."""
_RISK = 1 - LEVEL


def verdict(variants: Sequence[Variant], baseline: str) -> str:
    """In words: which variants can be told from the baseline, with a chance of at most 5 % that a word is false where
    there is no difference: Holm's correction for all comparisons of the table."""
    by_name = {variant.name: variant for variant in variants}
    found = {
        variant.name: difference(variant, by_name[baseline])
        for variant in variants
        if variant.name != baseline and variant.cells
    }
    enough = {name: apart for name, apart in found.items() if apart is not None and apart.seeds >= FEWEST_SEEDS}
    told: set[str] = set()
    for place, name in enumerate(sorted(enough, key=lambda name: enough[name].p_value)):
        if enough[name].p_value * (len(enough) - place) > _RISK:
            break
        told.add(name)
    above = [name for name in enough if name in told and enough[name].mean > 0]
    below = [name for name in enough if name in told and enough[name].mean < 0]
    groups = {
        f"better than {baseline}": above,
        f"worse than {baseline}": below,
        f"not distinguishable from {baseline}": [name for name in enough if name not in told],
        f"no verdict, for fewer than {FEWEST_SEEDS} seeds of both": [name for name in found if name not in enough],
    }
    parts = [f"{words}: {', '.join(names)}" for words, names in groups.items() if names]
    return (
        "By paired t tests over the seeds at 5 %, corrected for all comparisons (Holm), "
        + "; ".join(parts or ["nothing can be said"])
        + "."
    )


def _swept(rates: Sequence[float]) -> str:
    return f"{np.mean(rates):.1%}" if rates else "failed"


def _percent(found: Score) -> str:
    return f"{found.mean:.1%} [{found.low:.1%}, {found.high:.1%}]"


def _points(found: Score) -> str:
    return f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}] points"

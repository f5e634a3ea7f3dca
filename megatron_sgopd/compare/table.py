"""What cells say together: means, intervals, paired differences, and which of them are more than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sgopd.evaluation.scores import Score
from megatron_sgopd.evaluation.statistics import LEVEL, RESAMPLES


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


def interval(values_SP: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> Score:
    """Mean over S seeds and P problems, and the interval by resampling both, each with replacement.

    Few seeds make it somewhat too narrow: with five, the spread between seeds is itself known only roughly.
    """
    seeds, problems = values_SP.shape
    rng = np.random.default_rng(seed)
    seeds_RS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    problems_RP = rng.multinomial(problems, np.full(problems, 1 / problems), size=resamples)
    means_R = ((seeds_RS @ values_SP) * problems_RP).sum(axis=1) / (seeds * problems)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means_R, [tail, 1 - tail])
    return Score(float(values_SP.mean()), float(low), float(high))


def score(variant: Variant) -> Score:
    """Held-out pass rate."""
    return interval(np.array([cell.by_problem for cell in variant.cells]))


def difference(variant: Variant, baseline: Variant) -> Score | None:
    """Pass rate minus the baseline's, paired by seed and problem; None where no seed of both is finished."""
    theirs = {cell.seed: cell.by_problem for cell in baseline.cells}
    pairs = [(cell.by_problem, theirs[cell.seed]) for cell in variant.cells if cell.seed in theirs]
    return interval(np.array([np.subtract(ours, other) for ours, other in pairs])) if pairs else None


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
        lines.append(
            f"| {variant.name} | {variant.learning_rate:g} | {runs} | {_percent(score(variant))} "
            f"| {'' if apart is None else _points(apart)} | {np.median([c.seconds for c in variant.cells]):.0f} "
            f"| {np.mean([c.tokens for c in variant.cells]):,.0f} |"
        )
    return lines


def sweep_table(rates: Mapping[str, Mapping[float, Sequence[float]]]) -> list[str]:
    """Markdown lines: mean pass rate of each variant at each learning rate; failed runs are left out."""
    grid = sorted({rate for found in rates.values() for rate in found})
    lines = ["| variant | " + " | ".join(f"{rate:g}" for rate in grid) + " |", "|---" * (len(grid) + 1) + "|"]
    for name, found in rates.items():
        cells = (f"{np.mean(found[rate]):.1%}" if found.get(rate) else "failed" for rate in grid)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    edge = [name for name, found in rates.items() if best_rate(found) in (grid[0], grid[-1])]
    if edge:
        lines += ["", f"At the edge of the sweep, so that a better one may lie outside: {', '.join(edge)}."]
    return lines


def best_rate(found: Mapping[float, Sequence[float]]) -> float | None:
    """The learning rate with the highest mean; one at which a run failed is not taken while another has all."""
    most = max(len(rates) for rates in found.values())
    if most == 0:
        return None
    return max((rate for rate, rates in found.items() if len(rates) == most), key=lambda rate: np.mean(found[rate]))


def verdict(variants: Sequence[Variant], baseline: str) -> str:
    """In words: which variants can be told from the baseline."""
    by_name = {variant.name: variant for variant in variants}
    above: list[str] = []
    below: list[str] = []
    neither: list[str] = []
    for variant in variants:
        if variant.name == baseline or not variant.cells:
            continue
        apart = difference(variant, by_name[baseline])
        if apart is None:
            continue
        side = above if apart.low > 0 else below if apart.high < 0 else neither
        side.append(variant.name)
    parts = [f"better than {baseline}: {', '.join(above)}"] * bool(above)
    parts += [f"worse than {baseline}: {', '.join(below)}"] * bool(below)
    parts += [f"not distinguishable from {baseline}: {', '.join(neither)}"] * bool(neither)
    return "By the 95 % intervals of the paired differences, " + "; ".join(parts or ["nothing can be said"]) + "."


def _percent(found: Score) -> str:
    return f"{found.mean:.1%} [{found.low:.1%}, {found.high:.1%}]"


def _points(found: Score) -> str:
    return f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}] points"

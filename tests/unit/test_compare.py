"""The table of a comparison: intervals that cover, pairs that cancel, words that follow from the figures."""

import numpy as np
import pytest

from megatron_sgopd.compare.table import Cell, Variant, difference, interval, results_table, sweep_table, verdict


def variant(name: str, rates_SP: np.ndarray, first_seed: int = 1, failed: int = 0) -> Variant:
    cells = [Cell(first_seed + i, tuple(row), 60.0 + i, 1000.0) for i, row in enumerate(rates_SP)]
    return Variant(name, 1e-4, tuple(cells), failed)


def simulated(rng: np.random.Generator, mean: float, seeds: int, problems: int) -> np.ndarray:
    """Problems of different difficulty, seeds of different luck, 8 samples each."""
    difficulty = rng.beta(4 * mean, 4 * (1 - mean), size=problems)
    luck = rng.normal(0, 0.02, size=(seeds, 1))
    return rng.binomial(8, np.clip(difficulty + luck, 0, 1)) / 8


def test_intervals_over_seeds_and_problems_cover_the_truth() -> None:
    # 400 comparisons of 8 seeds and 100 problems; the share that covers has a standard error of 1 %.
    rng, truth = np.random.default_rng(3), 0.4
    covered = 0
    for trial in range(400):
        found = interval(simulated(rng, truth, 8, 100), seed=trial, resamples=600)
        covered += found.low <= truth <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_pairing_takes_out_what_both_share() -> None:
    rng = np.random.default_rng(1)
    base = simulated(rng, 0.4, 5, 60)
    better = np.clip(base + rng.choice([0, 0.125], p=[0.8, 0.2], size=base.shape), 0, 1)
    apart = difference(variant("better", better), variant("base", base))
    assert apart is not None
    assert apart.mean == pytest.approx((better - base).mean())
    assert apart.low > 0
    spread = interval(base)
    assert apart.high - apart.low < (spread.high - spread.low) / 3


def test_only_seeds_of_both_are_paired() -> None:
    ones, zeros = np.ones((3, 4)), np.zeros((3, 4))
    assert difference(variant("a", ones, first_seed=1), variant("b", zeros, first_seed=9)) is None
    shared = difference(variant("a", ones, first_seed=1), variant("b", zeros, first_seed=3))
    assert shared is not None and (shared.mean, shared.low, shared.high) == (1, 1, 1)


def test_the_table_and_the_words_say_what_the_figures_say() -> None:
    rng = np.random.default_rng(5)
    base = simulated(rng, 0.4, 5, 200)
    variants = [
        variant("opd", base),
        variant("up", np.clip(base + 0.25, 0, 1)),
        variant("down", np.clip(base - 0.25, 0, 1)),
        variant("same", np.roll(base, 1, axis=0), failed=2),
        Variant("none", 1e-4, (), failed=5),
    ]
    lines = results_table(variants, "opd")
    assert len(lines) == 7 and lines[2].startswith("| opd | 0.0001 | 5 | ")
    assert lines[5].startswith("| same | 0.0001 | 5 (2 failed) | ") and "points" in lines[5]
    assert lines[6].startswith("| none | 0.0001 | 0 (5 failed) |")
    assert verdict(variants, "opd") == (
        "By the 95 % intervals of the paired differences, better than opd: up; worse than opd: down; "
        "not distinguishable from opd: same."
    )


def test_the_sweep_is_shown_with_what_failed() -> None:
    lines = sweep_table({"a": {1e-4: [0.25, 0.75], 1e-3: []}, "b": {1e-4: [0.5], 1e-3: [1.0]}})
    assert lines == [
        "| variant | 0.0001 | 0.001 |",
        "|---|---|---|",
        "| a | 50.0% | failed |",
        "| b | 50.0% | 100.0% |",
        "",
        "At the edge of the sweep, so that a better one may lie outside: a, b.",
    ]
    assert len(sweep_table({"a": {1e-4: [0.1], 1e-3: [0.5], 1e-2: [0.2]}})) == 3, "the best is between others"

"""The table of a comparison: intervals that cover, pairs that cancel, words that follow from the figures."""

import numpy as np
import pytest

from megatron_sgopd.compare.table import (
    Cell,
    Variant,
    beyond_edge,
    difference,
    estimate,
    interval,
    results_table,
    sweep_table,
    t_quantile,
    verdict,
)


def variant(name: str, rates_SP: np.ndarray, first_seed: int = 1, failed: int = 0) -> Variant:
    cells = [Cell(first_seed + i, tuple(row), 60.0 + i, 1000.0) for i, row in enumerate(rates_SP)]
    return Variant(name, 1e-4, tuple(cells), failed)


def simulated(
    rng: np.random.Generator,
    mean: float,
    seeds: int,
    problems: int,
    luck: float = 0.02,
    difficulty_P: np.ndarray | None = None,
) -> np.ndarray:
    """Problems of different difficulty, seeds of different luck, 8 samples each."""
    if difficulty_P is None:
        difficulty_P = rng.beta(4 * mean, 4 * (1 - mean), size=problems)
    return rng.binomial(8, np.clip(difficulty_P + rng.normal(0, luck, size=(seeds, 1)), 0, 1)) / 8


@pytest.mark.parametrize(("seeds", "problems"), [(1, 100), (3, 100), (5, 100), (8, 30)])
def test_intervals_over_seeds_and_problems_cover_the_truth(seeds: int, problems: int) -> None:
    # Of 1,000 comparisons; the share that covers has a standard error of 0.7 %. One seed has no luck to be known.
    rng, truth = np.random.default_rng(3), 0.4
    covered = 0
    for _ in range(1000):
        values_SP = simulated(rng, truth, seeds, problems, luck=0.02 if seeds > 1 else 0.0)
        found = interval(values_SP)
        covered += found.low <= truth <= found.high
    assert covered / 1000 >= 0.93


@pytest.mark.parametrize("luck", [0.0, 0.02, 0.04])
@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_a_table_without_any_difference_seldom_says_that_there_is_one(seeds: int, luck: float) -> None:
    # Five variants and a baseline that are alike, over the spreads that the examples' runs have between seeds. Of 300
    # tables; the share has a standard error of 1.3 % at 5 %.
    rng = np.random.default_rng(seeds)
    false = 0
    for _ in range(300):
        difficulty_P = rng.beta(1.6, 2.4, size=100)
        rates = {name: simulated(rng, 0.4, seeds, 100, luck, difficulty_P) for name in ("base", *"abcde")}
        said = verdict([variant(name, rates_SP) for name, rates_SP in rates.items()], "base")
        false += "better than" in said or "worse than" in said
    assert false / 300 <= 0.06


def test_students_t() -> None:
    known = {(0.975, 2): 4.302652730, (0.975, 4): 2.776445105, (0.995, 4): 4.604094871, (0.975, 1): 12.70620474}
    for (chance, freedom), value in known.items():
        assert t_quantile(chance, freedom) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_are_no_verdict(seeds: int) -> None:
    ones, zeros = np.ones((seeds, 40)), np.zeros((seeds, 40))
    said = verdict([variant("base", zeros), variant("up", ones)], "base")
    assert said.endswith("no verdict, for fewer than 3 seeds of both: up.")


def test_pairing_takes_out_what_both_share() -> None:
    rng = np.random.default_rng(1)
    base = simulated(rng, 0.4, 5, 60)
    better = np.clip(base + rng.choice([0, 0.125], p=[0.8, 0.2], size=base.shape), 0, 1)
    apart = difference(variant("better", better), variant("base", base))
    assert apart is not None
    assert apart.mean == pytest.approx((better - base).mean())
    assert apart.interval().low > 0
    assert apart.error < estimate(base).error / 3


def test_only_seeds_of_both_are_paired() -> None:
    ones, zeros = np.ones((3, 4)), np.zeros((3, 4))
    assert difference(variant("a", ones, first_seed=1), variant("b", zeros, first_seed=9)) is None
    shared = difference(variant("a", ones, first_seed=1), variant("b", zeros, first_seed=3))
    assert shared is not None and (shared.mean, shared.error) == (1, 0)


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
        "By paired t tests over the seeds at 5 %, corrected for all comparisons (Holm), better than opd: up; "
        "worse than opd: down; not distinguishable from opd: same."
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
    further = {"a": {1e-4: [0.1], 1e-3: [0.5], 1e-2: [0.2]}, "b": {1e-4: [0.1], 1e-3: [0.5]}}
    assert sweep_table(further)[3] == "| b | 10.0% | 50.0% |  |"


def test_a_sweep_goes_on_beyond_an_edge() -> None:
    assert beyond_edge({2e-4: [0.5], 4e-4: [0.4], 8e-4: [0.3]}) == 1e-4
    assert beyond_edge({2e-4: [0.3], 4e-4: [0.4], 8e-4: [0.5]}) == 1.6e-3
    assert beyond_edge({2e-4: [0.3], 4e-4: [0.5], 8e-4: [0.4]}) is None
    assert beyond_edge({2e-4: [0.3]}) is None and beyond_edge({2e-4: [], 4e-4: []}) is None

"""How much of a response repeats itself."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_sgopd.objective.filters import repetition


def test_a_loop_repeats_and_counting_does_not() -> None:
    assert repetition(range(1000)) == 0
    assert repetition([1, 2, 3] * 50) == 1
    assert repetition([]) == 0
    assert repetition([5] * 7) == 0, "shorter than what is looked for"
    assert repetition([5] * 9) == 1


def test_only_the_part_that_loops_counts() -> None:
    # 186 windows, of which 86 lie in the loop of 93 tokens.
    assert repetition([*range(100), *([7000, 7001, 7002] * 31)]) == 86 / 186


@given(st.lists(st.integers(0, 3), max_size=60))
def test_it_is_the_share_of_windows_seen_more_than_once(tokens: list[int]) -> None:
    windows = [tuple(tokens[i : i + 8]) for i in range(len(tokens) - 7)]
    repeated = sum(windows.count(window) > 1 for window in windows)
    assert repetition(tokens) == (repeated / len(windows) if windows else 0)

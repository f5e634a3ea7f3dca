"""Problems of an evaluation that training may have shown: those that share a run of words with a training prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

WORDS = 13
"""Length of the runs; texts shorter than that are compared as a whole."""
_COMMON = 0.05
"""Share of the problems, and at least three of them, from which on a run of words is none of a problem's own: an
instruction that stands in all of them would flag each."""
_WORD = re.compile(r"\w+|[^\w\s]")


def overlapping(problems: Sequence[str], training: Iterable[str], words: int = WORDS) -> list[int]:
    """Indices of `problems` of which a run of `words` words occurs in `training`, whatever case and spacing.

    Runs that many of the problems have in common do not count, but for a problem that has no others. The runs of the
    problems are kept, not those of the training prompts, which may be many more and pass by once.
    """
    owners: dict[tuple[str, ...], set[int]] = {}
    for index, problem in enumerate(problems):
        for run in _runs(problem, words):
            owners.setdefault(run, set()).add(index)
    most = max(2, int(_COMMON * len(problems)))
    own = {index for indices in owners.values() if len(indices) <= most for index in indices}
    for run in [run for run, indices in owners.items() if len(indices) > most]:
        owners[run] -= own
    found: set[int] = set()
    for prompt in training:
        for run in _runs(prompt, words):
            found |= owners.get(run, set())
    return sorted(found)


def _runs(text: str, words: int) -> Iterator[tuple[str, ...]]:
    tokens = _WORD.findall(text.lower())
    for start in range(max(1, len(tokens) - words + 1)):
        yield tuple(tokens[start : start + words])

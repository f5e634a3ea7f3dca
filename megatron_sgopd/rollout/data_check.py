"""What a data set holds, found out before anything trains on it: what cannot be used, what contradicts itself, and
which references the verifier would not accept as answers to themselves."""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from megatron_sgopd.config import VerifySettings
from megatron_sgopd.rollout.prompts import NamedRows, PromptSet, SourcedPrompt
from megatron_sgopd.verify.base import VerifierResult, VerifyRequest
from megatron_sgopd.verify.equality import kind_of, vote
from megatron_sgopd.verify.pool import VerifierPool

_AT_A_TIME = 4096
_SHOWN = 5
_MOST_DUPLICATES = 20_000
"""That are looked at for whether they contradict each other."""


@dataclass(frozen=True)
class DataReport:
    """What was found in a data set."""

    rows: int
    usable: int
    unusable: list[str]
    """What is wrong with the first rows that cannot be used."""
    tokens: dict[str, int] | None
    """Lengths of prompts: min, median, p90, p99, max; None without a tokenizer."""
    duplicates: int
    """Prompts that have occurred before."""
    contradicting: list[str]
    """Of the first prompts that stand there with different answers."""
    contradictions: int
    kinds: dict[str, int]
    """Answers by what they are."""
    refused: list[str]
    """The first references that are not accepted as an answer to their own problem."""
    refusals: int
    unsolved: list[str]
    """The first worked solutions that do not end in their own reference."""
    unsolved_rows: int
    samples: list[dict[str, str]]
    """Some prompts as a model would read them, with their answers."""

    @property
    def sound(self) -> bool:
        """Whether nothing has to be looked at."""
        return not (self.rows > self.usable or self.contradictions or self.refusals or self.unsolved_rows)


def examine_data(prompts: PromptSet, verify: VerifySettings, has_tokens: bool) -> DataReport:
    """Look at all prompts of a set that was read with its unusable rows left out.

    Args:
        verify: whose verifier gets each reference back as an answer.
        has_tokens: False where prompts were not tokenized.
    """
    refused, unsolved = NamedRows(), NamedRows()
    kinds = Counter(kind_of(prompt.answer) for prompt in prompts)
    limit = verify.memory_limit_mib * 2**20
    with VerifierPool(verify.verifier, verify.workers, verify.time_limit, limit) as pool:
        references = ((one, one.prompt.answer) for one in prompts.sourced())
        for one, result in _given_back(references, verify.verifier, pool, len(prompts)):
            if result.outcome != 1:
                refused(f"{one.place}: {one.prompt.answer!r} ({result.reason})")
        solved = ((one, one.solved) for one in prompts.sourced() if one.solved is not None)
        for one, result in _given_back(solved, verify.verifier, pool, len(prompts)):
            if result.outcome != 1:
                ending = f"ends in {one.solved!r}" if one.solved else "has no answer that can be read"
                unsolved(f"{one.place}: {ending}, and the reference is {one.prompt.answer!r}")
    duplicates, contradictions = _duplicates(prompts)
    lengths_N = prompts.lengths()
    quantiles = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return DataReport(
        rows=len(prompts) + prompts.unusable,
        usable=len(prompts),
        unusable=prompts.problems[:_SHOWN],
        tokens={name: int(np.quantile(lengths_N, q)) for name, q in quantiles.items()} if has_tokens else None,
        duplicates=duplicates,
        contradicting=contradictions[:_SHOWN],
        contradictions=len(contradictions),
        kinds=dict(kinds.most_common()),
        refused=refused.first[:_SHOWN],
        refusals=refused.count,
        unsolved=unsolved.first[:_SHOWN],
        unsolved_rows=unsolved.count,
        samples=[{"prompt": prompt.text, "answer": prompt.answer} for prompt in prompts[:3]],
    )


def _given_back(
    answered: Iterable[tuple[SourcedPrompt, str]], verifier: str, pool: VerifierPool, total: int
) -> Iterator[tuple[SourcedPrompt, VerifierResult]]:
    """Each prompt, and what the verifier says of the answer that stands beside it here."""
    form = "<answer>{}</answer>" if verifier in ("task", "exact") else "\\boxed{{{}}}"
    done, shown = 0, time.monotonic()
    for part in itertools.batched(answered, _AT_A_TIME):
        requests = [
            VerifyRequest(p.text, form.format(answer), p.answer, p.task, p.metadata)
            for p, answer in ((one.prompt, answer) for one, answer in part)
        ]
        yield from zip((one for one, _ in part), pool.submit(requests).result(), strict=True)
        done += len(part)
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            print(f"check-data: {done:,} of {total:,} answers are given back", file=sys.stderr)


def _duplicates(prompts: PromptSet) -> tuple[int, list[str]]:
    """How many prompts have occurred before, and those that stand there with different answers."""
    hashes_N = prompts.text_hashes()
    _, inverse_N, counts = np.unique(hashes_N, return_inverse=True, return_counts=True)
    again = np.flatnonzero(counts[inverse_N] > 1)[:_MOST_DUPLICATES]
    answers: dict[str, dict[str, str]] = {}
    for place in again.tolist():
        prompt = prompts[place]
        answers.setdefault(prompt.text, {}).setdefault(
            vote(prompt.answer), f"{prompt.answer!r} ({prompts.place(place)})"
        )
    different = [" and ".join(found.values()) for found in answers.values() if len(found) > 1]
    return int(len(hashes_N) - len(counts)), different

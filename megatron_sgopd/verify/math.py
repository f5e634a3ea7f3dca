"""Mathematical answers: read by the rules of docs/verifier.md, and compared exactly."""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction

from megatron_sgopd.verify.base import MAX_ANSWER, VerifierResult, VerifyRequest, judged, stated_answer
from megatron_sgopd.verify.equality import equal, vote
from megatron_sgopd.verify.reading import final_answer

_SIMPLE = re.compile(r"-?[0-9]{1,100}(?:\.[0-9]{1,100})?")


def verify(request: VerifyRequest) -> VerifierResult:
    """Right if the final answer is the reference."""
    extracted = stated_answer(request)
    if extracted is None:
        return VerifierResult(0, None, "no answer")
    if len(extracted) > MAX_ANSWER + len(request.answer):
        return VerifierResult(0, extracted, "too long")
    if _SIMPLE.fullmatch(extracted) and _SIMPLE.fullmatch(request.answer):  # most answers: no need of what follows
        value = Fraction(extracted)
        return dataclasses.replace(judged(value == Fraction(request.answer), extracted), vote=str(value))
    result = judged(equal(reference_answer(request.answer), extracted), extracted)
    return dataclasses.replace(result, vote=vote(extracted))


def reference_answer(text: str) -> str:
    """The answer of a reference, which may itself be marked as one."""
    marked = any(mark in text for mark in ("\\boxed", "<answer>", "####"))
    return (final_answer(text) if marked else None) or text

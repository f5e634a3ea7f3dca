"""Mathematical answers: equal as numbers, expressions, sets or intervals, by math-verify and sympy."""

from __future__ import annotations

import re
from fractions import Fraction

from math_verify import LatexExtractionConfig, parse
from math_verify import verify as expressions_equal

from megatron_sgopd.verify.base import ANSWER_MARKERS, MAX_ANSWER, VerifierResult, VerifyRequest, extract_answer, judged

_NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d{1,50})(\.\d{1,50})?")
_FRACTION = re.compile(r"[+-]?\d{1,50}/\d{1,50}")
_LAST_NUMBER = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
# LaTeX is read by a grammar; math-verify's reader of plain expressions would hand the text to Python's eval.
_LATEX = [LatexExtractionConfig()]


def verify(request: VerifyRequest) -> VerifierResult:
    """Compare the answer in the response with the reference.

    Plain numbers are compared as fractions; what else is different to the letter goes to math-verify as LaTeX,
    and text that is no mathematics is compared without case, spaces and the LaTeX around it.
    """
    extracted = extract_answer(request.response)
    if extracted is None and not any(marker in request.response for marker in ANSWER_MARKERS):
        extracted = _final_expression(request.response)
    if extracted is None:  # an answer that was begun and not closed included
        return VerifierResult(0, None, "no answer")
    if len(extracted) > MAX_ANSWER:
        return VerifierResult(0, extracted[:80], "too long")
    gold = extract_answer(request.answer) or request.answer
    ours, theirs = _normal_text(gold), _normal_text(extracted)
    if ours == theirs:
        return judged(True, extracted)
    numbers = _plain_number(ours), _plain_number(theirs)
    if None not in numbers:
        return judged(numbers[0] == numbers[1], extracted)
    return judged(_equal_as_latex(gold, extracted), extracted)


def _equal_as_latex(gold: str, extracted: str) -> bool:
    # The time limit is the pool's: math-verify's own cannot interrupt what does not return to Python.
    readings = [parse(f"${_inner(text)}$", _LATEX, parsing_timeout=None) for text in (gold, extracted)]
    return bool(all(readings) and expressions_equal(*readings, timeout_seconds=None))


def _inner(text: str) -> str:
    """Without the dollar signs or \\( \\) around it."""
    text = text.strip().removeprefix("\\(").removesuffix("\\)").removeprefix("\\[").removesuffix("\\]")
    return text.strip().strip("$").replace("$", "")


def _normal_text(text: str) -> str:
    text = re.sub(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}", r"\1", _inner(text))
    text = re.sub(r"\\[,;! ]|\s+", "", text)
    return text.rstrip(".").casefold()


def _plain_number(text: str) -> Fraction | None:
    if _NUMBER.fullmatch(text):
        return Fraction(text.replace(",", ""))
    if _FRACTION.fullmatch(text) and int(text.partition("/")[2]):
        return Fraction(text)
    return None


def _final_expression(response: str) -> str | None:
    """The last mathematics between dollar signs on the last line, else the last number there."""
    line = response.strip().rpartition("\n")[2][-MAX_ANSWER:]
    pieces = line.split("$")
    if len(pieces) >= 3:
        return pieces[-2 if len(pieces) % 2 else -3]
    numbers = _LAST_NUMBER.findall(line)
    return numbers[-1].rstrip(",") if numbers else line or None

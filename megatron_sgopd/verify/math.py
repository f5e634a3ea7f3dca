"""Mathematical answers: equal as numbers, expressions, sets or intervals, by math-verify and sympy.

math-verify reads LaTeX by a grammar, which is what is used here; its other reader, of plain expressions, hands the
text to Python's eval. Its time limits are switched off: they are signals, which cannot interrupt what does not
return to Python, and the pool has limits that can.
"""

from __future__ import annotations

import re
from fractions import Fraction

from math_verify import LatexExtractionConfig, parse
from math_verify import verify as expressions_equal

from megatron_sgopd.verify.base import (
    MAX_ANSWER,
    VerifierResult,
    VerifyRequest,
    extract_answer,
    judged,
    stated_answer,
)

_NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d{1,50})(\.\d{1,50})?")
_FRACTION = re.compile(r"[+-]?\d{1,50}/\d{1,50}")
_LATEX = [LatexExtractionConfig()]


def verify(request: VerifyRequest) -> VerifierResult:
    """Compare the answer in the response with the reference.

    What is equal to the letter, but for case, spaces and the LaTeX around it, is right. Plain numbers are compared
    as fractions. A reference of three letters or more is a word, not a product of variables. The rest goes to
    math-verify as LaTeX.
    """
    extracted = stated_answer(request, _final_expression)
    if extracted is None:
        return VerifierResult(0, None, "no answer")
    if len(extracted) > MAX_ANSWER + len(request.answer):
        return VerifierResult(0, extracted, "too long")
    reference = extract_answer(request.answer) or request.answer
    ours, theirs = _normal_text(reference), _normal_text(extracted)
    if ours == theirs:
        return judged(True, extracted)
    numbers = _plain_number(ours), _plain_number(theirs)
    if None not in numbers:
        return judged(numbers[0] == numbers[1], extracted)
    if ours.isalpha() and len(ours) >= 3:
        return judged(False, extracted)
    return judged(_equal_as_latex(reference, extracted), extracted)


def _equal_as_latex(reference: str, extracted: str) -> bool:
    readings = [parse(f"${_inner(text)}$", _LATEX, parsing_timeout=None) for text in (reference, extracted)]
    return bool(all(readings) and expressions_equal(*readings, timeout_seconds=None))


def _inner(text: str) -> str:
    """Without the dollar signs or \\( \\) around it, dollar amounts without their sign, on one line."""
    text = text.strip().removeprefix("\\(").removesuffix("\\)").removeprefix("\\[").removesuffix("\\]")
    return " ".join(text.replace("\\$", "").replace("$", "").replace("~", " ").split())


def _normal_text(text: str) -> str:
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}", r"\1", _inner(text))
    text = re.sub(r"\\[,;! ]|\s+", "", text)
    return text.rstrip(".").casefold()


def _plain_number(text: str) -> Fraction | None:
    if _NUMBER.fullmatch(text):
        return Fraction(text.replace(",", ""))
    if _FRACTION.fullmatch(text) and int(text.partition("/")[2]):
        return Fraction(text)
    return None


# ---- A final expression without a mark -------------------------------------------------------------------

_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_NUMBERS = re.compile(r"[+-]?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?")


def _final_expression(request: VerifyRequest) -> str:
    """The formula that ends on the last line; else, on that line, the last number among words, or all of it."""
    end = request.response.strip()[-MAX_ANSWER:]
    formulas = list(_FORMULA.finditer(end))
    if formulas and "\n" not in end[formulas[-1].end() :]:
        return next(group for group in formulas[-1].groups() if group is not None)
    line = end.rpartition("\n")[2]
    numbers = _NUMBERS.findall(line)
    if numbers and _WORDS.search(line):
        return numbers[-1]
    return line.rpartition("=")[2].strip(" *.")

"""Numbers as answers spell them, exactly: fractions of any size, with what a decimal leaves open."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_MOST_DIGITS, _LARGEST_EXPONENT = 2000, 2000
_SIGNIFICANT = 6
"""Digits that a decimal must have to stand for a number of another form."""


@dataclass(frozen=True)
class Number:
    """A number as it was written."""

    value: Fraction
    places: int | None = None
    """Of a decimal: the place of its last digit, counted behind the point; None of what is exact by its form."""
    significant: int = 0
    percent: bool = False

    def stands_for(self, other: Fraction) -> bool:
        """Whether a decimal with enough digits is the other number, correctly rounded."""
        if self.places is None or self.significant < _SIGNIFICANT:
            return False
        return abs(other - self.value) <= Fraction(1, 2) * Fraction(10) ** -self.places


_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?: \d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_PLAIN = re.compile(_DECIMAL)
_SCIENTIFIC = re.compile(
    rf"({_DECIMAL})[eE]([-+]?\d{{1,5}})|(?:({_DECIMAL})\s*(?:\\times|\\cdot|x|\*)\s*)?10\s*\^\s*(?:\{{\s*([-+]?\d{{1,5}})\s*\}}|([-+]?\d{{1,5}}))"
)
_RATIO = re.compile(
    rf"({_DECIMAL})\s*/\s*({_DECIMAL})|\\frac\s*\{{\s*([-+]?\s*{_DECIMAL})\s*\}}\s*\{{\s*([-+]?\s*{_DECIMAL})\s*\}}"
)
_MIXED = re.compile(
    r"(\d{1,50})\s*(?:\\frac\s*\{\s*(\d{1,50})\s*\}\s*\{\s*(\d{1,50})\s*\}|(?: |\s*\+\s*)(\d{1,50})\s*/\s*(\d{1,50}))"
)
_REPEATING = re.compile(
    r"(\d{0,50})\.(\d{0,50})(?:\\overline\s*\{\s*(\d{1,50})\s*\}|\\dot\s*\{?(\d)\}?|\((\d{1,50})\))"
)


def number(text: str) -> Number | None:
    """The number that a text in plain notation is as a whole; None where it is none."""
    text = text.strip()
    if len(text) > _MOST_DIGITS:
        return None
    percent = text.endswith("\\%")
    text = text.removesuffix("\\%").strip()
    sign = 1
    while text[:1] in ("-", "+", "("):
        if text[0] == "(":
            if not text.endswith(")"):
                return None
            text = text[1:-1].strip()
            continue
        sign = -sign if text[0] == "-" else sign
        text = text[1:].strip()
        if text[:1] in ("-", "+"):
            return None
    found = _unsigned(text)
    return None if found is None else Number(sign * found.value, found.places, found.significant, percent)


def _unsigned(text: str) -> Number | None:
    if _PLAIN.fullmatch(text):
        return _decimal(text)
    if match := _SCIENTIFIC.fullmatch(text):
        mantissa = _decimal(match[1] or match[3] or "1")
        exponent = int(match[2] or match[4] or match[5])
        if abs(exponent) > _LARGEST_EXPONENT:
            return None
        places = None if mantissa.places is None else mantissa.places - exponent
        return Number(mantissa.value * Fraction(10) ** exponent, places, mantissa.significant)
    if match := _RATIO.fullmatch(text):
        above, below = (_signed(part) for part in ((match[1], match[2]) if match[1] else (match[3], match[4])))
        return Number(above / below) if below else None
    if match := _MIXED.fullmatch(text):
        share = int(match[2] or match[4]), int(match[3] or match[5])
        # 2 3/2 is no mixed number: whoever wrote it meant a product, or two numbers.
        return Number(int(match[1]) + Fraction(*share)) if 0 < share[0] < share[1] else None
    if match := _REPEATING.fullmatch(text):
        whole, fixed, repeated = match[1] or "0", match[2], match[3] or match[4] or match[5]
        tail = Fraction(int(repeated), 10 ** len(repeated) - 1)
        return Number(Fraction(int(whole + fixed)) / 10 ** len(fixed) + tail / 10 ** len(fixed))
    return None


def _signed(text: str) -> Fraction:
    text = text.replace(" ", "")
    return -_decimal(text[1:]).value if text.startswith("-") else _decimal(text.lstrip("+")).value


def _decimal(text: str) -> Number:
    text = text.replace(",", "").replace(" ", "")
    whole, point, behind = text.partition(".")
    value = Fraction(f"{whole or '0'}.{behind or '0'}")
    significant = len((whole + behind).lstrip("0"))
    return Number(value, len(behind) if point and behind else None, significant)

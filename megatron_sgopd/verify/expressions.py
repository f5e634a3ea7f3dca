r"""Expressions: read by math-verify's LaTeX grammar, compared by sympy, with the precision that their size asks for.

math-verify's other reader, of plain expressions, hands the text to Python's eval. Its time limits are switched off:
they are signals, which cannot interrupt what does not return to Python, and the pool has limits that can.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse
from sympy import Basic, Float, MatrixBase, Rational, Set, Symbol, Tuple, simplify, sympify
from sympy.core.relational import Equality, Relational, Unequality
from sympy.logic.boolalg import Boolean

from megatron_sgopd.verify.numbers import number

_LATEX = [LatexExtractionConfig()]
_DIGITS = 50
_CLOSE = Fraction(1, 10**30)
"""Share of its size by which a number may be off that was worked out to fifty digits."""
_POINTS = (
    *((Fraction(17, 13), Fraction(5, 7), Fraction(29, 11)), (Fraction(3, 19), Fraction(41, 8), Fraction(23, 17))),
    *((Fraction(-7, 5), Fraction(-13, 9), Fraction(31, 10)), (Fraction(-19, 6), Fraction(11, 3), Fraction(-2, 23))),
    *((Fraction(37, 4), Fraction(-47, 21), Fraction(-53, 12)), (Fraction(1, 97), Fraction(2, 89), Fraction(3, 83))),
)
"""Values for variables, where two expressions that are not the same have other values."""
_FEWEST_POINTS = 3
_DIGITS_APART = re.compile(r"\d\s+\d")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*°")
_NATURAL = re.compile(r"\\log_\{?e\}?(?![a-z])")
_LARGEST_EXPONENT = 1 << 20
"""Of two, in what is compared by its value."""


def same_expression(ours: str, theirs: str) -> bool:
    """Whether two texts in plain notation, neither of which is a list, are the same expression or relation."""
    a, b = _read(ours), _read(theirs)
    if a is None or b is None:
        return False
    if isinstance(a, (Relational, Boolean)) or isinstance(b, (Relational, Boolean)):
        return isinstance(a, Relational) and isinstance(b, Relational) and _same_relations(a, b)
    if isinstance(a, (Set, Tuple)) or isinstance(b, (Set, Tuple)):
        return bool(a == b)
    if isinstance(a, MatrixBase) or isinstance(b, MatrixBase):
        return isinstance(a, MatrixBase) and isinstance(b, MatrixBase) and a.shape == b.shape and _same_values(a - b, 0)
    decimals = number(ours), number(theirs)
    for decimal, other in ((decimals[0], b), (decimals[1], a)):
        if decimal is not None and decimal.places is not None and not other.free_symbols:
            value = _value(other)
            exact = _same_values(sympify(Rational(decimal.value.numerator, decimal.value.denominator)), other)
            return exact or (value is not None and value[1] == 0 and decimal.stands_for(value[0]))
    return _same_values(a, b)


@lru_cache(maxsize=1024)
def _read(text: str) -> Any:
    """What sympy makes of a text; None of what is no mathematics. Decimals in it are exact."""
    if _DIGITS_APART.search(text):
        return None  # which would be read as a product
    text = _DEGREES.sub(r"(\1 \\cdot \\frac{\\pi}{180})", _NATURAL.sub(r"\\ln ", text))
    found = [one for one in parse(f"${text}$", _LATEX, parsing_timeout=None) if isinstance(one, (Basic, MatrixBase))]
    if not found:
        return None
    read = found[0]
    return read.xreplace({atom: Rational(str(atom)) for atom in read.atoms(Float)}) if isinstance(read, Basic) else read


def _same_relations(a: Relational, b: Relational) -> bool:
    """Whether one is the other times a constant: positive, or turned round, where it is an inequality."""
    one, other = a.lhs - a.rhs, b.lhs - b.rhs
    if one.free_symbols != other.free_symbols:
        return False
    ratios = []
    for values in _points(sorted(one.free_symbols, key=str)):
        x, y = _value(one.subs(values)), _value(other.subs(values))
        if x is not None and y is not None and x[1] == y[1] == 0 and x[0] and y[0]:
            ratios.append(x[0] / y[0])
    if len(ratios) < _FEWEST_POINTS or not all(_near(ratio, ratios[0]) for ratio in ratios):
        return False
    if isinstance(a, (Equality, Unequality)):
        return type(a) is type(b)
    return type(a) is type(b) if ratios[0] > 0 else type(a) is type(b.reversed)


def _same_values(a: Any, b: Any) -> bool:
    if a == b:
        return True
    names = sorted((a - b).free_symbols | a.free_symbols | b.free_symbols, key=str)
    if not names:
        return _same_constants(a, b)
    if a.free_symbols != b.free_symbols and simplify(a).free_symbols != simplify(b).free_symbols:
        return False
    agreed = 0
    for values in _points(names):
        one, other = _value(a.subs(values)), _value(b.subs(values))
        if one is None or other is None or one[1] != 0 or other[1] != 0:
            continue  # no number there, or one of several that a root has
        if not _near(one[0], other[0]):
            return False
        agreed += 1
    return agreed >= _FEWEST_POINTS or (agreed == 0 and bool(simplify(a - b) == 0))


def _points(names: list[Symbol]) -> Iterator[dict[Symbol, Any]]:
    for point in _POINTS:
        turns = [(1 + i // len(point)) * point[i % len(point)] for i in range(len(names))]
        yield {name: Rational(f.numerator, f.denominator) for name, f in zip(names, turns, strict=True)}


def _same_constants(a: Any, b: Any) -> bool:
    one, other = _value(a), _value(b)
    if one is None or other is None:
        return bool(simplify(a - b) == 0)
    if not all(_near(x, y) for x, y in zip(one, other, strict=True)) and max(map(abs, (*one, *other))) >= 1:
        return False
    exact = a.doit(), b.doit()
    if all(value.is_Rational for value in exact):
        return bool(exact[0] == exact[1])
    if all(_near(x, y) for x, y in zip(one, other, strict=True)):
        return True
    tiny = Fraction(1, 10 ** (_DIGITS - 10))
    if max(map(abs, (*one, *other))) < 1 and max(abs(x - y) for x, y in zip(one, other, strict=True)) < tiny:
        return bool(simplify(a - b) == 0)  # one of them may be nothing, worked out to so many digits
    return False


def _value(expression: Any) -> tuple[Fraction, Fraction] | None:
    """Real and imaginary part, to fifty digits; None of what has no finite value."""
    parts = expression.evalf(_DIGITS, maxn=4 * _DIGITS).as_real_imag()
    if not all(part.is_Number and part.is_finite for part in parts):
        return None
    return tuple(_as_fraction(part) for part in parts)  # type: ignore[return-value]


def _as_fraction(value: Any) -> Fraction:
    if isinstance(value, Float) and abs(value._mpf_[2]) > _LARGEST_EXPONENT:
        raise OverflowError("a number too large to be compared")
    exact = Rational(value)
    return Fraction(int(exact.p), int(exact.q))


def _near(a: Fraction, b: Fraction) -> bool:
    return a == b or abs(a - b) <= _CLOSE * max(abs(a), abs(b))

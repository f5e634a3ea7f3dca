"""In place of reasoning-gym's scorers that evaluate an answer as Python code: full marks as theirs, without it."""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from megatron_sgopd.verify.equality import equal

Entry = dict[str, Any]
_ARITHMETIC = re.compile(r"[-+*/() 0-9]{1,500}")
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_CONSTANT = re.compile(r"\s*[+]\s*C\s*$")


def _is_reference(answer: str, entry: Entry) -> bool:
    return answer.strip() == entry["answer"].strip()


def _is_a_solution(answer: str, entry: Entry) -> bool:
    return answer in entry["metadata"]["valid_answers"]


def _is_same_list(answer: str, entry: Entry) -> bool:
    lists = [json.loads(text.replace("'", '"')) for text in (answer, entry["answer"])]
    return all(isinstance(one, list) for one in lists) and [*map(float, lists[0])] == [*map(float, lists[1])]


def _is_same_expression(answer: str, entry: Entry) -> bool:
    return equal(_CONSTANT.sub("", entry["answer"]), _CONSTANT.sub("", answer))


def _makes_target(answer: str, entry: Entry) -> bool:
    return _uses_numbers(answer, entry) and arithmetic(answer) == Fraction(entry["metadata"]["target"])


def _makes_24(answer: str, entry: Entry) -> bool:
    return _uses_numbers(answer, entry) and arithmetic(answer) == 24


def _uses_numbers(answer: str, entry: Entry) -> bool:
    return sorted(map(int, re.findall(r"\d+", answer))) == sorted(entry["metadata"]["numbers"])


def arithmetic(text: str) -> Fraction | None:
    """The value of a sum of whole numbers with + - * / and brackets; None of any other text, and of a division by 0."""
    if not _ARITHMETIC.fullmatch(text) or "**" in text or "//" in text:
        return None
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp):
        return _value(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(f"{type(node).__name__} is no arithmetic")


OWN_SCORES: dict[str, Callable[[str, Entry], bool]] = {
    **dict.fromkeys(("binary_matrix", "spiral_matrix", "string_insertion"), _is_reference),
    **dict.fromkeys(
        ("polynomial_multiplication", "simple_integration", "intermediate_integration"), _is_same_expression
    ),
    "countdown": _makes_target,
    "n_queens": _is_a_solution,
    "number_sorting": _is_same_list,
    "puzzle24": _makes_24,
}
"""By task."""

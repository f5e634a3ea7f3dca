r"""Whether two answers are the same, by the rules of docs/verifier.md: exactly, and not where it is in doubt.

Numbers, words, choices, lists, intervals and inequalities are compared here, by their parts; what is left are
expressions, which math-verify reads and sympy compares. Never by an absolute difference, which is nothing between small
numbers, and never by the letters of a product, which would make `on` of `no`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from megatron_sgopd.verify.notation import bracketed, plain, split
from megatron_sgopd.verify.numbers import Number, number

_DEEPEST = 4
_MOST_MEMBERS = 100


def equal(reference: str, said: str) -> bool:
    """Whether an answer is the reference."""
    ours, theirs = plain(reference), plain(said)
    return bool(ours and theirs) and _same(ours, theirs, 0)


def _same(ours: str, theirs: str, depth: int) -> bool:
    if depth > _DEEPEST:
        return False
    whole = ours, theirs
    (label, ours), (their_label, theirs) = _unlabelled(ours), _unlabelled(theirs)
    if label and their_label and label != their_label:
        return False
    if bool(label) != bool(their_label) and _EQUALS.search(theirs if label else ours):
        return _same_expressions(*whole)  # `y = 2x + 1` is `y - 2x = 1` as well
    if not (ours and theirs):
        return False
    if _compact(ours) == _compact(theirs):
        return True
    for compare in (_same_choice, _same_words, _same_times, _same_numbers):
        if (verdict := compare(ours, theirs)) is not None:
            return verdict
    members = _members(ours), _members(theirs)
    if any(found is not None for found in members):
        return _same_members(ours, theirs, *members, depth)
    stripped = _without_unit(ours), _without_unit(theirs)
    if any(unit for _, unit in stripped):
        (ours, unit), (theirs, their_unit) = stripped
        return (not unit or not their_unit or unit == their_unit) and _same(ours, theirs, depth + 1)
    return _same_expressions(ours, theirs)


def _same_expressions(ours: str, theirs: str) -> bool:
    from megatron_sgopd.verify.expressions import same_expression

    return same_expression(ours, theirs)


def _compact(text: str) -> str:
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text)


# ---- Labels, choices, words -----------------------------------------------------------------------------

_EQUALS = re.compile(r"(?<![<>!\\])=+(?!=)|\\equiv(?![a-z])")
_NAME = re.compile(
    r"\\?[A-Za-z]+(?:_\{?\w+\}?)?'?(?:\([A-Za-z, ]+\))?|\\angle\s*[A-Z]+|\|[A-Z]+\||"
    r"\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])+\s*\)"
)
_MEMBER_OF = re.compile(r"^([A-Za-z])\s*\\in(?![a-z])\s*")


def _unlabelled(text: str) -> tuple[str, str]:
    """`x`, `5` of `x = 5` and of `x = 2 + 3 = 5`; an empty label where there is none, or where it is an equation."""
    if match := _MEMBER_OF.match(text):
        return match[1], text[match.end() :].strip()
    sides = [side.strip() for side in split(text, _EQUALS)]
    if len(sides) == 1 or any(len(split(part, _EQUALS)) > 1 for part in split(text, _COMMAS)[1:]):
        return "", text
    if _NAME.fullmatch(sides[0]) and not (len(sides) == 2 and _holds_variable(sides[1], sides[0])):
        return sides[0].replace(" ", ""), sides[-1]
    return ("", sides[-1]) if len(sides) > 1 and not any(map(_has_letters, sides)) else ("", text)


def _holds_variable(text: str, name: str) -> bool:
    return bool(re.search(rf"(?<![A-Za-z\\]){re.escape(name)}(?![A-Za-z])", text))


def _has_letters(text: str) -> bool:
    return bool(re.search(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])", text))


_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\s*:?\s*)?(?:\(([A-Ja-j])\)|\[([A-J])\]|([A-Ja-j])(?=\s*[.):]|$))\s*[.):]?\s*(.*)",
    re.I | re.S,
)
_MARKED = re.compile(r"[(\[]?[A-Ja-j][)\].:]")
"""Begins a choice that says its text too: without a mark it may be a text that begins with a letter."""
_ANOTHER = re.compile(r"\([A-J]\)|\b[B-HJ]\b")


def choice(text: str) -> tuple[str, str] | None:
    """The letter of a choice and the text beside it; None of what is no choice."""
    match = _CHOICE.fullmatch(text)
    if match is None or _ANOTHER.search(match[4]):
        return None
    return (match[1] or match[2] or match[3]).upper(), match[4].strip()


def _same_choice(ours: str, theirs: str) -> bool | None:
    """Only where the reference is a choice: a letter, or a letter with its text."""
    mine = choice(ours)
    if mine is None or (mine[1] and not _MARKED.match(ours)):
        return None
    said = choice(theirs)
    if said is None:
        return None if len(ours) == 1 and ours.islower() else False
    if said[0] != mine[0]:
        return False
    return not (mine[1] and said[1]) or _same(mine[1], said[1], 1)


_LETTERS = re.compile(r"[^\W\d_]+(?:[\s'-]+[^\W\d_]+)*")


def words(text: str) -> str | None:
    """A text of letters alone, in small ones; None of any other."""
    return " ".join(text.casefold().replace("-", " ").split()) if _LETTERS.fullmatch(text) else None


def _same_words(ours: str, theirs: str) -> bool | None:
    """Only where the reference is a word: it is none of the products that its letters could be."""
    mine, said = words(ours), words(theirs)
    if mine is None:
        return None if said is None or len(said) == 1 else False
    if said is not None:
        return mine == said
    return False if len(mine) > 1 else None


_TIME = re.compile(r"(\d{1,2}:\d{2})(?: ?([ap]m))?")


def _same_times(ours: str, theirs: str) -> bool | None:
    """Where the reference is a time of the day."""
    mine, said = _TIME.fullmatch(ours), _TIME.fullmatch(theirs)
    if mine is None or (not mine[2] and (said is None or not said[2])):
        return None
    return said is not None and mine[1] == said[1] and (not (mine[2] and said[2]) or mine[2] == said[2])


# ---- Numbers and units ----------------------------------------------------------------------------------

_UNIT_WORD = r"(?:[A-Za-zµΩ]{2,}\.?|[mgshLNJWVAKCF])"
_POWER = r"(?:\s*\^\s*\{?[-\d]\}?)?"
_UNIT = re.compile(
    rf"(?P<rest>.*[\d)\]}}°%])\s*(?P<unit>°\s*[CF]?|[€£¥¢]|{_UNIT_WORD}{_POWER}"
    rf"(?:\s*[/ ]\s*(?:per\s+)?{_UNIT_WORD}{_POWER}){{0,3}})",
    re.DOTALL,
)
_NOT_UNITS = re.compile(r"\b(?:or|and|mod|sin|cos|tan|log|ln|exp|to|if|for|when|where|with|the|is|are|x|y|z)\b|\\")
_UNIT_NAMES = {
    **dict.fromkeys(("degree", "deg", "°"), "°"),
    **dict.fromkeys(("centimeter", "centimetre", "cm"), "cm"),
    **dict.fromkeys(("millimeter", "millimetre", "mm"), "mm"),
    **dict.fromkeys(("kilometer", "kilometre", "km"), "km"),
    **dict.fromkeys(("meter", "metre", "m"), "m"),
    **dict.fromkeys(("kilogram", "kg"), "kg"),
    **dict.fromkeys(("gram", "g"), "g"),
    **dict.fromkeys(("second", "sec", "s"), "s"),
    **dict.fromkeys(("minute", "min"), "min"),
    **dict.fromkeys(("hour", "hr", "h"), "h"),
    **dict.fromkeys(("foot", "feet", "ft"), "ft"),
    **dict.fromkeys(("inch", "inche", "in"), "in"),
    **dict.fromkeys(("dollar", "usd", "buck"), "dollar"),
    **dict.fromkeys(("liter", "litre", "l"), "l"),
}


def _without_unit(text: str) -> tuple[str, str]:
    """What stands before a unit, and the unit by one name; no unit where none stands there."""
    match = _UNIT.fullmatch(re.sub(r"^[€£¥]\s*", "", text))
    if match is None or _NOT_UNITS.search(match["unit"]):
        return text, ""
    unit = match["unit"]
    if unit == "°" and "\\" in match["rest"].replace("\\frac", ""):
        return text, ""  # of an angle within a function
    if len(unit) == 1 and unit.isalpha() and not text[: -len(unit)].endswith(" "):
        return text, ""  # 5m is a product as well
    parts = re.split(r"\s*/\s*|\s+per\s+|\s+", unit.strip(" ."))
    names = [part.strip(".").lower() for part in parts]
    return match["rest"].strip(), "/".join(
        _UNIT_NAMES.get(n, _UNIT_NAMES.get(n.rstrip("s"), n.rstrip("s"))) for n in names
    )


def _same_numbers(ours: str, theirs: str) -> bool | None:
    """Where both are numbers, with or without units."""
    (ours, unit), (theirs, their_unit) = _without_unit(ours), _without_unit(theirs)
    mine, said = number(ours), number(theirs)
    if mine is None or said is None:
        return None
    if unit and their_unit and unit != their_unit:
        return False
    return numbers_equal(mine, said)


def numbers_equal(mine: Number, said: Number) -> bool:
    """Whether a number is the reference; a percent sign that it lacks is forgiven."""
    value, theirs = _worth(mine), _worth(said)
    if mine.percent and not said.percent and mine.value == said.value:
        return True
    if value == theirs:
        return True
    if (mine.places is None) == (said.places is None) or mine.percent != said.percent:
        return False
    return mine.stands_for(said.value) or said.stands_for(mine.value)


def _worth(of: Number) -> Fraction:
    return of.value / 100 if of.percent else of.value


# ---- Members --------------------------------------------------------------------------------------------

_COMMAS = re.compile(r"\s*(?:;|(?<!\d),|,(?!\d{3}(?!\d)))\s*(?:and\b|or\b)?\s*|\s+(?:and|or)\s+")
_UNION = re.compile(r"\s*\\cup(?![a-z])\s*|\s+or\s+")
_MATRIX = re.compile(r"\\begin\s*\{([bpvBV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\s*\{\1\}", re.DOTALL)
_PLUS_MINUS = re.compile(r"\\pm(?![a-z])")
_RELATION = re.compile(r"\s*(\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|<|>)\s*")
_VARIABLE = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?")
_SET_BUILDER = re.compile(
    r"\\\{\s*([A-Za-z])\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:\||:)\s*((?:(?!\\\{|\\\}).)*)\\\}", re.DOTALL
)

Members = tuple[str, list[str]]
"""Kind (`list`, `union`, `{}`, or brackets in order), and the members."""


def _members(text: str) -> Members | None:
    """The members of a list, a set, a tuple, an interval, a vector, or a union; None of a single answer."""
    if number(text) is not None:
        return None
    if text in ("\\mathbb{R}", "\\mathbb {R}") or words(text) in ("all real numbers", "all reals"):
        return "()", ["-\\infty", "\\infty"]
    if match := _MATRIX.fullmatch(text.strip()):
        rows = [
            [cell.strip() for cell in row.split("&")] for row in re.split(r"\\cr(?![a-z])", match[2]) if row.strip()
        ]
        is_vector = len(rows) == 1 or all(len(row) == 1 for row in rows)
        return "()" if is_vector else f"matrix {len(rows)}", [cell for row in rows for cell in row]
    if (built := _SET_BUILDER.fullmatch(text)) is not None:
        return _members(built[2].strip())
    if (interval := _as_interval(text)) is not None:
        return interval
    parts = [part for part in split(text, _UNION) if part.strip()]
    if len(parts) > 1 and all(_is_interval(part) for part in parts):
        return "union", parts
    if (held := bracketed(text)) is not None:
        kind, inner = held
        inside = [part for part in split(inner, re.compile(r"\s*[,;]\s*")) if part.strip()]
        if len(inside) > 1 or text.startswith("\\{"):
            return kind, inside
        return ("list", [inner]) if kind in ("()", "[]", "{}") and inner else None
    parts = [part for part in split(text, _COMMAS) if part.strip()]
    if len(parts) > 1:
        return "list", [expanded for part in parts for expanded in _both_signs(part)]
    both = _both_signs(text)
    return ("list", both) if len(both) > 1 else None


def _both_signs(text: str) -> list[str]:
    if len(_PLUS_MINUS.findall(text)) != 1:
        return [text]
    return [_PLUS_MINUS.sub(sign, text).strip().removeprefix("+").strip() for sign in ("+", "-")]


def _is_interval(text: str) -> bool:
    held = bracketed(text.strip())
    if held is not None and held[0] in ("()", "[]", "(]", "[)"):
        return len(split(held[1], re.compile(","))) == 2
    return _as_interval(text.strip()) is not None


def _as_interval(text: str) -> Members | None:
    """The interval of one variable that an inequality or a chain of two stands for."""
    sides, signs = split(text, _RELATION), [match[1] for match in _RELATION.finditer(text)]
    if len(sides) != len(signs) + 1 or len(sides) not in (2, 3):
        return None
    sides = [side.strip() for side in sides]
    if len(sides) == 2:
        first, second = (bool(_VARIABLE.fullmatch(side)) and side != "\\infty" for side in sides)
        if first == second:
            return None
        (name, bound), sign = (sides, signs[0]) if first else (sides[::-1], _turned(signs[0]))
        if _holds_variable(bound, name):
            return None
        if sign == "\\ne":
            return "union", [f"(-\\infty,{bound})", f"({bound},\\infty)"]
        closed = sign.startswith("\\")
        if sign in ("<", "\\le"):
            return "(]" if closed else "()", ["-\\infty", bound]
        return "[)" if closed else "()", [bound, "\\infty"]
    low, name, high = sides
    if signs[0] in (">", "\\ge") and signs[1] in (">", "\\ge"):
        low, high, signs = high, low, [_turned(signs[1]), _turned(signs[0])]
    if not _VARIABLE.fullmatch(name) or any(sign not in ("<", "\\le") for sign in signs):
        return None
    return ("[" if signs[0] == "\\le" else "(") + ("]" if signs[1] == "\\le" else ")"), [low, high]


def _turned(sign: str) -> str:
    return {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}.get(sign, sign)


def relation_variable(text: str) -> str | None:
    """The variable of an inequality that is an interval."""
    sides = [side.strip() for side in split(text, _RELATION)]
    if len(sides) == 1:
        return None
    return next((side for side in sides if _VARIABLE.fullmatch(side) and side != "\\infty"), None)


def _same_members(ours: str, theirs: str, mine: Members | None, said: Members | None, depth: int) -> bool:
    names = relation_variable(ours), relation_variable(theirs)
    if None not in names and names[0] != names[1]:
        return False
    kind, members = mine or ("one", [ours])
    their_kind, their_members = said or ("one", [theirs])
    if len(members) != len(their_members) or len(members) > _MOST_MEMBERS:
        return False
    kinds = {kind, their_kind}
    if kinds <= {"list", "{}", "one"} or kinds == {"union"}:
        if len(members) == 1 and kinds == {"one", "{}"}:
            return False  # a set of one is not its member
        return _same_in_any_order(members, their_members, depth)
    in_order = len(kinds) == 1 or (
        kinds <= {"list", "()", "[]"} and ("[]" not in kinds or len(members) > 2) and not kinds & {"union", "one"}
    )
    return in_order and all(_same(a, b, depth + 1) for a, b in zip(members, their_members, strict=True))


def _same_in_any_order(members: Sequence[str], others: Sequence[str], depth: int) -> bool:
    left = list(others)
    for member in members:
        index = next((i for i, other in enumerate(left) if _same(member, other, depth + 1)), None)
        if index is None:
            return False
        del left[index]
    return True


# ---- Kinds ----------------------------------------------------------------------------------------------


def kind_of(answer: str) -> str:
    """What an answer is, for who looks through a data set."""
    text = _unlabelled(plain(answer))[1]
    value = number(_without_unit(text)[0])
    if value is not None:
        return "integer" if value.value.denominator == 1 else "fraction" if value.places is None else "decimal"
    if choice(text) is not None:
        return "choice"
    if words(text) is not None:
        return "word"
    if (found := _members(text)) is not None:
        return {"list": "list", "{}": "set", "union": "interval"}.get(found[0], "tuple or interval")
    return "expression" if re.search(r"[\\^_=+*/()|]|\d", text) else "text"


# ---- Votes ----------------------------------------------------------------------------------------------


def vote(answer: str) -> str:
    """One spelling for answers that are the same beyond doubt, by which votes are counted."""
    return _vote(plain(answer), 0)


def _vote(text: str, depth: int) -> str:
    _, text = _unlabelled(text)
    if (letter := choice(text)) is not None and (not letter[1] or _MARKED.match(text)):
        return letter[0]
    if (said := words(text)) is not None:
        return said
    bare, _ = _without_unit(text)
    if (value := number(bare)) is not None:
        return f"{value.value}{'%' if value.percent else ''}"
    found = _members(text) if depth < _DEEPEST else None
    if found is None:
        return _compact(text)
    kind, members = found[0], [_vote(member, depth + 1) for member in found[1][:_MOST_MEMBERS]]
    if kind == "list" and len(members) == 1:
        return members[0]
    return f"{kind}:{'|'.join(sorted(members) if kind in ('list', '{}', 'union') else members)}"

r"""One notation for answers: Unicode, Markdown, LaTeX's many spellings and words around mathematics become plain LaTeX.

Nothing is evaluated here, and nothing is dropped that could make another answer of it.
"""

from __future__ import annotations

import re
import unicodedata

_UNICODE = {
    **dict.fromkeys("−–—‐‑‒﹣－", "-"),
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "∙": r"\cdot ",
    "÷": "/",
    "∕": "/",
    "⁄": "/",
    "∶": ":",
    "∞": r"\infty ",
    "π": r"\pi ",
    "𝜋": r"\pi ",
    "≤": r"\le ",
    "⩽": r"\le ",
    "≥": r"\ge ",
    "⩾": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "≃": r"\approx ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "Ø": r"\emptyset ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}",
    "º": "°",
    "˚": "°",
    "θ": r"\theta ",
    "α": r"\alpha ",
    "β": r"\beta ",
    "γ": r"\gamma ",
    "λ": r"\lambda ",
    "φ": r"\phi ",
    "ω": r"\omega ",
    "“": '"',
    "”": '"',
    "„": '"',
    "’": "'",
    "‘": "'",
    "´": "'",
    "…": r"\ldots ",
    "，": ", ",
    "（": "(",
    "）": ")",
    **dict.fromkeys("\u00a0\u2009\u202f\u2002\u2003\u200a\u2007\u3000", " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u202a\u202b\u202c\u202d\u202e", ""),
}
_TABLE = str.maketrans(_UNICODE)
_SUPERSCRIPTS = {"⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺"[i]: "0123456789-+"[i] for i in range(12)}
_RAISED = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[A-Za-z]))")
_WRAPPER = re.compile(
    r"\\(?:text(?:rm|it|bf|sf|tt|normal|up)?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|operatorname\*?|emph|boldsymbol|bm|"
    r"boxed|fbox|underline|textsc|textsl|textmd|rm|bf|it|tt)\s*\{([^{}]*)\}|\{\s*\\(?:rm|bf|it|sf|tt|em)\s+([^{}]*)\}"
)
_PERCENT = re.compile(r"\s*(?<![A-Za-z])(?:percent|per cent)(?![A-Za-z])", re.IGNORECASE)
_HALF_OF_DAY = re.compile(r"(?<=\d)\s*([AaPp])\.?\s?[Mm]\b\.?")
_DROPPED = re.compile(
    r"\\(?:displaystyle|textstyle|limits|nolimits|left(?![a-z])|right(?![a-z])|[bB]ig+[lrm]?(?![a-z])|,|!|;|:|quad\b|qquad\b|\s)|~"
)
_FRACTION = re.compile(r"\\[dtc]frac(?![a-z])")
_BARE_FRACTION = re.compile(r"\\frac\s*(\d|\{[^{}]*\})\s*(\d|[A-Za-z]|\{[^{}]*\})")
_BARE_ROOT = re.compile(r"\\sqrt\s*(\d|[A-Za-z])")
_SPELT_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)")
_SYNONYMS = (
    (re.compile(r"\\(?:leqslant|leq)(?![a-z])"), r"\\le"),
    (re.compile(r"\\(?:geqslant|geq)(?![a-z])"), r"\\ge"),
    (re.compile(r"\\neq(?![a-z])"), r"\\ne"),
    (re.compile(r"<="), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"!="), r"\\ne "),
    (re.compile(r"\\(?:varnothing|O(?![a-z]))"), r"\\emptyset"),
    (re.compile(r"\\lt(?![a-z])"), "<"),
    (re.compile(r"\\gt(?![a-z])"), ">"),
    (re.compile(r"\\(?:lbrace|\{)"), r"\\{"),
    (re.compile(r"\\(?:rbrace|\})"), r"\\}"),
    (re.compile(r"\\(?:lvert|rvert|vert)(?![a-z])|\\mid(?![a-z])"), "|"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-z])|\\circ(?![a-z])"), "°"),
    (re.compile(r"\\?%"), r"\\%"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\log_(\w)"), r"\\log_{\1}"),
    (re.compile(r"\\mathbb\s*R(?![a-z])|\\R(?![a-z])"), r"\\mathbb{R}"),
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])"), r"\\infty "),
    (re.compile(r"\*\*(?=[\d({-])"), "^"),
    (re.compile(r"(?<=[\w)}])\s*\*\s*(?=[\w({\\])"), r"\\cdot "),
)
_DELIMITERS = re.compile(r"\$+|\\\(|\\\)|\\\[|\\\]")
_EMPHASIS = re.compile(r"^(?:\*\*|__|`+|\*|_|\"|''|')+|(?:\*\*|__|`+|\*|\"|''|(?<![A-Za-z])')+$")
_LEADING = re.compile(
    r"^(?:=|\\approx(?![a-z])|\\simeq(?![a-z])|\\sim(?![a-z])|:|(?:approximately|about|roughly|exactly|equal to)\b)\s*",
    re.I,
)
_EXCLAMATION = re.compile(r"(?<=[A-Za-z]{2})!$")
_MODULUS = re.compile(r"\s*(?:\\pmod|\\bmod|\\mod|\(\s*\\?mod)\s*\{?\s*\w+\s*\}?\s*\)?$")
_ASIDE = re.compile(r"(?<=[\w)\]}°%])\s+\((?=[^()]*(?<![\\A-Za-z])[A-Za-z]{2})[^()]*\)$")
_ROW_END = re.compile(r"\\\\(?:\[[^\]]*\])?")
_SPACES = re.compile(r"\s+")


def plain(text: str) -> str:
    r"""The answer in one notation; empty where nothing is left."""
    text = _VULGAR.sub(_as_fraction, _EMPHASIS.sub("", text.translate(_TABLE).strip()))
    text = _RAISED.sub(lambda m: "^{" + "".join(_SUPERSCRIPTS[c] for c in m[0]) + "}", text)
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2] or m[3]}}}", text)
    text = unicodedata.normalize("NFKC", text)
    text = _DELIMITERS.sub(" ", text.replace("\\$", "")) if "\\begin" not in text else text.replace("$", "")
    for _ in range(5):
        shorter = _WRAPPER.sub(_unwrapped, text)
        if shorter == text:
            break
        text = shorter
    text = _ROW_END.sub(r" \\cr ", text) if "\\begin" in text else _ROW_END.sub(" ", text)
    text = _DROPPED.sub(" ", text)
    text = _FRACTION.sub(r"\\frac", text)
    text = _BARE_FRACTION.sub(lambda m: rf"\frac{{{m[1].strip('{}')}}}{{{m[2].strip('{}')}}}", text)
    text = _SPELT_ROOT.sub(r"\\sqrt{\1}", _BARE_ROOT.sub(r"\\sqrt{\1}", text))
    text = _HALF_OF_DAY.sub(lambda m: f" {m[1].lower()}m", _PERCENT.sub(r"\\%", text))
    for pattern, synonym in _SYNONYMS:
        text = pattern.sub(synonym, text)
    return _trimmed(_SPACES.sub(" ", text))


def undecorated(text: str) -> str:
    """A text without the Markdown, dollar signs, quotes and full stop around it."""
    return _trimmed(_DELIMITERS.sub("", text))


def _trimmed(text: str) -> str:
    for _ in range(4):
        before = text
        text = _EMPHASIS.sub("", text.strip().rstrip(".,;").strip())
        text = _EXCLAMATION.sub("", text)
        text = _LEADING.sub("", text)
        text = _MODULUS.sub("", text)
        text = _ASIDE.sub("", text)
        if text == before:
            break
    return text


def _unwrapped(found: re.Match[str]) -> str:
    inner = found[1] if found[1] is not None else found[2]
    return inner if inner == inner.strip() else f" {inner} "


def _as_fraction(found: re.Match[str]) -> str:
    numerator, _, denominator = unicodedata.normalize("NFKC", found[0]).partition("\u2044")
    return rf" \frac{{{numerator}}}{{{denominator}}}"


# ---- Structure ------------------------------------------------------------------------------------------

_OPENING, _CLOSING = ("\\{", "\\langle", "(", "[", "{"), ("\\}", "\\rangle", ")", "]", "}")


_PAIRS = (("\\{", "\\}"), ("{", "}"), ("\\langle", "\\rangle"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")"))


def split(text: str, separators: re.Pattern[str]) -> list[str]:
    """The parts of a text between separators that stand in no bracket."""
    parts, depth, start, position = [], 0, 0, 0
    while position < len(text):
        if (token := next((t for t in _OPENING if text.startswith(t, position)), None)) is not None:
            depth += 1
        elif (token := next((t for t in _CLOSING if text.startswith(t, position)), None)) is not None:
            depth -= 1
        elif text.startswith("\\begin", position):
            depth, token = depth + 1, "\\begin"
        elif text.startswith("\\end", position):
            depth, token = depth - 1, "\\end"
        elif depth == 0 and (match := separators.match(text, position)) and match.end() > position:
            parts.append(text[start:position])
            start = position = match.end()
            continue
        position += len(token or ".")
    return [*parts, text[start:]]


def bracketed(text: str) -> tuple[str, str] | None:
    """The kind of brackets that hold a whole text, such as `[)`, and what they hold; None where none do."""
    for begin, end in _PAIRS:
        if not (text.startswith(begin) and text.endswith(end) and len(text) >= len(begin) + len(end)):
            continue
        inner, depth = text[len(begin) : -len(end)], 0
        for character in inner.replace("\\{", "(").replace("\\}", ")"):
            depth += (character in "([{") - (character in ")]}")
            if depth < 0:
                return None
        kind = {"\\{": "{}", "{": "{}", "\\langle": "()"}.get(begin, begin + end)
        return (kind, inner.strip()) if depth == 0 else None
    return None

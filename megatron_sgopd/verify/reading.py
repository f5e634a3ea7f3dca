r"""What a response gives as its final answer: one reading for all verifiers, by the rules of docs/verifier.md.

Only the place of an answer is decided here, and never what it is worth. Where no whole answer can be read, there is
none: a part of an expression that happens to be the reference would be a reward for a wrong answer.
"""

from __future__ import annotations

import re

_THOUGHT_ENDS = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
_THOUGHT_BEGINS = re.compile(r"<think(?:ing)?>", re.IGNORECASE)
_TAG = re.compile(r"<answer>", re.IGNORECASE)
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_LONGEST = 4000
"""Characters of a statement that are looked at."""


def final_answer(response: str, lines: int = 1) -> str | None:
    """The final answer as it stands in the response; None where none can be read.

    Args:
        lines: of an answer without any mark, as the reference has; several stand at the end as they are.
    """
    text = _spoken(response)
    if text is None:
        return None
    boxes, text = _boxes(text)
    if boxes:
        return boxes
    if _TAG.search(text):
        return _in_tags(text)
    for read in (_after_hashes, _after_words):
        if answer := read(text):
            return answer
    if lines > 1:
        return "\n".join(text.strip().split("\n")[-lines:]).strip() or None
    return _end_of(text) or None


def _spoken(response: str) -> str | None:
    """What follows the last thought; None where a thought never ends."""
    *_, text = _THOUGHT_ENDS.split(response)
    return None if _THOUGHT_BEGINS.search(text) else text


# ---- Boxes ----------------------------------------------------------------------------------------------

_BOX = re.compile(r"\\f?boxed\s*(\{|[0-9A-Za-z])")
_PLACEHOLDER = re.compile(
    r"(?:(?:the|your|final|correct|numerical|my)\s+)*(?:answers?|result|value|solution|number|expression|content|text|letter)"
    r"(?:\s+here)?|\.\.\.|…|\\[lc]?dots|\?+|_+|\s*|\\square|\\boxed|\\cdots|#+|answer\s*here|insert.*|<.*>|\[.*answer.*\]",
    re.IGNORECASE,
)
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|emph)\s*\{([^{}]*)\}")
_NOTICE = re.compile(
    r"\b(?:please|remember|recall|make sure|do not forget|don't forget|should|must|needs? to|has to|have to|note|"
    r"instruct\w*|asked|request\w*|required|format\w*|example|e\.g\.|such as)\b",
    re.IGNORECASE,
)
_NAMED = re.compile(
    r"\b(?:in|inside|within|into|using|with|like|as|format|form|of|by|a|the)\b[\s:'\"`$(]*$", re.IGNORECASE
)
_JOINED = re.compile(
    r"(?:[\s,;&$|]|\\\\(?=\s)|\\[()\[\],;:! ]|\\q?quad\b|\\(?:text|mathrm|mbox)\s*\{[\s,]*(?:or|and|,)[\s,]*\}|"
    r"\b(?:or|and)\b|"
    r"[A-Za-z](?:_\{?\w{1,3}\}?)?'?\s*=|[*_])*"
)


def _boxes(text: str) -> tuple[str | None, str]:
    """What the last boxes hold, as one list where several stand together; where none holds an answer, the text without
    them. An unclosed box ends the text."""
    closing = _closing_braces(text)
    found: list[tuple[int, int, str]] = []
    rest, position = [], 0
    for match in _BOX.finditer(text):
        if match.start() < position:  # within a box that was taken
            continue
        end = closing.get(match.end() - 1) if match[1] == "{" else match.end() - 1
        if end is None:  # never closed: what follows belongs to it
            if not found:
                return None, ""
            break
        inside = text[match.end() : end] if match[1] == "{" else match[1]
        if (nested := _BOX.match(inside.strip())) and nested[1] == "{":
            continue  # its own box will be met
        before = text[found[-1][1] if found else position : match.start()][-200:]
        if _holds_answer(inside) and not _is_reminder(before):
            found.append((match.start(), end + 1, inside.strip()))
        else:
            rest.append(text[position : match.start()])
        position = end + 1
    if not found:
        return None, "".join(rest) + text[position:]
    together = [found[-1]]
    for box in reversed(found[:-1]):
        between = text[box[1] : together[0][0]]
        if len(between) > 200 or "\n\n" in between or not _JOINED.fullmatch(between):
            break
        together.insert(0, box)
    return ", ".join(dict.fromkeys(inside for _, _, inside in together)), text


def _closing_braces(text: str) -> dict[int, int]:
    """The brace that closes each one that is closed; escaped ones are no braces."""
    closing, opened, escaped = {}, [], False
    for position, character in enumerate(text):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == "{":
            opened.append(position)
        elif character == "}" and opened:
            closing[opened.pop()] = position
    return closing


def _holds_answer(inside: str) -> bool:
    plain = _WRAPPED.sub(r"\1", inside[:_LONGEST])
    return not _PLACEHOLDER.fullmatch(plain.strip(" \t\n$*`'\".,:;~"))


def _is_reminder(before: str) -> bool:
    """Whether the words before a box speak of boxes."""
    sentence = re.split(r"(?<=[.!?])\s|\n\n", before)[-1]
    return bool(_NAMED.search(sentence) and _NOTICE.search(sentence))


# ---- Tags, hashes, words --------------------------------------------------------------------------------


def _in_tags(text: str) -> str | None:
    """The last pair alone is searched: an endless row of <answer> would make a search over all of them quadratic."""
    lower = text.lower()
    start = lower.rfind("<answer>", 0, lower.rfind("</answer>") + 1)
    match = _TAGGED.match(text, start) if start >= 0 else None
    if match is None:
        return None
    return _after_words(match[1]) or match[1].strip() or None


_HASHES = re.compile(r"^[ \t]*####(?:[ \t]+|(?=[-+−.$\\]?\d))(\S[^\n]{0,1000})$", re.MULTILINE)
_LABEL = re.compile(r"[\s*_#]*(?:the\s+)?(?:final\s+|correct\s+)?answers?(?:\s+is)?[\s*_]*[:=]?[\s*_]+", re.IGNORECASE)
_NUMBERED = re.compile(r"\d+[.)]\s+\S")


def _after_hashes(text: str) -> str | None:
    """What the last line says that begins with #### and goes on as an answer does, not as a heading."""
    last = text.rstrip().rpartition("\n")[2]
    for match in reversed(list(_HASHES.finditer(text))):
        labelled = _LABEL.match(match[1])
        said = (match[1][labelled.end() :] if labelled else match[1]).strip()
        short = len(said.split()) <= 3 and not said.endswith(":") and match[0].strip() == last.strip()
        begins = re.match(r"[*_\s]*(?:[-+−–.$\\(\[{√π∞]|\d)", said) and not _NUMBERED.match(said)
        if said and (labelled or begins or short):
            return said
    return None


_ANSWER_IS = re.compile(
    r"\b(?:answers?|ans\.?(?=[\s:=])|options?|choices?)(?![a-z])(?:\s+(?:to|for|of)\b[^.:=\n]{1,80}?)?[\s*_\"')\]]*"
    r"(?::|=|\b(?:is|are|was|equals|becomes)\b|\b(?:would|should|must|will)\s+be\b)"
    r"(?:[\s*_:]|\b(?:therefore|thus|hence|simply|just|indeed|then|given by|option|choice)\b)*",
    re.IGNORECASE,
)
_HEADING = re.compile(r"^[#*_\s]*(?:the\s+)?(?:final\s+)?answers?[*_:\s]*$", re.IGNORECASE | re.MULTILINE)
_CORRECTION = re.compile(
    r"\b(?:wait|actually|correction|rather|instead|oops|mistaken?|wrong|scratch that|let me re\w*|on second thought)\b|"
    r"\bno,",
    re.IGNORECASE,
)


def _after_words(text: str) -> str | None:
    """What follows the last `answer is` or the like, whole, unless it is taken back afterwards."""
    matches = [*_ANSWER_IS.finditer(text), *_HEADING.finditer(text)]
    if not matches:
        return None
    match = max(matches, key=lambda found: found.end())
    rest = text[match.end() :].lstrip(" \t\n*_")
    said = rest[: _end_of_statement(rest)]
    after = rest[len(said) :]
    if re.match(r"(?:not|n't|unknown|unclear)\b", said, re.IGNORECASE):
        return None
    if _CORRECTION.search(after) and re.search(r"\d|\\|\$", after):
        return None
    return said.strip() or None


def _end_of_statement(text: str) -> int:
    """Where a statement ends: at the end of its line or sentence, outside of formulas and brackets."""
    depth, formula, position, length = 0, "", 0, min(len(text), _LONGEST)
    while position < length:
        character, pair = text[position], text[position : position + 2]
        if pair in ("$$", "\\[", "\\(", "\\]", "\\)"):
            formula = "" if formula or pair in ("\\]", "\\)") else pair
            position += 2
            continue
        if character == "\\":
            position += 2
            continue
        if character == "$":
            # A sum of money opens nothing: no other sign closes it on its line.
            closes = formula == "$" or "$" in text[position + 1 : length].partition("\n")[0]
            formula = "" if formula == "$" else "$" if closes else formula
        elif character in "{[(":
            depth += 1
        elif character in "}])":
            depth = max(0, depth - 1)
        elif (character == "\n" and formula in ("", "$")) or (
            character in ".!?" and not formula and depth == 0 and _ends_sentence(text, position)
        ):
            return position
        position += 1
    return length


def _ends_sentence(text: str, position: int) -> bool:
    """Whether a full stop, or its like, is no decimal point, no factorial and no abbreviation's."""
    following = text[position + 1 : position + 3]
    if following.strip(" *_\"'") and not (following[0].isspace() or following[0] in "*_\"'"):
        return False
    factorial = text[position] == "!" and re.match(r"[\w)\]}]", text[max(0, position - 1) : position])
    return not factorial or not following.strip()


# ---- The end --------------------------------------------------------------------------------------------

_PLEASANTRY = re.compile(
    r"\b(?:let me know|hope (?:this|that)|feel free|if you (?:have|need|want|would)|happy to|glad to|good luck|"
    r"any (?:other |further |more )?questions|anything else)\b",
    re.IGNORECASE,
)
_DISPLAYS = (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("$", "$"))
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_ASIDE = re.compile(r"\s+\((?=[^()]*(?<![\\A-Za-z])[A-Za-z]{2})[^()]*\)$")


def _end_of(text: str) -> str | None:
    """The formula or number that ends the last statement, else the last line if it is all that there is to it."""
    statement = _last_statement(text)
    bare = statement.strip().rstrip(".!?,;: *_")
    if not bare:
        return None
    formulas = list(_FORMULA.finditer(bare))
    if formulas and not bare[formulas[-1].end() :].strip(" *_."):
        return _joined_formulas(bare, formulas)
    return _trailing_mathematics(bare) or (bare if len(bare) <= 1000 else None)


def _last_statement(text: str) -> str:
    text = text.strip()[-_LONGEST:]
    for begin, end in _DISPLAYS[:2]:
        closed = text.rstrip(" .*_")
        if closed.endswith(end) and (start := closed.rfind(begin, 0, len(closed) - len(end))) >= 0:
            return closed[start:]
    for line in reversed(text.split("\n")):
        statements = _statements(line)
        while statements and (not statements[-1].strip(" *_-#") or _PLEASANTRY.search(statements[-1])):
            statements.pop()
        if statements:
            return statements[-1]
    return ""


def _statements(line: str) -> list[str]:
    found = []
    while line.strip():
        end = _end_of_statement(line)
        found.append(line[: end + 1])
        line = line[end + 1 :]
    return found


def _joined_formulas(text: str, formulas: list[re.Match[str]]) -> str:
    """The last formula, with those before that only `or`, `and` or a comma part from it."""
    taken = [formulas[-1]]
    for formula in reversed(formulas[:-1]):
        if not re.fullmatch(r"\s*(?:,|or|and|, ?or|, ?and)?\s*", text[formula.end() : taken[0].start()]):
            break
        taken.insert(0, formula)
    return ", ".join(next(group for group in formula.groups() if group is not None).strip() for formula in taken)


_OPERATORS = re.compile(r"[-+*/=<>^·×÷≤≥≠≈±−–]+|\\(?:times|cdot|div|pm|le|ge|leq|geq|neq|approx|to|in|cup|cap)")
_MATHEMATICAL = re.compile(r"[-+−–]?[\d.,]*\d.*|.*[\\^_=√π∞²³½¼¾%°].*|[-+*/=<>(){}\[\],|!±×÷·≤≥≠≈]+|.*\d.*")
_NO_UNIT = re.compile(
    r"more|less|fewer|times|others?|than|of|out|per|larger|smaller|greater|too|each|away|left|ago", re.IGNORECASE
)
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]+[,;:]?")


def _trailing_mathematics(text: str) -> str | None:
    """The longest run of mathematical tokens that ends a text, with a unit of one or two words behind it."""
    text = re.sub(r"\*\*|__|\\?\$|\\[()]", "", text)
    aside = _ASIDE.search(text)
    tokens = (text[: aside.start()] if aside else text).split()
    end = len(tokens)
    units = 0
    while units < 2 and units < end - 1 and _WORD.fullmatch(tokens[end - 1 - units]):
        units += 1
    if any(_NO_UNIT.fullmatch(token) for token in tokens[end - units : end]):
        return None
    if units and not (re.search(r"\d[%)\]}]*$", tokens[end - 1 - units])):
        units = 0 if units == 1 or not re.search(r"\d[%)\]}]*$", tokens[end - units]) else 1
    start = end - units
    while start > 0:
        token = tokens[start - 1]
        letter = re.fullmatch(r"[A-Za-z](?:_\w+)?", token) and start < end and _OPERATORS.match(tokens[start])
        if not (letter or (_MATHEMATICAL.fullmatch(token) and not re.match(r"[A-Za-z]{2,}", token))):
            break
        start -= 1
    said = " ".join(tokens[start:end])
    if not re.search(r"\d|\\|[π∞√½¼¾]", " ".join(tokens[start : end - units])):
        return None
    sides = re.split(r"(?<![<>!=\\])=(?!=)", said)
    return said if len(sides) == 2 and re.fullmatch(r"\s*[A-Za-z](?:_\w+)?\s*", sides[0]) else sides[-1].strip(" *_")

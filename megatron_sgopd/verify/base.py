"""What a verifier is, how an answer is found in a response, and how verifiers are named."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_sgopd.errors import ConfigError

MAX_ANSWER = 2000
"""Characters; an extracted answer that is longer is wrong unseen, since parsers are slow on it."""


@dataclass(frozen=True)
class VerifyRequest:
    """One response to judge."""

    prompt: str
    response: str
    answer: str
    """The reference answer."""
    task: str
    """reasoning-gym task that the prompt comes from, or empty."""
    metadata: dict[str, Any]
    """That task's metadata; JSON values."""


@dataclass(frozen=True)
class VerifierResult:
    """The judgement."""

    outcome: int
    """1 right, 0 wrong."""
    extracted: str | None
    """The answer as found in the response."""
    reason: str
    """right, wrong, no answer, too long, unreadable (by the verifier); timeout, memory, crashed (by the pool);
    truncated (never given to a verifier)."""


Verifier = Callable[[VerifyRequest], VerifierResult]

_BUILT_IN = {
    "math": "megatron_sgopd.verify.math:verify",
    "task": "megatron_sgopd.verify.tasks:verify",
    "exact": "megatron_sgopd.verify.base:exact",
}


def resolve_verifier(name: str) -> Verifier:
    """The verifier that a recipe names: math, task, exact, or import.path:function.

    Raises:
        ConfigError: no such name, module or function.
    """
    module_name, _, function_name = _BUILT_IN.get(name, name).partition(":")
    if not function_name:
        near = difflib.get_close_matches(name, _BUILT_IN, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"unknown verify.verifier {name!r}: {hint}Known: {', '.join(_BUILT_IN)}, or import.path:function"
        )
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"verify.verifier {name!r} cannot be imported: {error}") from None
    if not callable(function):
        raise ConfigError(f"verify.verifier {name!r} is a {type(function).__name__}, not a function")
    return function


def exact(request: VerifyRequest) -> VerifierResult:
    """Right if the extracted answer, or else the whole response, is the reference answer, spaces aside."""
    extracted = extract_answer(request.response)
    text = request.response.strip() if extracted is None else extracted
    return judged(text == request.answer.strip(), text)


def judged(right: bool, extracted: str) -> VerifierResult:
    """The result of a comparison that could be made."""
    return VerifierResult(int(right), extracted, "right" if right else "wrong")


ANSWER_MARKERS = ("\\boxed{", "<answer>", "####")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def extract_answer(response: str) -> str | None:
    """The last \\boxed{…}, else the last <answer>…</answer>, else what follows the last ####; None if there is none."""
    boxed = _last_boxed(response)
    if boxed is not None:
        return boxed.strip()
    # The last pair alone is searched: an endless row of <answer> would make a search over all of them quadratic.
    start = response.rfind("<answer>")
    if start >= 0 and (match := _TAGGED.match(response, start)):
        return match[1].strip()
    _, marker, after = response.rpartition("####")
    return after.strip().partition("\n")[0] if marker else None


def _last_boxed(response: str) -> str | None:
    """The balanced braces behind the last \\boxed."""
    start = response.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + len("\\boxed"), len(response)):
        depth += {"{": 1, "}": -1}.get(response[position], 0)
        if depth == 0:
            return response[start + len("\\boxed{") : position]
    return None

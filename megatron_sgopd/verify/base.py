"""What a verifier is, how an answer is found in a response, and how verifiers are named."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.imports import import_function

MAX_ANSWER = 1000
"""Characters by which an answer may exceed the reference; a longer one is wrong unseen, since parsers are slow."""


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
    """right, wrong, no answer, too long (by the verifier); unreadable (EXCEPTION), timeout, memory, crashed (by the
    pool, where the verifier raised, was too slow, took too much, or died); truncated (never given to a verifier)."""


Verifier = Callable[[VerifyRequest], VerifierResult]


def resolve_verifier(name: str) -> Verifier:
    """The verifier that a recipe names: math, task, exact, or import.path:function.

    The built-in ones import their libraries at their first call.

    Raises:
        ConfigError: no such name, module or function, or a module that fails when imported.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if not all(name.partition(":")):
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"unknown verify.verifier {name!r}: {hint}Known: {', '.join(BUILT_IN)}, or import.path:function"
        )
    return import_function(name, "verify.verifier")


def _math(request: VerifyRequest) -> VerifierResult:
    from megatron_sgopd.verify.math import verify

    return verify(request)


def _task(request: VerifyRequest) -> VerifierResult:
    from megatron_sgopd.verify.tasks import verify

    return verify(request)


def exact(request: VerifyRequest) -> VerifierResult:
    """Right if the stated answer is the reference answer to the letter, spaces around it aside."""
    answer = stated_answer(request)
    if answer is None:
        return VerifierResult(0, None, "no answer")
    return judged(answer == request.answer.strip(), answer)


BUILT_IN: dict[str, Verifier] = {"math": _math, "task": _task, "exact": exact}


def judged(right: bool, extracted: str) -> VerifierResult:
    """The result of a comparison that could be made."""
    return VerifierResult(int(right), extracted, "right" if right else "wrong")


# ---- Finding the answer ----------------------------------------------------------------------------------

_MARKERS = ("\\boxed{", "<answer>", "####")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def last_lines(request: VerifyRequest) -> str:
    """The end of the response: as many lines as the reference has."""
    return "\n".join(request.response.strip().split("\n")[-1 - request.answer.strip().count("\n") :]).strip()


def stated_answer(request: VerifyRequest, unmarked: Callable[[VerifyRequest], str] = last_lines) -> str | None:
    """The marked answer, or what `unmarked` finds in a response without any mark.

    None where there is none: an empty one, or one that was begun and not closed.
    """
    if any(marker in request.response for marker in _MARKERS):
        return extract_answer(request.response) or None
    return unmarked(request) or None


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

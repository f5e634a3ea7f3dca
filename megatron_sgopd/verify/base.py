"""What a verifier is, how an answer is found in a response, and how verifiers are named."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.imports import import_function
from megatron_sgopd.verify.reading import final_answer

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
    vote: str | None = None
    """One spelling for answers that are the same, by which majorities are counted; None: `extracted` itself."""


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


def stated_answer(request: VerifyRequest) -> str | None:
    """The final answer as it stands in the response; None where none can be read."""
    return final_answer(request.response, 1 + request.answer.strip().count("\n"))

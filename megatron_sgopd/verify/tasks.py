"""reasoning-gym's own scorers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any

from reasoning_gym import get_score_answer_fn
from reasoning_gym.factory import DATASETS

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.verify.base import MAX_ANSWER, VerifierResult, VerifyRequest, judged, stated_answer
from megatron_sgopd.verify.notation import undecorated
from megatron_sgopd.verify.own_scores import OWN_SCORES

_EVALUATES = re.compile(r"\b(eval|exec|parse_expr|sympify)\(")


def verify(request: VerifyRequest) -> VerifierResult:
    """Right if it is the reference answer, or the task's scorer gives full marks.

    The scorers' partial marks are for form or nearness, not for being half right: many give 0.01 to any text.
    """
    extracted = stated_answer(request)
    if extracted is None:
        return VerifierResult(0, None, "no answer")
    if len(extracted) > MAX_ANSWER + len(request.answer):
        return VerifierResult(0, extracted, "too long")
    if extracted == request.answer.strip():
        return judged(True, extracted)
    entry = {"question": request.prompt, "answer": request.answer, "metadata": request.metadata}
    forms = dict.fromkeys((extracted, undecorated(extracted)))
    return judged(any(scorer(request.task)(form, entry) >= 1.0 - 1e-9 for form in forms), extracted)


@cache
def scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    """The task's scoring function: reasoning-gym's, or ours where that would evaluate the answer as code.

    Raises:
        ConfigError: no such task, or a scorer that would evaluate the answer as code and has none of ours.
    """
    if task in OWN_SCORES:
        return OWN_SCORES[task]
    if task not in DATASETS or task == "composite":
        raise ConfigError(f"verify.verifier 'task' needs prompts of a reasoning-gym task, not of {task!r}: use math")
    if _EVALUATES.search(inspect.getsource(DATASETS[task][0].score_answer)):
        raise ConfigError(
            f"reasoning-gym's scorer of {task!r} evaluates the answer as Python code, which model output must never "
            "be: choose another task, or give a verifier of your own as import.path:function"
        )
    return get_score_answer_fn(task)

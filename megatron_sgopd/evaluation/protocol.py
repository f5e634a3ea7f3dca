"""What an evaluation was measured by: rates are only set side by side where that is the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_sgopd.config import Settings
from megatron_sgopd.rollout.prompts import PromptSet

MEASURED = "measured"
"""Field of a line of evaluations.jsonl."""


def protocol(settings: Settings, prompts: PromptSet) -> dict[str, Any]:
    """Everything that shapes a held-out pass rate but the model."""
    evaluate = settings.evaluate
    return {
        "samples": evaluate.samples,
        "temperature": evaluate.temperature,
        "top_p": evaluate.top_p,
        "top_k": evaluate.top_k,
        "stop": list(evaluate.stop),
        "max_new_tokens": settings.rollout.max_new_tokens,
        "verifier": settings.verify.verifier,
        "problems": prompts.digest,
    }


def measured_as(lines: Sequence[dict[str, Any]], like: Any) -> list[dict[str, Any]]:
    """Those of the lines that were measured by the protocol `like`."""
    return [line for line in lines if line.get(MEASURED) == like]


def last_measured(lines: Sequence[dict[str, Any]]) -> Any:
    """The protocol of the last line; None where there is none."""
    return lines[-1].get(MEASURED) if lines else None


def differences(one: Any, other: Any) -> str:
    """In what two protocols differ, in words; empty where they do not."""
    first, second = (value if isinstance(value, dict) else {} for value in (one, other))
    names = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    return ", ".join(f"{name} {first.get(name)!r} and {second.get(name)!r}" for name in names)

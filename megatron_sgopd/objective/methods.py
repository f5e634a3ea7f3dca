"""The methods: one frozen row of settings each. Notation: the table of presets in docs/objective.md."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any, Literal

from megatron_sgopd.errors import ConfigError


@dataclass(frozen=True)
class Method:
    """What a token's update is made of.

    A_t = delta_t + (kappa_t - 1) d_t + eta_t o_i, with kappa_t and eta_t chosen by the gate.
    """

    name: str
    agree_coefficient: float = 1.0
    """lambda: kappa where teacher and verifier agree."""
    conflict_coefficient: float = 1.0
    """beta: kappa where they conflict."""
    agree_outcome_weight: float = 0.0
    """eta where they agree."""
    conflict_outcome_weight: float = 0.0
    """eta everywhere else."""
    reference: Literal["initial", "live"] = "live"
    """d_t is teacher minus initial student, or (live) delta_t itself."""
    outcome: Literal["none", "pm1", "group", "group_centered"] = "none"
    """How R_i becomes o_i."""
    uniform_groups: Literal["conflict", "skip"] = "conflict"
    """Groups with one outcome for all responses: o_i = 0, so conflict; or left out."""
    trajectory_gate: bool = False
    """Keep a response only where the teacher's preference for the whole of it has the outcome's sign."""
    trajectory_margin: float = 0.0
    """m of the trajectory gate, in nats."""
    noise_floor: float = 0.0
    """tau in nats: |delta_t| up to here is neutral."""
    importance_clip: float | None = None
    """C: w_t = min(exp(s_t - b_t), C); None: w_t = 1."""

    @property
    def teacher(self) -> bool:
        """Whether teacher log-probs are used at all."""
        return self.reference == "initial" or bool(self.agree_coefficient or self.conflict_coefficient)

    @property
    def needs_whole_responses(self) -> bool:
        """Whether a token's update depends on the other tokens of its response."""
        return self.trajectory_gate


METHODS = {
    method.name: method
    for method in (
        Method("sgopd", 1.8, 1.0, reference="initial", outcome="group"),
        Method("sgopd_scaled", 1.8, 1.0, outcome="group"),
        Method("sgopd_additive", 1.8, 1.0, 1.0, 1.0, outcome="group"),
        Method("opd"),
        Method("exopd", 1.25, 1.25, reference="initial"),
        Method("opdvr", 1.0, 0.0, outcome="pm1"),
        Method("grpd", 1.0, 0.0, outcome="group", uniform_groups="skip"),
        Method("grpo", 0.0, 0.0, 1.0, 1.0, outcome="group"),
        Method("opd_grpo", 1.0, 1.0, 1.0, 1.0, outcome="group"),
        Method("rgopd", outcome="group", trajectory_gate=True),
    )
}


def method_from_settings(name: str, **overrides: Any) -> Method:
    """The preset `name` with some of its fields replaced.

    Raises:
        ConfigError: unknown name, or a number out of its range.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "choose one."
        raise ConfigError(f"unknown sgopd.method {name!r}: {hint} Known: {', '.join(METHODS)}")
    method = dataclasses.replace(METHODS[name], **overrides)
    for field in dataclasses.fields(Method):
        value = getattr(method, field.name)
        if isinstance(value, (int, float)) and not math.isfinite(value):
            raise ConfigError(f"sgopd.{field.name} is {value}: give a finite number")
    if method.noise_floor < 0 or (method.importance_clip is not None and method.importance_clip <= 0):
        raise ConfigError("sgopd.noise_floor must not be negative and sgopd.importance_clip must be positive")
    gated = method.agree_coefficient != method.conflict_coefficient or method.trajectory_gate
    if method.outcome == "none" and (gated or method.agree_outcome_weight or method.conflict_outcome_weight):
        raise ConfigError(
            f"sgopd.outcome is 'none', but sgopd.method={name} with these coefficients uses the verifier's outcome: "
            "set sgopd.outcome to pm1, group or group_centered"
        )
    return method

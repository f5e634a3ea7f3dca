"""The methods: one frozen row of settings each, in the notation of `megatron_sgopd.objective`."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from megatron_sgopd.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from megatron_sgopd.objective.loss import TokenSignals, TokenUpdate

Objective = Callable[["TokenUpdate", "TokenSignals"], "torch.Tensor"]
Reference = Literal["initial", "live"]
Outcome = Literal["none", "pm1", "group", "group_centered"]
UniformGroups = Literal["conflict", "skip"]
Estimator = Literal["sampled", "full"]


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
    reference: Reference = "live"
    """d_t is teacher minus initial student, or (live) delta_t itself."""
    outcome: Outcome = "none"
    """How R_i becomes o_i."""
    uniform_groups: UniformGroups = "conflict"
    """Groups with one outcome for all responses: o_i = 0, so conflict; or left out."""
    trajectory_gate: bool = False
    """Keep a response only where the teacher's preference for the whole of it has the outcome's sign."""
    trajectory_margin: float = 0.0
    """m of the trajectory gate, in nats."""
    noise_floor: float = 0.0
    """tau in nats: |delta_t| up to here is neutral."""
    measured_noise_floor: bool = False
    """tau is not the setting's but what a run measures (see `Run`)."""
    importance_clip: float | None = None
    """C: w_t = min(exp(s_t - b_t), C); None: w_t = 1."""
    advantage_clip: float | None = None
    """Bound on |A_t|."""
    reference_kl_coef: float = 0.0
    """Weight of r_t - s_t in A_t: the sampled-token estimate of the reverse KL to the initial student."""
    ratio_clip: float = 0.2
    """epsilon of the clipped importance ratio; only read from a batch's second update on."""
    estimator: Estimator = "sampled"
    """kappa_t delta_t for the sampled token alone, or in its place the gradient of kappa_t KL_t over the vocabulary."""
    objective: Objective | None = None
    """Makes A_t in place of the formula above."""

    @property
    def needs_reference(self) -> bool:
        """Whether r_t must be known."""
        return self.reference == "initial" or self.reference_kl_coef > 0

    @property
    def teacher(self) -> bool:
        """Whether A_t depends on q_t: directly, or through a gate that chooses what else counts."""
        return (
            self.objective is not None
            or self.measured_noise_floor
            or self.reference == "initial"
            or self.agree_coefficient != 0
            or self.conflict_coefficient != 0
            or self.agree_outcome_weight != self.conflict_outcome_weight
            or self.noise_floor > 0
            or self.trajectory_gate
        )

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
        # Its gate reads nothing of o but the sign: in a group of one outcome too, the verifier has said which it is.
        Method("rgopd", outcome="pm1", trajectory_gate=True),
    )
}


_CHOICES = {"reference": Reference, "outcome": Outcome, "uniform_groups": UniformGroups, "estimator": Estimator}
_NOT_NEGATIVE = (
    *("agree_coefficient", "conflict_coefficient", "agree_outcome_weight", "conflict_outcome_weight"),
    *("noise_floor", "trajectory_margin", "reference_kl_coef"),
)


def method_from_settings(name: str, **overrides: Any) -> Method:
    """The preset `name` with some of its fields replaced.

    Raises:
        ConfigError: unknown name or choice, a number out of its range, or a gate without an outcome to read.
    """
    _check_choice("method", name, METHODS)
    method = dataclasses.replace(METHODS[name], **overrides)
    for setting, choices in _CHOICES.items():
        _check_choice(setting, getattr(method, setting), get_args(choices))
    for setting in _NOT_NEGATIVE:
        value = getattr(method, setting)
        if not 0 <= value < math.inf:
            raise ConfigError(f"sgopd.{setting} is {value}: give a finite number that is not negative")
    clip = method.importance_clip
    if clip is not None and not 0 < clip < math.inf:
        raise ConfigError(f"sgopd.importance_clip is {clip}: give a finite number above 0, or leave it out")
    if method.advantage_clip is not None and method.estimator == "full":
        raise ConfigError(
            "sgopd.advantage_clip bounds what the sampled token weighs, and sgopd.estimator=full reads the whole "
            "vocabulary: leave one of them out"
        )
    if method.estimator == "full" and (
        method.reference == "initial" or method.trajectory_gate or method.objective is not None or not method.teacher
    ):
        raise ConfigError(
            f"sgopd.estimator=full takes the KL from the student to the teacher, which sgopd.method={name} with these "
            "settings does not use as it is: set sgopd.reference to live, and leave out trajectory gate and objective"
        )
    gated = method.agree_coefficient != method.conflict_coefficient or method.trajectory_gate
    if method.outcome == "none" and (gated or method.agree_outcome_weight or method.conflict_outcome_weight):
        raise ConfigError(
            f"sgopd.outcome is 'none', but sgopd.method={name} with these coefficients uses the verifier's outcome: "
            "set sgopd.outcome to pm1, group or group_centered"
        )
    return method


def _check_choice(setting: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "choose one."
        raise ConfigError(f"unknown sgopd.{setting} {value!r}: {hint} Known: {', '.join(known)}")

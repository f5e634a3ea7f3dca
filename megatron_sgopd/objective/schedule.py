"""How much of the teacher's own rollouts a step learns from: held at cold start, then decaying to none.

    w(step) = w0                                                  step < hold
              w0 * (1 + cos(pi (step - hold) / (end - hold))) / 2 hold <= step < end      (cosine)
              0                                                   step >= end

`linear` goes from w0 to 0 on a straight line between hold and end; `step` keeps w0 until end. That the amount decays
to none, in three phases and by a cosine, is reported of SG-OPD (arXiv 2606.09304); its numbers are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Shape = Literal["cosine", "linear", "step"]


@dataclass(frozen=True)
class TeacherSchedule:
    """w as a function of the step alone, so that a run that resumes needs nothing else."""

    weight: float
    """w0."""
    hold: int
    """Steps at w0."""
    end: int
    """The first step at 0."""
    shape: Shape = "cosine"

    def __call__(self, step: int) -> float:
        """w of a step; steps count from 0."""
        if step >= self.end:
            return 0.0
        if step < self.hold or self.shape == "step":
            return self.weight
        progress = (step - self.hold) / (self.end - self.hold)
        if self.shape == "linear":
            return self.weight * (1 - progress)
        return self.weight * (1 + math.cos(math.pi * progress)) / 2

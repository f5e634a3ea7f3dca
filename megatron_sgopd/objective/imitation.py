"""How tokens of the teacher's approved rollouts enter the loss: by cross-entropy, never by the sampled estimator.

    auxiliary    L = L_on + w CE            CE = - (1/M) sum over the M teacher tokens of s_t
    mixture      L = (N L_on + M CE) / (N + M), with teacher rollouts in the fraction w of the slots

with N the student's own tokens. The estimator of L_on is an average over what the student samples; on the teacher's
tokens it would be biased. Where a batch has no student token that counts, the auxiliary loss is w CE.
"""

from __future__ import annotations

from typing import Literal

import torch

Mode = Literal["auxiliary", "mixture"]


def imitation_weights(
    student_T: torch.Tensor, teacher_T: torch.Tensor, weight: float, mode: Mode
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight of -s_t for each token, and the tokens whose number divides the sum.

    Args:
        student_T: bool [T], the student's tokens that count.
        teacher_T: bool [T], tokens of teacher rollouts; over the whole batch, as the former.
        weight: w of this step.

    Returns:
        float32 [T], 0 but for teacher tokens, and bool [T].
    """
    if mode == "mixture":
        return teacher_T.float(), student_T | teacher_T
    students, teachers = int(student_T.sum()), int(teacher_T.sum())
    if students == 0:
        return teacher_T.float() * weight, teacher_T
    return teacher_T.float() * (weight * students / max(teachers, 1)), student_T


def teacher_slots(weight: float, group_size: int) -> int:
    """Slots of a prompt's group that go to teacher rollouts in `mixture`: w G, rounded to the nearest."""
    return round(weight * group_size)

"""The student's training forward: log-probs, objective and gradient in one pass over the output layer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_sgopd.models.architecture import Architecture
from megatron_sgopd.models.logprobs import (
    OutputHead,
    TeacherHead,
    fused_full_loss,
    fused_policy_loss,
    target_logprobs,
)
from megatron_sgopd.models.microbatch import Microbatch, forward, output_head, response_hidden
from megatron_sgopd.models.scorer import Scorer
from megatron_sgopd.objective.loss import TokenSignals, coefficients, full_coefficients, policy_loss, token_update
from megatron_sgopd.objective.methods import Method
from megatron_sgopd.objective.metrics import Sums, add_sums, metric_sums, metrics_from_sums
from megatron_sgopd.platform import current


@dataclass(frozen=True)
class Student:
    """The model that is trained, without Megatron's wrappers, and its process groups."""

    model: GPTModel
    architecture: Architecture
    groups: ProcessGroupCollection


class PolicyStep:
    """`forward_step_func` of one training step, and what it saw on the way."""

    def __init__(
        self,
        student: Student,
        signals: TokenSignals,
        outcomes_T: torch.Tensor,
        counted_T: torch.Tensor,
        method: Method,
        temperature: float,
        chunk_tokens: int,
        teacher: Scorer | None = None,
        teacher_temperature: float = 1.0,
    ) -> None:
        """All tensors cover all response tokens of the step, in the order of the packed rows.

        Args:
            counted_T: bool, the tokens that the loss is a mean over.
            teacher: where the method's estimator is `full`; has scored these rows and keeps its hidden states.
            teacher_temperature: at which the teacher's own rollouts were sampled.
        """
        self._student = student
        self.signals = signals
        self._outcomes_T = outcomes_T
        self._counted_T = counted_T
        self.method = method
        self._temperature = temperature
        self._chunk_tokens = chunk_tokens
        self._teacher = teacher
        self._teacher_temperature = teacher_temperature
        self._parts: list[Sums] = []
        self._student_logprobs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._grad_squares: list[torch.Tensor] = []

    @property
    def trains(self) -> bool:
        """Whether any token of the batch has a part in the loss; the same on every rank."""
        return bool(self._counted_T.any())

    def next_update(self) -> PolicyStep:
        """The next update on the same batch, by importance ratios to the policy before this one, the first."""
        signals = dataclasses.replace(self.signals, old_logprobs_T=self.student_logprobs_T)
        return PolicyStep(
            self._student,
            signals,
            self._outcomes_T,
            self._counted_T,
            self.method,
            self._temperature,
            self._chunk_tokens,
            self._teacher,
            self._teacher_temperature,
        )

    def __call__(self, data_iterator: Iterator[Microbatch], model: Any) -> tuple[torch.Tensor, Any]:
        batch = next(data_iterator)
        output = forward(model, batch, self._output_processor, batch)
        return output, lambda loss: self._reduced(loss, batch)

    def _reduced(self, loss: torch.Tensor, batch: Microbatch) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Loss summed over tokens, tokens, and the pair that Megatron logs as a mean."""
        tokens = self._counted_T[batch.index_T].sum().to(current().device, torch.int)
        return loss, tokens, {"sgopd loss": torch.stack([loss.detach().float(), tokens.float()])}

    def _output_processor(
        self,
        hidden_states: Any,
        output_layer: Any,
        output_weight: Any,
        context: Microbatch,
        config: Any,
        **_: Any,
    ) -> torch.Tensor:
        groups = self._student.groups
        head = output_head(
            output_layer,
            output_weight,
            self._student.architecture.vocab_size,
            groups.tp,
            self._temperature,
            self._chunk_tokens,
        )
        hidden_TH = response_hidden(hidden_states, config, groups.tp, context)
        signals = self.signals[context.index_T].to(hidden_TH.device)
        if signals.imitation_T is not None and groups.tp.rank() == 0:
            hidden_TH.register_hook(lambda grad_TH: self._collect_grad(grad_TH, signals))
        if signals.imitation_T is not None and self._teacher_temperature != self._temperature:
            # Logits are linear in the hidden states: so these tokens' are over the temperature they were sampled at.
            ratio = self._temperature / self._teacher_temperature
            hidden_TH = torch.where((signals.imitation_T > 0)[:, None], hidden_TH * ratio, hidden_TH)
        entropy_T, full_kl_T = None, None
        if self.method.estimator == "full":
            loss, logprobs_T, full_kl_T = self._full_loss(hidden_TH, head, context, signals)
        elif self.method.needs_whole_responses:
            logprobs_T, entropy_T = target_logprobs(hidden_TH, head, context.targets_T, with_entropy=True)
            loss = policy_loss(logprobs_T, signals, self.method, normalizer=1.0)
        else:
            loss, logprobs_T, entropy_T = fused_policy_loss(
                hidden_TH,
                head,
                context.targets_T,
                lambda logprobs_C, chunk: coefficients(logprobs_C, signals[chunk], self.method, normalizer=1.0),
                with_entropy=True,
            )
        self._collect(logprobs_T.detach(), entropy_T, full_kl_T, signals, context)
        return loss

    def _full_loss(
        self, hidden_TH: torch.Tensor, head: OutputHead, batch: Microbatch, signals: TokenSignals
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert self._teacher is not None and signals.teacher_logprobs_T is not None
        teacher = TeacherHead(*self._teacher.head(batch), signals.teacher_logprobs_T)
        return fused_full_loss(
            hidden_TH,
            head,
            batch.targets_T,
            teacher,
            lambda logprobs_C, chunk: full_coefficients(logprobs_C, signals[chunk], self.method),
        )

    def _collect_grad(self, grad_TH: torch.Tensor, signals: TokenSignals) -> None:
        assert signals.imitation_T is not None
        squares_T = torch.linalg.vector_norm(grad_TH, dim=1, dtype=torch.float32) ** 2
        sources = (signals.mask_T, signals.imitation_T > 0)
        self._grad_squares.append(torch.stack([squares_T[source_T].sum() for source_T in sources]).double())

    def _collect(
        self, logprobs_T: torch.Tensor, entropy_T: Any, full_kl_T: Any, signals: TokenSignals, batch: Microbatch
    ) -> None:
        # On the device: taking them to the host here would make every microbatch wait for it.
        self._student_logprobs.append((batch.index_T, logprobs_T))
        if self._student.groups.tp.rank() == 0:  # the other ranks of the group see the same tokens
            self._parts.append(self._sums(logprobs_T, signals, self._outcomes_T[batch.index_T], entropy_T, full_kl_T))

    def _sums(
        self, logprobs_T: Any, signals: TokenSignals, outcomes_T: torch.Tensor, entropy_T: Any, full_kl_T: Any
    ) -> Sums:
        update = token_update(logprobs_T, signals, self.method)
        sums = metric_sums(logprobs_T, signals, update, outcomes_T.to(logprobs_T.device), entropy_T, self.method)
        if full_kl_T is not None:
            sums["full_kl"] = full_kl_T[signals.mask_T].double().sum()
        return sums

    def metrics(self) -> dict[str, float]:
        """Token statistics of the step over all ranks, on every rank."""
        nothing = torch.zeros(0, dtype=torch.float32, device=current().device)
        entropy_T, full_kl_T = (None, nothing) if self.method.estimator == "full" else (nothing, None)
        empty = self._sums(nothing, self.signals[:0].to(nothing.device), nothing, entropy_T, full_kl_T)
        sums = add_sums([empty, *self._parts])
        sums["grad_squares"] = torch.stack([sums["tokens"].new_zeros(2), *self._grad_squares]).sum(0)
        for operation, is_max in ((dist.ReduceOp.SUM, False), (dist.ReduceOp.MAX, True)):
            names = [name for name in sorted(sums) if name.endswith("_max") == is_max]
            flat = torch.cat([sums[name].flatten() for name in names])
            dist.all_reduce(flat, op=operation)
            for name, part in zip(names, flat.split([sums[name].numel() for name in names]), strict=True):
                sums[name] = part.view(sums[name].shape)
        metrics = metrics_from_sums(sums)
        if self.signals.imitation_T is not None:
            # At the last hidden states, where both sources can be told apart without a second backward pass.
            norms = (sums["grad_squares"].sqrt() / self._counted_T.sum()).tolist()
            metrics |= dict(zip(("hidden_grad_norm_student", "hidden_grad_norm_teacher"), norms, strict=True))
        return metrics

    @functools.cached_property
    def student_logprobs_T(self) -> torch.Tensor:
        """s_t of every response token of the step, on every rank: float32 [T], on the host.

        Gathered once, when first asked for: every rank asks, after the step's forward passes.
        """
        logprobs_T = torch.zeros(len(self._outcomes_T), dtype=torch.float32, device=current().device)
        if self._student.groups.tp.rank() == 0:  # stages before the last have none
            for index_T, part_T in self._student_logprobs:
                logprobs_T[index_T] = part_T
        dist.all_reduce(logprobs_T)
        return logprobs_T.cpu()

"""Log-probs of given tokens under a vocabulary-parallel output layer, without ever holding all logits.

T tokens, C tokens of a chunk, H hidden size, V vocabulary rows on this rank, tau temperature:

    z_t = W h_t / tau        s_t = z_t[target_t] - log sum_v exp(z_t[v])        ds_t/dz_t = onehot_t - softmax(z_t)

Logits exist for one chunk at a time, in one buffer [C, V]. Two forms differ in when the weight's gradient is made:
`target_logprobs` recomputes each chunk's logits in the backward pass (4 matmuls in all); `fused_policy_loss` asks for
the loss's coefficients as soon as a chunk's s_t is known and makes the gradients in the same pass (3 matmuls).

Both make ds_t/dh_t on the way forward, which gives the entropy without another pass over the logits:

    entropy_t = log sum_v exp(z_t[v]) - sum_v softmax(z_t)[v] z_t[v] = h_t . ds_t/dh_t - s_t

Tensor parallelism: hidden states, targets and coefficients are the same on every rank of the group, and the gradient
of the hidden states comes back summed over the group. With sequence parallelism the caller gathers the hidden states
first, with a gather whose backward is a plain split: one that reduces would sum a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

Coefficients = Callable[[torch.Tensor, slice], torch.Tensor]

_CHUNK_LOGITS = 1 << 26
"""Most logits of a chunk whose size is chosen here: 256 MiB in float32."""
_TILE_TOKENS = 128
"""Such a chunk is a whole number of matmul tiles."""


@dataclass(frozen=True)
class OutputHead:
    """An output layer without bias, as much of it as this rank holds."""

    weight_VH: torch.Tensor
    """This rank's rows, the same number on every rank of the group. Padded rows must be finite."""
    vocab_size: int
    """Tokens over all ranks. The rows from there on are padding and count as logits of -inf."""
    tensor_parallel_group: dist.ProcessGroup | None
    """The ranks that hold the other rows; None where this one holds them all."""
    chunk_tokens: int
    """Tokens whose logits are held at once; 0: as many as have at most 2^26 logits, but at least 128."""
    temperature: float = 1.0
    """tau: log-probs are those of softmax(logits / tau)."""


def default_chunk_tokens(rows: int, buffers: int = 1) -> int:
    """Tokens whose logits are held at once where the settings leave it open.

    Args:
        rows: of the output layer on this rank.
        buffers: of logits, which share the memory that a chunk may take.
    """
    return max(1, _CHUNK_LOGITS // rows // _TILE_TOKENS // buffers) * _TILE_TOKENS


def target_logprobs(
    hidden_TH: torch.Tensor, head: OutputHead, targets_T: torch.Tensor, with_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """s_t, differentiable in the hidden states and the weight; for losses that need every s_t first.

    Args:
        hidden_TH: [T, H]; T may be 0.
        targets_T: int64 [T], ids in the whole vocabulary.
        with_entropy: costs a second matmul where no gradient of the hidden states is recorded, else nothing.

    Returns:
        s_t and, if asked for, the entropy (a statistic without gradient), in nats: [T] each, float64 where the weight
        is, else float32. A target outside [0, vocab_size) has s_t = -inf.
    """
    hidden_TH, weight_VH = _recorded(hidden_TH, head)
    return _TargetLogprobs.apply(hidden_TH, weight_VH, targets_T, head, with_entropy)


@torch.no_grad()
def target_ranks(
    hidden_TH: torch.Tensor, head: OutputHead, targets_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """s_t, and each target's place among the logits: int64 [T], 1 + the number of tokens with a greater one, so 1
    for the model's first choice. Costs one more pass over each chunk's logits, and no matmul.

    Args:
        hidden_TH, targets_T: as in `target_logprobs`; the rank of a target outside [0, vocab_size) means nothing.
    """
    scores = _score(_Shard(hidden_TH, head.weight_VH, targets_T, head), with_ascent=False, with_ranks=True)
    return scores.logprobs_T, scores.ranks_T


def fused_policy_loss(
    hidden_TH: torch.Tensor,
    head: OutputHead,
    targets_T: torch.Tensor,
    coefficients: Coefficients,
    with_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """loss = -sum_t sg[c_t] s_t, whose gradients are made in the forward pass and only scaled in the backward pass.

    d loss / d z_t = c_t (softmax(z_t) - onehot_t): the gradient of sgopd's L_on with c_t = w_t A_t / N.

    The weight's gradient is summed over chunks in a float32 buffer and cast once to the weight's dtype. It goes to
    autograd like any layer's, so that a tied weight adds up and Megatron keeps its own float32 sum over microbatches.

    Args:
        hidden_TH, targets_T, with_entropy: as in `target_logprobs`.
        coefficients: maps s_t of a chunk, detached, and the slice of [0, T) that it covers to its c_t; pure.

    Returns:
        The loss, a scalar; s_t and the entropy as in `target_logprobs`, both without gradient.
    """
    hidden_TH, weight_VH = _recorded(hidden_TH, head)
    return _FusedPolicyLoss.apply(hidden_TH, weight_VH, targets_T, head, coefficients, with_entropy)


@dataclass(frozen=True)
class TeacherHead:
    """The teacher's side of `fused_full_loss`, with the vocabulary split over the ranks as the student's is."""

    hidden_TH: torch.Tensor
    """[T, the teacher's hidden size], at the same tokens as the student's."""
    head: OutputHead
    logprobs_T: torch.Tensor
    """q_t of the targets at the same temperature, float32 or float64."""


FullCoefficients = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]


def fused_full_loss(
    hidden_TH: torch.Tensor,
    head: OutputHead,
    targets_T: torch.Tensor,
    teacher: TeacherHead,
    coefficients: FullCoefficients,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss = sum_t (sg[f_t] KL_t - sg[c_t] s_t), with the reverse KL over the whole vocabulary

        KL_t = sum_v p(v) l(v)    l = log p - log p_T    dKL_t/dz_v = p(v) (l(v) - KL_t)

    in place of the one token that was sampled, which estimates it without bias but with a variance. Gradients are
    made in the forward pass, as in `fused_policy_loss`. Two buffers of logits of half the tokens each take the place
    of one.

    Args:
        hidden_TH, head, targets_T: as in `target_logprobs`.
        coefficients: maps s_t of a chunk, detached, and its slice of [0, T) to its f_t and c_t; pure.

    Returns:
        The loss, a scalar; s_t and KL_t, [T] each, without gradient. The entropy would take another matmul.
    """
    hidden_TH, weight_VH = _recorded(hidden_TH, head)
    return _FusedFullLoss.apply(hidden_TH, weight_VH, targets_T, head, teacher, coefficients)


def _recorded(hidden_TH: torch.Tensor, head: OutputHead) -> tuple[torch.Tensor, torch.Tensor]:
    # needs_input_grad, by which the functions below decide what to make, is blind to no_grad.
    if torch.is_grad_enabled():
        return hidden_TH, head.weight_VH
    return hidden_TH.detach(), head.weight_VH.detach()


class _Shard:
    """The arithmetic on this rank's rows: operands of matmuls in `dtype`, everything else in `sum_dtype`."""

    def __init__(
        self,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        targets_T: torch.Tensor,
        head: OutputHead,
        buffers: int = 1,
    ) -> None:
        """`buffers` of logits share the memory that a chunk may take."""
        self.sum_dtype = torch.float64 if weight_VH.dtype is torch.float64 else torch.float32
        # Only CUDA multiplies bfloat16 into float32: elsewhere, and for float16 (it overflows), operands are widened.
        native = weight_VH.is_cuda and weight_VH.dtype is torch.bfloat16
        self.dtype = weight_VH.dtype if native else self.sum_dtype
        self.weight_VH = weight_VH.to(self.dtype)
        self.hidden_TH = hidden_TH
        self.group = head.tensor_parallel_group
        self.inverse_temperature = 1.0 / head.temperature
        rows = len(weight_VH)
        first_row = 0 if self.group is None else rows * self.group.rank()
        self.valid_rows = min(max(head.vocab_size - first_row, 0), rows)
        local_T = targets_T - first_row
        self.owned_T = (local_T >= 0) & (local_T < rows)
        self.index_T = torch.where(self.owned_T, local_T, 0)
        self.known_T = (targets_T >= 0) & (targets_T < head.vocab_size)
        self.chunk_tokens = head.chunk_tokens or default_chunk_tokens(rows, buffers)

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Span, hidden states [C, H] and logits [C, V] before temperature of each chunk.

        The logits are the caller's to overwrite; the next chunk's take their place.
        """
        tokens = len(self.hidden_TH)
        size = min(self.chunk_tokens, tokens)
        buffer_CV = self.weight_VH.new_empty(size, len(self.weight_VH), dtype=self.sum_dtype)
        for start in range(0, tokens, max(size, 1)):
            span = slice(start, min(start + size, tokens))
            hidden_CH = self.hidden_TH[span].to(self.dtype)
            logits_CV = _matmul(hidden_CH, self.weight_VH.T, buffer_CV[: len(hidden_CH)])
            logits_CV[:, self.valid_rows :] = -torch.inf
            yield span, hidden_CH, logits_CV

    def exponentials(self, logits_CV: torch.Tensor, shift_C: torch.Tensor) -> torch.Tensor:
        """exp(logits / tau - shift), in place."""
        return torch.add(-shift_C[:, None], logits_CV, alpha=self.inverse_temperature, out=logits_CV).exp_()

    def ranks(self, logits_CV: torch.Tensor, span: slice) -> torch.Tensor:
        """int64 [C]: 1 + how many logits of all ranks are greater than the target's."""
        target_C = logits_CV.gather(1, self.index_T[span, None])[:, 0]
        target_C = self.reduce(torch.where(self.owned_T[span], target_C, 0))
        return self.reduce((logits_CV > target_C[:, None]).sum(-1)) + 1

    def residuals(self, exponentials_CV: torch.Tensor, sums_C: torch.Tensor, span: slice) -> torch.Tensor:
        """(softmax - onehot) * sums for exponentials with these sums, in place where no cast is needed.

        The factor stays, since taking it out of [C, H] later is cheaper than out of [C, V] here.
        """
        onehot_C = torch.where(self.owned_T[span], sums_C, 0)
        return exponentials_CV.scatter_add_(1, self.index_T[span, None], -onehot_C[:, None]).to(self.dtype)

    def add_weight_grad(
        self, weight_grad_VH: torch.Tensor, residuals_CV: torch.Tensor, hidden_CH: torch.Tensor, scale_C: torch.Tensor
    ) -> None:
        scaled_CH = (hidden_CH * (scale_C * self.inverse_temperature)[:, None]).to(self.dtype)
        _matmul(residuals_CV.T, scaled_CH, weight_grad_VH, beta=1.0)

    def reduce(self, tensor: torch.Tensor, operation: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """All-reduce over the group, in place."""
        if self.group is not None and self.group.size() > 1:
            dist.all_reduce(tensor, operation, self.group)
        return tensor


def _matmul(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, beta: float = 0.0) -> torch.Tensor:
    """out = beta * out + left @ right, summed in the dtype of `out`."""
    if left.dtype is out.dtype:
        return torch.addmm(out, left, right, beta=beta, out=out)
    return torch.addmm(out, left, right, beta=beta, out_dtype=out.dtype, out=out)


@dataclass(frozen=True)
class _Scores:
    """What a pass over the chunks leaves; what was not asked for is empty."""

    logprobs_T: torch.Tensor
    log_sums_T: torch.Tensor
    """log sum_v exp(z_t[v])."""
    ascent_TH: torch.Tensor
    """ds_t/dh_t, summed over the group."""
    coefficients_T: torch.Tensor
    weight_grad_VH: torch.Tensor
    """Gradient of -sum_t c_t s_t."""
    ranks_T: torch.Tensor

    def entropy_T(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vecdot(hidden_TH.to(self.ascent_TH.dtype), self.ascent_TH) - self.logprobs_T


def _score(
    shard: _Shard,
    with_ascent: bool,
    coefficients: Coefficients | None = None,
    with_weight_grad: bool = False,
    with_ranks: bool = False,
) -> _Scores:
    tokens, hidden_size = shard.hidden_TH.shape

    def zeros(*shape: int) -> torch.Tensor:
        return shard.hidden_TH.new_zeros(shape, dtype=shard.sum_dtype)

    scores = _Scores(
        logprobs_T=zeros(tokens),
        log_sums_T=zeros(tokens),
        ascent_TH=zeros(tokens if with_ascent else 0, hidden_size),
        coefficients_T=zeros(tokens if coefficients else 0),
        weight_grad_VH=zeros(len(shard.weight_VH) if with_weight_grad else 0, hidden_size),
        ranks_T=shard.index_T.new_zeros(tokens if with_ranks else 0),
    )
    for span, hidden_CH, logits_CV in shard.chunks():
        if with_ranks:
            scores.ranks_T[span] = shard.ranks(logits_CV, span)
        max_C = shard.reduce(logits_CV.amax(-1), dist.ReduceOp.MAX) * shard.inverse_temperature
        target_C = logits_CV.gather(1, shard.index_T[span, None])[:, 0] * shard.inverse_temperature
        target_C = torch.where(shard.owned_T[span], target_C, 0)
        exponentials_CV = shard.exponentials(logits_CV, max_C)
        target_C, sums_C = shard.reduce(torch.stack([target_C, exponentials_CV.sum(-1)]))
        log_sums_C = max_C + sums_C.log()
        scores.log_sums_T[span] = log_sums_C
        scores.logprobs_T[span] = torch.where(shard.known_T[span], target_C - log_sums_C, -torch.inf)
        if coefficients:
            scores.coefficients_T[span] = coefficients(scores.logprobs_T[span], span)
        if with_ascent or with_weight_grad:
            residuals_CV = shard.residuals(exponentials_CV, sums_C, span)
        if with_ascent:
            scale_C1 = -shard.inverse_temperature / sums_C[:, None]
            _matmul(residuals_CV, shard.weight_VH, scores.ascent_TH[span]).mul_(scale_C1)
        if with_weight_grad:
            shard.add_weight_grad(scores.weight_grad_VH, residuals_CV, hidden_CH, scores.coefficients_T[span] / sums_C)
    shard.reduce(scores.ascent_TH)
    return scores


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        targets_T: torch.Tensor,
        head: OutputHead,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shard = _Shard(hidden_TH, weight_VH, targets_T, head)
        scores = _score(shard, with_entropy or ctx.needs_input_grad[0])
        entropy_T = scores.entropy_T(hidden_TH) if with_entropy else None
        ctx.head = head
        ctx.save_for_backward(hidden_TH, weight_VH, targets_T, scores.log_sums_T, scores.ascent_TH.to(hidden_TH.dtype))
        ctx.mark_non_differentiable(*(() if entropy_T is None else (entropy_T,)))
        return scores.logprobs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        hidden_TH, weight_VH, targets_T, log_sums_T, ascent_TH = ctx.saved_tensors
        hidden_grad_TH = weight_grad_VH = None
        if ctx.needs_input_grad[0]:
            hidden_grad_TH = (ascent_TH * grad_T[:, None]).to(hidden_TH.dtype)
        if ctx.needs_input_grad[1]:
            shard = _Shard(hidden_TH, weight_VH, targets_T, ctx.head)
            weight_grad_VH = _recomputed_weight_grad(shard, log_sums_T, grad_T).to(weight_VH.dtype)
        return hidden_grad_TH, weight_grad_VH, None, None, None


def _recomputed_weight_grad(shard: _Shard, log_sums_T: torch.Tensor, grad_T: torch.Tensor) -> torch.Tensor:
    weight_grad_VH = torch.zeros_like(shard.weight_VH, dtype=shard.sum_dtype)
    for span, hidden_CH, logits_CV in shard.chunks():
        softmax_CV = shard.exponentials(logits_CV, log_sums_T[span])
        residuals_CV = shard.residuals(softmax_CV, torch.ones_like(log_sums_T[span]), span)
        shard.add_weight_grad(weight_grad_VH, residuals_CV, hidden_CH, -grad_T[span])
    return weight_grad_VH


class _MadeForward(torch.autograd.Function):
    """A loss whose forward pass takes six arguments and saves the gradients of the first two."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        hidden_grad_TH, weight_grad_VH = (None if saved is None else saved * grad for saved in ctx.saved_tensors)
        return hidden_grad_TH, weight_grad_VH, None, None, None, None


class _FusedPolicyLoss(_MadeForward):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        targets_T: torch.Tensor,
        head: OutputHead,
        coefficients: Coefficients,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        hidden_needs_grad, weight_needs_grad = ctx.needs_input_grad[:2]
        shard = _Shard(hidden_TH, weight_VH, targets_T, head)
        scores = _score(shard, with_entropy or hidden_needs_grad, coefficients, weight_needs_grad)
        entropy_T = scores.entropy_T(hidden_TH) if with_entropy else None
        hidden_grad_TH = weight_grad_VH = None
        if hidden_needs_grad:
            hidden_grad_TH = scores.ascent_TH.mul_(-scores.coefficients_T[:, None]).to(hidden_TH.dtype)
        if weight_needs_grad:
            weight_grad_VH = scores.weight_grad_VH.to(weight_VH.dtype)
        ctx.save_for_backward(hidden_grad_TH, weight_grad_VH)
        ctx.mark_non_differentiable(scores.logprobs_T, *(() if entropy_T is None else (entropy_T,)))
        return -torch.dot(scores.coefficients_T, scores.logprobs_T), scores.logprobs_T, entropy_T


class _FusedFullLoss(_MadeForward):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        targets_T: torch.Tensor,
        head: OutputHead,
        teacher: TeacherHead,
        coefficients: FullCoefficients,
    ) -> tuple[torch.Tensor, ...]:
        ours = _Shard(hidden_TH, weight_VH, targets_T, head, buffers=2)
        theirs = _Shard(teacher.hidden_TH, teacher.head.weight_VH, targets_T, teacher.head, buffers=2)
        scores = _full_pass(ours, theirs, teacher.logprobs_T, coefficients, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(
            scores.hidden_grad_TH.to(hidden_TH.dtype) if ctx.needs_input_grad[0] else None,
            scores.weight_grad_VH.to(weight_VH.dtype) if ctx.needs_input_grad[1] else None,
        )
        ctx.mark_non_differentiable(scores.logprobs_T, scores.kl_T)
        return scores.loss, scores.logprobs_T, scores.kl_T


@dataclass(frozen=True)
class _FullScores:
    """What a pass over both models' chunks leaves; a gradient that was not asked for is empty."""

    loss: torch.Tensor
    logprobs_T: torch.Tensor
    kl_T: torch.Tensor
    hidden_grad_TH: torch.Tensor
    weight_grad_VH: torch.Tensor


def _full_pass(
    ours: _Shard,
    theirs: _Shard,
    teacher_logprobs_T: torch.Tensor,
    coefficients: FullCoefficients,
    with_hidden_grad: bool,
    with_weight_grad: bool,
) -> _FullScores:
    tokens, hidden_size = ours.hidden_TH.shape

    def zeros(*shape: int) -> torch.Tensor:
        return ours.hidden_TH.new_zeros(shape, dtype=ours.sum_dtype)

    scores = _FullScores(
        loss=zeros(),
        logprobs_T=zeros(tokens),
        kl_T=zeros(tokens),
        hidden_grad_TH=zeros(tokens if with_hidden_grad else 0, hidden_size),
        weight_grad_VH=zeros(len(ours.weight_VH) if with_weight_grad else 0, hidden_size),
    )
    both = zip(ours.chunks(), theirs.chunks(), strict=True)
    for (span, hidden_CH, student_CV), (_, _, teacher_CV) in both:
        probabilities_CV, log_ratio_CV, logprobs_C = _compared(
            ours, theirs, span, student_CV, teacher_CV, teacher_logprobs_T[span]
        )
        kl_C = ours.reduce(torch.bmm(probabilities_CV[:, None], log_ratio_CV[:, :, None])[:, 0, 0])
        scores.logprobs_T[span], scores.kl_T[span] = logprobs_C, kl_C
        full_C, sampled_C = coefficients(logprobs_C, span)
        scores.loss.add_(torch.dot(full_C, kl_C) - torch.dot(sampled_C, torch.where(sampled_C != 0, logprobs_C, 0)))
        if not (with_hidden_grad or with_weight_grad):
            continue
        # f p (l - KL) + c (p - onehot), in the place of l.
        grad_CV = log_ratio_CV.sub_(kl_C[:, None]).mul_(full_C[:, None]).add_(sampled_C[:, None]).mul_(probabilities_CV)
        onehot_C = torch.where(ours.owned_T[span], sampled_C, 0)
        grad_CV = grad_CV.scatter_add_(1, ours.index_T[span, None], -onehot_C[:, None]).to(ours.dtype)
        if with_hidden_grad:
            _matmul(grad_CV, ours.weight_VH, scores.hidden_grad_TH[span]).mul_(ours.inverse_temperature)
        if with_weight_grad:
            ours.add_weight_grad(scores.weight_grad_VH, grad_CV, hidden_CH, torch.ones_like(kl_C))
    ours.reduce(scores.hidden_grad_TH)
    return scores


def _compared(
    ours: _Shard,
    theirs: _Shard,
    span: slice,
    student_CV: torch.Tensor,
    teacher_CV: torch.Tensor,
    teacher_logprobs_C: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """p and l = log p - log p_T over this rank's rows, in the places of both models' logits, and s_t.

    q_t of the target, which is known, gives the teacher's normalization without a sum over its vocabulary.
    """

    def at_target(logits_CV: torch.Tensor) -> torch.Tensor:
        return torch.where(ours.owned_T[span], logits_CV.gather(1, ours.index_T[span, None])[:, 0], 0)

    z_CV, u_CV = student_CV.mul_(ours.inverse_temperature), teacher_CV.mul_(theirs.inverse_temperature)
    z_C, u_C = at_target(z_CV), at_target(u_CV)
    log_ratio_CV = u_CV.neg_().add_(z_CV)
    log_ratio_CV[:, ours.valid_rows :] = 0  # padding: -inf minus -inf
    max_C = ours.reduce(z_CV.amax(-1), dist.ReduceOp.MAX)
    probabilities_CV = z_CV.sub_(max_C[:, None]).exp_()
    sums_C, z_C, u_C = ours.reduce(torch.stack([probabilities_CV.sum(-1), z_C, u_C]))
    probabilities_CV.div_(sums_C[:, None])
    log_sums_C = max_C + sums_C.log()
    log_ratio_CV.add_((u_C - teacher_logprobs_C.to(u_C.dtype) - log_sums_C)[:, None])
    logprobs_C = torch.where(ours.known_T[span], z_C - log_sums_C, -torch.inf)
    return probabilities_CV, log_ratio_CV, logprobs_C

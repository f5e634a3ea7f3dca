"""Log-probs of a vocabulary split over ranks equal those of one rank, gradients included."""

import unittest.mock
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from launch import run_ranks

from megatron_sgopd.models.logprobs import (
    OutputHead,
    TeacherHead,
    fused_full_loss,
    fused_policy_loss,
    target_logprobs,
    target_ranks,
)

HIDDEN = 6

Form = Callable[[torch.Tensor, OutputHead, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]


def test_tensor_parallel_sizes_agree() -> None:
    run_ranks(4, _check_all)


# ---- What each rank does --------------------------------------------------------------------------------


def _check_all() -> None:
    dist.init_process_group("gloo")
    for size in (1, 2, 4):
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, 4, size)]
        group = groups[dist.get_rank() // size]
        for form in (_recomputing, _fused):
            for tokens, vocab, padded_vocab in (
                (12, 32, 32),
                (12, 29, 32),
                (12, 9, 32),  # ranks that hold nothing but padding
                (12, 4, 4),  # one row on each of four ranks
                (0, 29, 32),
            ):
                _check_equal_to_whole_vocabulary(form, group, tokens, vocab, padded_vocab)
            _check_sequence_parallel(form, group)
        for tokens, vocab, padded_vocab in ((12, 29, 32), (12, 9, 32), (0, 29, 32)):
            _check_full(group, tokens, vocab, padded_vocab)
            _check_ranks(group, tokens, vocab, padded_vocab)
        _check_collectives(group)
    dist.destroy_process_group()


def _recomputing(
    hidden_TH: torch.Tensor, head: OutputHead, targets_T: torch.Tensor, coefficients_T: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    logprobs_T, entropy_T = target_logprobs(hidden_TH, head, targets_T, with_entropy=True)
    assert entropy_T is not None
    return -(coefficients_T * logprobs_T.exp().detach() * logprobs_T).sum(), logprobs_T, entropy_T


def _fused(
    hidden_TH: torch.Tensor, head: OutputHead, targets_T: torch.Tensor, coefficients_T: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    loss, logprobs_T, entropy_T = fused_policy_loss(
        hidden_TH,
        head,
        targets_T,
        lambda logprobs_C, chunk: coefficients_T[chunk] * logprobs_C.exp(),
        with_entropy=True,
    )
    assert entropy_T is not None
    return loss, logprobs_T, entropy_T


def _naive(
    hidden_TH: torch.Tensor, head: OutputHead, targets_T: torch.Tensor, coefficients_T: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    logprobs_TV = (hidden_TH @ head.weight_VH[: head.vocab_size].T / head.temperature).log_softmax(-1)
    logprobs_T = logprobs_TV.gather(1, targets_T[:, None])[:, 0]
    loss = -(coefficients_T * logprobs_T.exp().detach() * logprobs_T).sum()
    return loss, logprobs_T, -(logprobs_TV.exp() * logprobs_TV).sum(-1)


def _inputs(tokens: int, vocab: int, padded_vocab: int) -> tuple[torch.Tensor, ...]:
    """Hidden states, the whole weight, targets, coefficients: the same on every rank."""
    generator = torch.Generator().manual_seed(tokens + vocab)
    hidden_TH = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    weight_VH = torch.randn(padded_vocab, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    coefficients_T = torch.randn(tokens, generator=generator, dtype=torch.float64)
    return hidden_TH, weight_VH, torch.randint(vocab, (tokens,), generator=generator), coefficients_T


def _shard(weight_VH: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's rows, as a leaf."""
    return weight_VH.detach().chunk(group.size())[group.rank()].clone().requires_grad_()


def _assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # Sums of tens of float64 terms of order 1, in another order: errors near 1e-14.
    # (torch.testing.assert_close says more, but takes each rank seconds to import.)
    assert actual.shape == expected.shape
    assert torch.allclose(actual, expected, rtol=0, atol=1e-10), (actual - expected).abs().max()


def _check_equal_to_whole_vocabulary(
    form: Form, group: dist.ProcessGroup, tokens: int, vocab: int, padded_vocab: int
) -> None:
    hidden_TH, weight_VH, targets_T, coefficients_T = _inputs(tokens, vocab, padded_vocab)
    expected = _naive(hidden_TH, OutputHead(weight_VH, vocab, None, 0, 0.7), targets_T, coefficients_T)
    hidden_grad_TH, weight_grad_VH = torch.autograd.grad(expected[0], (hidden_TH, weight_VH))

    shard_VH = _shard(weight_VH, group)
    head = OutputHead(shard_VH, vocab, group, chunk_tokens=5, temperature=0.7)
    outputs = form(hidden_TH, head, targets_T, coefficients_T)
    for actual, reference in zip(outputs, expected, strict=True):
        _assert_equal(actual, reference)
    hidden_actual_TH, weight_actual_VH = torch.autograd.grad(outputs[0], (hidden_TH, shard_VH))
    _assert_equal(hidden_actual_TH, hidden_grad_TH)  # whole on every rank
    _assert_equal(weight_actual_VH, weight_grad_VH.chunk(group.size())[group.rank()])


def _check_full(group: dist.ProcessGroup, tokens: int, vocab: int, padded_vocab: int) -> None:
    """The loss over whole distributions, against the direct KL of both models' softmax."""
    hidden_TH, weight_VH, targets_T, sampled_T = _inputs(tokens, vocab, padded_vocab)
    generator = torch.Generator().manual_seed(99)
    teacher_TH = torch.randn(tokens, HIDDEN + 3, generator=generator, dtype=torch.float64)
    teacher_VH = torch.randn(padded_vocab, HIDDEN + 3, generator=generator, dtype=torch.float64)
    full_T = torch.rand(tokens, generator=generator, dtype=torch.float64)
    ours_TV = (hidden_TH @ weight_VH[:vocab].T / 0.7).log_softmax(-1)
    theirs_TV = (teacher_TH @ teacher_VH[:vocab].T / 0.7).log_softmax(-1)
    s_T, q_T = (logprobs_TV.gather(1, targets_T[:, None])[:, 0] for logprobs_TV in (ours_TV, theirs_TV))
    kl_T = (ours_TV.exp() * (ours_TV - theirs_TV)).sum(-1)
    expected = (full_T * kl_T - sampled_T * s_T).sum()
    hidden_grad_TH, weight_grad_VH = torch.autograd.grad(expected, (hidden_TH, weight_VH))

    shard_VH = _shard(weight_VH, group)
    teacher = TeacherHead(teacher_TH, OutputHead(_shard(teacher_VH, group).detach(), vocab, group, 5, 0.7), q_T)
    head = OutputHead(shard_VH, vocab, group, chunk_tokens=5, temperature=0.7)
    outputs = fused_full_loss(hidden_TH, head, targets_T, teacher, lambda _, chunk: (full_T[chunk], sampled_T[chunk]))
    for actual, reference in zip(outputs, (expected, s_T, kl_T), strict=True):
        _assert_equal(actual, reference)
    hidden_actual_TH, weight_actual_VH = torch.autograd.grad(outputs[0], (hidden_TH, shard_VH))
    _assert_equal(hidden_actual_TH, hidden_grad_TH)
    _assert_equal(weight_actual_VH, weight_grad_VH.chunk(group.size())[group.rank()])


def _check_ranks(group: dist.ProcessGroup, tokens: int, vocab: int, padded_vocab: int) -> None:
    """Against a sort of all logits; padding is never ahead of anything."""
    hidden_TH, weight_VH, targets_T, _ = _inputs(tokens, vocab, padded_vocab)
    logits_TV = hidden_TH @ weight_VH[:vocab].T
    order_TV = logits_TV.argsort(dim=1, descending=True)
    expected_T = (order_TV == targets_T[:, None]).int().argmax(1) + 1
    head = OutputHead(_shard(weight_VH, group), vocab, group, chunk_tokens=5, temperature=0.7)
    logprobs_T, ranks_T = target_ranks(hidden_TH, head, targets_T)
    assert ranks_T.dtype == torch.int64 and torch.equal(ranks_T, expected_T)
    _assert_equal(logprobs_T, (logits_TV / 0.7).log_softmax(-1).gather(1, targets_T[:, None])[:, 0])


class _GatherWithSplitBackward(torch.autograd.Function):
    """Megatron's gather of a sequence-parallel region with `tensor_parallel_output_grad=False`.

    Megatron itself would take ten seconds of each rank to import.
    """

    @staticmethod
    def forward(ctx: Any, own_TH: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        gathered_TH = own_TH.new_empty(len(own_TH) * group.size(), HIDDEN)
        dist.all_gather_into_tensor(gathered_TH, own_TH, group)
        return gathered_TH

    @staticmethod
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_TH.chunk(ctx.group.size())[ctx.group.rank()], None


def _check_sequence_parallel(form: Form, group: dist.ProcessGroup) -> None:
    hidden_TH, weight_VH, targets_T, coefficients_T = _inputs(12, 29, 32)
    expected = _naive(hidden_TH, OutputHead(weight_VH, 29, None, 0), targets_T, coefficients_T)[0]
    hidden_grad_TH = torch.autograd.grad(expected, hidden_TH)[0]

    own_TH = _shard(hidden_TH, group)
    gathered_TH = _GatherWithSplitBackward.apply(own_TH, group)
    loss = form(gathered_TH, OutputHead(_shard(weight_VH, group), 29, group, 5), targets_T, coefficients_T)[0]
    _assert_equal(torch.autograd.grad(loss, own_TH)[0], hidden_grad_TH.chunk(group.size())[group.rank()])


def _check_collectives(group: dist.ProcessGroup) -> None:
    """Two small reductions a chunk, one of the hidden gradient a call, none in the backward pass."""
    hidden_TH, weight_VH, targets_T, coefficients_T = _inputs(12, 29, 32)
    head = OutputHead(_shard(weight_VH, group), 29, group, chunk_tokens=5)
    with unittest.mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        _fused(hidden_TH, head, targets_T, coefficients_T)[0].backward()
    assert all_reduce.call_count == (7 if group.size() > 1 else 0)

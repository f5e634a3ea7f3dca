"""Both forms of the log-probs against log_softmax().gather() in float64; several ranks: tests/distributed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_sgopd.models.logprobs import OutputHead, fused_policy_loss, target_logprobs

TOKENS, HIDDEN, VOCAB, PADDED_VOCAB = 13, 6, 17, 20

Inputs = tuple[torch.Tensor, ...]  # hidden states, weight, targets, coefficients
Outputs = tuple[torch.Tensor, ...]  # loss, log-probs, entropy


def _inputs(
    tokens: int = TOKENS,
    hidden: int = HIDDEN,
    vocab: int = VOCAB,
    padded_vocab: int = PADDED_VOCAB,
    seed: int = 0,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    hidden_TH = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    weight_VH = torch.randn(padded_vocab, hidden, generator=generator, dtype=torch.float64)
    targets_T = torch.randint(vocab, (tokens,), generator=generator)
    coefficients_T = torch.randn(tokens, generator=generator, dtype=torch.float64)
    return hidden_TH.requires_grad_(), weight_VH.requires_grad_(), targets_T, coefficients_T


def _naive(inputs: Inputs, vocab: int = VOCAB, temperature: float = 1.0) -> Outputs:
    hidden_TH, weight_VH, targets_T, coefficients_T = inputs
    logprobs_TV = (hidden_TH @ weight_VH[:vocab].T / temperature).log_softmax(-1)
    logprobs_T = logprobs_TV.gather(1, targets_T[:, None])[:, 0]
    return -(coefficients_T * logprobs_T).sum(), logprobs_T, -(logprobs_TV.exp() * logprobs_TV).sum(-1)


def _recomputing(inputs: Inputs, vocab: int = VOCAB, temperature: float = 1.0, chunk_tokens: int = 5) -> Outputs:
    hidden_TH, weight_VH, targets_T, coefficients_T = inputs
    head = OutputHead(weight_VH, vocab, None, chunk_tokens, temperature)
    logprobs_T, entropy_T = target_logprobs(hidden_TH, head, targets_T, with_entropy=True)
    assert entropy_T is not None
    return -(coefficients_T * logprobs_T).sum(), logprobs_T, entropy_T


def _fused(inputs: Inputs, vocab: int = VOCAB, temperature: float = 1.0, chunk_tokens: int = 5) -> Outputs:
    hidden_TH, weight_VH, targets_T, coefficients_T = inputs
    head = OutputHead(weight_VH, vocab, None, chunk_tokens, temperature)
    loss, logprobs_T, entropy_T = fused_policy_loss(
        hidden_TH, head, targets_T, lambda logprobs_C, chunk: coefficients_T[chunk], with_entropy=True
    )
    assert entropy_T is not None
    return loss, logprobs_T, entropy_T


class _Record(TorchDispatchMode):
    """The operations, and element counts of the tensors that they make, views and in-place results left out."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(func)
        result = func(*args, **(kwargs or {}))
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        made = {
            _storage(leaf): leaf.untyped_storage().nbytes() // leaf.itemsize
            for leaf in tree_leaves(result)
            if isinstance(leaf, torch.Tensor)
        }
        self.sizes += [elements for storage, elements in made.items() if storage not in given]
        return result


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


both_forms = pytest.mark.parametrize("form", [_recomputing, _fused])


def _grads(outputs: Outputs, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(outputs[0], inputs[:2])


def _assert_equal(actual: Any, expected: Any, atol: float = 1e-10) -> None:
    """Float64 sums of up to some hundred terms of order 1, in another order: errors near 1e-14."""
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


@settings(deadline=None)
@given(
    tokens=st.integers(0, 9),
    hidden=st.integers(1, 5),
    vocab=st.integers(1, 9),
    padding=st.integers(0, 3),
    chunk_tokens=st.integers(0, 10),
    temperature=st.floats(0.2, 5.0),
    seed=st.integers(0, 1000),
)
def test_both_forms_equal_log_softmax_and_gather(
    tokens: int, hidden: int, vocab: int, padding: int, chunk_tokens: int, temperature: float, seed: int
) -> None:
    inputs = _inputs(tokens, hidden, vocab, vocab + padding, seed)
    expected = _naive(inputs, vocab, temperature)
    expected_grads = _grads(expected, inputs)
    for form in (_recomputing, _fused):
        outputs = form(inputs, vocab, temperature, chunk_tokens)
        _assert_equal(outputs, expected)
        _assert_equal(_grads(outputs, inputs), expected_grads)


@both_forms
def test_gradcheck(form: Callable[..., Outputs]) -> None:
    inputs = _inputs()
    torch.autograd.gradcheck(lambda *tensors: form((*tensors, *inputs[2:]), temperature=0.7)[0], inputs[:2])


def test_gradcheck_of_each_logprob() -> None:
    hidden_TH, weight_VH, targets_T, _ = _inputs()
    torch.autograd.gradcheck(
        lambda hidden_TH, weight_VH: target_logprobs(hidden_TH, OutputHead(weight_VH, VOCAB, None, 5, 0.7), targets_T)[
            0
        ],
        (hidden_TH, weight_VH),
    )


@both_forms
def test_chunk_size_changes_nothing(form: Callable[..., Outputs]) -> None:
    inputs = _inputs()
    whole = form(inputs, chunk_tokens=0)
    whole_grads = _grads(whole, inputs)
    for chunk_tokens in (1, 2, 5, TOKENS - 1, TOKENS, TOKENS + 1):
        chunked = form(inputs, chunk_tokens=chunk_tokens)
        _assert_equal(chunked, whole, atol=1e-12)
        _assert_equal(_grads(chunked, inputs), whole_grads, atol=1e-12)


@both_forms
def test_padded_rows_get_no_probability_and_no_gradient(form: Callable[..., Outputs]) -> None:
    inputs = _inputs()
    with torch.no_grad():
        inputs[1][VOCAB:] = 100.0  # would win every softmax
    outputs = form(inputs)
    _assert_equal(outputs, _naive(inputs))
    assert torch.equal(_grads(outputs, inputs)[1][VOCAB:], torch.zeros(PADDED_VOCAB - VOCAB, HIDDEN).double())


@both_forms
def test_tied_weight_gathers_both_gradients(form: Callable[..., Outputs]) -> None:
    _, weight_VH, targets_T, coefficients_T = _inputs()
    tokens_T = targets_T.flip(0)

    def grad(form: Callable[..., Outputs]) -> torch.Tensor:
        embedded_TH = torch.nn.functional.embedding(tokens_T, weight_VH).tanh()
        loss = form((embedded_TH, weight_VH, targets_T, coefficients_T))[0]
        return torch.autograd.grad(loss, weight_VH)[0]

    _assert_equal([grad(form)], [grad(_naive)])


@both_forms
@pytest.mark.parametrize("frozen", [0, 1])
def test_one_of_hidden_and_weight_may_be_frozen(form: Callable[..., Outputs], frozen: int) -> None:
    inputs = _inputs()
    expected = _grads(_naive(inputs), inputs)[1 - frozen]
    inputs[frozen].requires_grad_(False)
    _assert_equal(torch.autograd.grad(form(inputs)[0], inputs[1 - frozen]), [expected])


@both_forms
def test_scaled_and_repeated_backward(form: Callable[..., Outputs]) -> None:
    """Megatron divides by microbatches and scales the loss; the same graph may be walked twice."""
    inputs = _inputs()
    expected = [3.0 * grad for grad in _grads(_naive(inputs), inputs)]
    loss = form(inputs)[0] * 3.0
    for _ in range(2):
        _assert_equal(torch.autograd.grad(loss, inputs[:2], retain_graph=True), expected)


def test_coefficients_are_constants_made_of_each_logprob_once() -> None:
    inputs = _inputs()
    hidden_TH, weight_VH, targets_T, weights_T = inputs
    spans = []

    def coefficients(logprobs_C: torch.Tensor, chunk: slice) -> torch.Tensor:
        spans.append((chunk.start, chunk.stop))
        assert not logprobs_C.requires_grad
        return weights_T[chunk] * logprobs_C.exp()

    loss, logprobs_T, _ = fused_policy_loss(hidden_TH, OutputHead(weight_VH, VOCAB, None, 5), targets_T, coefficients)
    assert spans == [(0, 5), (5, 10), (10, 13)]
    assert loss.requires_grad
    assert not logprobs_T.requires_grad

    expected_T = _naive(inputs)[1]
    expected = -(weights_T * expected_T.exp().detach() * expected_T).sum()
    _assert_equal([loss, logprobs_T], [expected, expected_T])
    _assert_equal(torch.autograd.grad(loss, inputs[:2]), torch.autograd.grad(expected, inputs[:2]))


@both_forms
def test_extreme_logits_stay_finite(form: Callable[..., Outputs]) -> None:
    """Logits of hundreds in float32, where exp overflows at 88, and targets of probability 0."""
    inputs = _inputs()
    with torch.no_grad():
        inputs[0].mul_(200.0)
    expected = _naive(inputs)
    assert expected[1].min() < -500
    single = (
        *(tensor.detach().float().requires_grad_() for tensor in inputs[:2]),
        inputs[2],
        inputs[3].float(),
    )
    outputs = form(single)
    for actual, reference in zip(
        (*outputs, *_grads(outputs, single)), (*expected, *_grads(expected, inputs)), strict=True
    ):
        # float32 keeps 6 digits of logits of hundreds.
        torch.testing.assert_close(actual.double(), reference, rtol=1e-4, atol=2e-3)


@both_forms
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ],
)
def test_bfloat16_operands_are_summed_in_float32(form: Callable[..., Outputs], device: str) -> None:
    inputs = _inputs(tokens=700, hidden=64)
    half = tuple(tensor.detach().bfloat16().requires_grad_() for tensor in inputs[:2])
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in half)
    expected = _naive((*exact, *inputs[2:]))
    on_device = (
        *(tensor.detach().to(device).requires_grad_() for tensor in half),
        *(tensor.to(device) for tensor in inputs[2:]),
    )
    outputs = form(on_device, chunk_tokens=1)
    grads = _grads(outputs, on_device)
    assert outputs[1].dtype is torch.float32
    # Products of bfloat16 are exact in float32: only the order of 64 terms of logits up to 30 shows. Logits
    # rounded to bfloat16 would be off by 0.06.
    torch.testing.assert_close(outputs[1].double().cpu(), expected[1], rtol=0, atol=3e-5)
    # The entropy goes through residuals rounded to bfloat16 on a GPU.
    torch.testing.assert_close(outputs[2].double().cpu(), expected[2], rtol=0, atol=3e-5 if device == "cpu" else 0.1)
    for grad, reference in zip(grads, _grads(expected, exact), strict=True):
        assert grad.dtype is torch.bfloat16
        # Some roundings of 2^-9 each; 700 additions in bfloat16 would lose several percent of the largest.
        error = (grad.double().cpu() - reference).norm() / reference.norm()
        assert error < 2**-8, error


def test_bfloat16_on_a_gpu_takes_matmuls_that_exist() -> None:
    """Shapes, dtypes and kernels' signatures, without numbers and without a GPU."""
    with FakeTensorMode(), _Record() as record:
        hidden_TH, weight_VH, targets_T, _ = (tensor.to("cuda") for tensor in _inputs())
        head = OutputHead(weight_VH.bfloat16(), VOCAB, None, 5)
        loss, logprobs_T, entropy_T = fused_policy_loss(
            hidden_TH.bfloat16(), head, targets_T, lambda logprobs_C, _: logprobs_C, with_entropy=True
        )
        assert loss.requires_grad
        assert entropy_T is not None
        assert {loss.dtype, logprobs_T.dtype, entropy_T.dtype} == {torch.float32}
    matmuls = [operation for operation in record.operations if "mm" in operation.name()]
    assert matmuls == [torch.ops.aten.addmm.dtype_out] * 9  # three for each of three chunks


def test_no_tokens_give_no_loss_and_zero_gradients() -> None:
    inputs = _inputs(tokens=0)
    for form in (_recomputing, _fused):
        loss, logprobs_T, entropy_T = form(inputs)
        assert (loss.item(), len(logprobs_T), len(entropy_T)) == (0.0, 0, 0)
        hidden_grad_TH, weight_grad_VH = _grads((loss, logprobs_T, entropy_T), inputs)
        assert hidden_grad_TH.shape == (0, HIDDEN)
        assert torch.equal(weight_grad_VH, torch.zeros_like(weight_grad_VH))


def test_targets_that_are_no_token_have_probability_zero() -> None:
    hidden_TH, weight_VH, _, _ = _inputs(tokens=5)
    targets_T = torch.tensor([-1, -100, VOCAB, PADDED_VOCAB, VOCAB - 1])
    logprobs_T, _ = target_logprobs(hidden_TH, OutputHead(weight_VH, VOCAB, None, 0), targets_T)
    assert torch.equal(logprobs_T.isinf(), targets_T != VOCAB - 1)


@both_forms
def test_logits_of_all_tokens_never_exist(form: Callable[..., Outputs]) -> None:
    tokens, vocab = 64, 1000
    inputs = _inputs(tokens, HIDDEN, vocab, vocab)
    weight_sized = {}
    for chunk_tokens in (8, 16):
        with _Record() as record:
            _grads(form(inputs, vocab, chunk_tokens=chunk_tokens), inputs)
        # One buffer of logits in each pass over the chunks, nothing larger.
        assert max(record.sizes) == chunk_tokens * vocab
        assert record.sizes.count(chunk_tokens * vocab) <= 2
        weight_sized[chunk_tokens] = record.sizes.count(vocab * HIDDEN)
    # Gradient buffer, its scaled copy; not one more for each chunk.
    assert weight_sized[8] == weight_sized[16] <= 2

    with _Record() as record:
        _grads(_naive(inputs, vocab), inputs)
    assert max(record.sizes) == tokens * vocab  # what the mode would have seen


@both_forms
def test_without_grad_no_gradient_is_formed(form: Callable[..., Outputs]) -> None:
    vocab = 1000
    inputs = _inputs(64, HIDDEN, vocab, vocab)
    with torch.no_grad(), _Record() as record:
        outputs = form(inputs, vocab, chunk_tokens=8)
    assert not any(tensor.requires_grad for tensor in outputs)
    assert vocab * HIDDEN not in record.sizes
    _assert_equal(outputs, _naive(inputs, vocab))

"""How far each lower precision moves log-probs, and what that does to the sign gate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sgopd.models.logprobs import OutputHead, target_logprobs
from megatron_sgopd.precision.emulation import emulated_fp8

TAU_PERCENTILE = 0.95
"""Of |delta log-prob|: what the gate should take for noise, as `noise_floor: auto` does in a run."""


@dataclass(frozen=True)
class Precision:
    """One way to compute a model's log-probs."""

    name: str
    dtype: torch.dtype
    applied: Callable[[torch.nn.Module], contextlib.AbstractContextManager[None]]


def _as_it_is(model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


EXACT = Precision("float32", torch.float32, _as_it_is)
PRECISIONS = (
    Precision("BF16", torch.bfloat16, _as_it_is),
    Precision("E4M3 tensorwise", torch.float32, lambda model: emulated_fp8(model, "tensorwise")),
    Precision(  # the first and the last layer
        "E4M3 tensorwise, ends in BF16",
        torch.float32,
        lambda model: emulated_fp8(model, "tensorwise", first_last_bf16=True),
    ),
    Precision("E4M3 blockwise", torch.float32, lambda model: emulated_fp8(model, "blockwise")),
)


@dataclass(frozen=True)
class Response:
    """A prompt and a response to it, token ids."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]


def logprobs_by_precision(
    folder: str | Path, responses: Sequence[Response], temperature: float, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """The log-probs of all responses' tokens under a model, float32 [T] on the host; the exact ones first."""
    from transformers import AutoModelForCausalLM

    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).to(device).eval()
        for precision in (EXACT, *PRECISIONS):
            if precision.dtype is dtype:
                with precision.applied(model):
                    yield precision.name, torch.cat([_logprobs(model, one, temperature) for one in responses])
        del model  # before the next one is loaded


@torch.no_grad()
def _logprobs(model: Any, response: Response, temperature: float) -> torch.Tensor:
    device = model.device
    tokens = torch.tensor([response.prompt + response.response], device=device)
    hidden_TH = model.base_model(tokens).last_hidden_state[0, len(response.prompt) - 1 : -1]
    weight_VH = model.get_output_embeddings().weight
    head = OutputHead(weight_VH, len(weight_VH), None, 0, temperature)
    return target_logprobs(hidden_TH, head, torch.tensor(response.response, device=device))[0].float().cpu()


def errors(exact_T: torch.Tensor, found_T: torch.Tensor) -> dict[str, float]:
    """|delta log-prob| in nats: mean, percentiles, and the threshold tau that covers most of it."""
    error_T = (found_T - exact_T).abs()
    quantiles = torch.quantile(error_T, torch.tensor([0.5, 0.9, 0.99, TAU_PERCENTILE])).tolist()
    return dict(zip(("p50", "p90", "p99", "tau"), quantiles, strict=True)) | {"mean": float(error_T.mean())}


def flips(exact_delta_T: torch.Tensor, delta_T: torch.Tensor, tau: float) -> dict[str, float]:
    """How many tokens' gates turn round: sign(q_t - s_t) decides them, whatever the verifier said.

    Args:
        exact_delta_T: q_t - s_t in float32.
        delta_T: the same where one of the two models is in lower precision.
        tau: noise floor of the gate, in nats.

    Returns:
        `flipped`: share of the tokens; `flipped_weighted`: each counted by its |q_t - s_t|;
        `flipped_above_tau`: share of those that the gate still reads, |delta_t| > tau; `neutral`: share of the others.
    """
    turned_T = torch.sign(exact_delta_T) != torch.sign(delta_T)
    weight_T, read_T = exact_delta_T.abs(), delta_T.abs() > tau
    return {
        "flipped": float(turned_T.float().mean()),
        "flipped_weighted": float((turned_T * weight_T).sum() / weight_T.sum().clamp_min(1e-30)),
        "flipped_above_tau": float(turned_T[read_T].float().mean()) if read_T.any() else 0.0,
        "neutral": float((~read_T).float().mean()),
    }

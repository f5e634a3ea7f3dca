"""Megatron models on CPU ranks, built from Hugging Face folders and run, for tests that compare them."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_sgopd.models.architecture import Architecture

LAYOUTS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (4, 1, 1), (1, 1, 2), (2, 1, 2))
"""Tensor, pipeline and expert parallel sizes."""
SOME_LAYOUTS = ((1, 1, 1), (2, 2, 1), (2, 1, 2))
"""Those of them that split everything once; the others are for `make test-long`."""
OFTEN_AND_ALL = [pytest.param(SOME_LAYOUTS, id="some"), pytest.param(LAYOUTS, id="all", marks=pytest.mark.long)]


def each_layout(
    layouts: Sequence[tuple[int, int, int]] = LAYOUTS, contexts: Sequence[int] = (1,)
) -> Iterator[tuple[int, int, int]]:
    """On each of all ranks: set up Megatron on the CPU, and initialize one layout after the other.

    Args:
        contexts: context parallel sizes, each with all the layouts that the ranks are enough for.
    """
    from megatron_sgopd import platform

    platform.select("cpu")
    dist.init_process_group("gloo")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    for context, (tensor, pipeline, expert) in itertools.product(contexts, layouts):
        if tensor * pipeline * context > dist.get_world_size():
            continue
        parallel_state.initialize_model_parallel(
            tensor, pipeline, context_parallel_size=context, expert_model_parallel_size=expert
        )
        model_parallel_cuda_manual_seed(1)
        yield tensor, pipeline, expert
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def base_config(**changes: Any) -> Any:
    """A run's configuration, of another shape than any of the models."""
    from megatron.core.transformer import TransformerConfig

    fields: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 1,
        "use_cpu_initialization": True,
        "params_dtype": torch.float32,
    }
    return TransformerConfig(**(fields | changes))


def process_groups() -> Any:
    """The process groups of the layout that was initialized."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    return ProcessGroupCollection.use_mpu_process_groups()


def build(architecture: Architecture, layout: tuple[int, int, int] = (1, 1, 1), **changes: Any) -> Any:
    """This rank's part of a model whose weights are not set."""
    from megatron.core import parallel_state

    from megatron_sgopd.models.provider import build_model, padded_vocab_size, transformer_config

    return build_model(
        architecture,
        transformer_config(architecture, base_config(**changes), *layout),
        process_groups(),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        # At TP=2 the second rank holds padding alone.
        padded_vocab_size=padded_vocab_size(architecture, layout[0], divisible_by=256),
    )


def forward(model: Any, tokens: torch.Tensor, vocab_size: int) -> torch.Tensor | None:
    """Log-probs [rows, length, vocabulary] on the last pipeline stage, None on the others."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_sgopd import platform

    rows, length = tokens.shape
    model.eval()
    with torch.no_grad():
        if not parallel_state.is_pipeline_first_stage():
            hidden = torch.empty(length, rows, model.config.hidden_size)
            dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(hidden)
        output = model(
            tokens,
            torch.arange(length).expand(rows, length),
            **platform.current().packed_attention(*[torch.zeros_like(tokens)] * 2),
        )
        if not parallel_state.is_pipeline_last_stage():
            dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
            return None
        return gather_from_tensor_model_parallel_region(output)[..., :vocab_size].log_softmax(-1)

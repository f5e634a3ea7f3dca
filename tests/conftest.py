"""Fixtures that several test folders share."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Times of single examples say nothing on a shared machine.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


@pytest.fixture(scope="session", autouse=True)
def cache_of_prompts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """In place of the user's own, for what tests start too."""
    os.environ["SGOPD_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random Hugging Face folders, float32, by name; made by transformers.

    Vocabularies of 250 and 251 (a prime) need padding, and Llama's rope scaling starts at 64 positions.
    """
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        PreTrainedConfig,
        PreTrainedModel,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    plain = {"rope_type": "default", "rope_theta": 1000000.0}
    scaled = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 6.0, "low_freq_factor": 1.5}
    scaled |= {"high_freq_factor": 3.0, "original_max_position_embeddings": 64}
    variants: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel], dict[str, object]]] = {
        "llama_tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
        "llama_untied": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 8}),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16, "tie_word_embeddings": True}),
        "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "vocab_size": 251}),
        "qwen3_moe": (
            Qwen3MoeConfig,
            Qwen3MoeForCausalLM,
            {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
            | {"norm_topk_prob": True},
        ),
    }
    root = tmp_path_factory.mktemp("tiny_models")
    generator = torch.Generator().manual_seed(0)
    for name, (config_class, model_class, fields) in variants.items():
        fields = {
            "vocab_size": 250,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 256,
            "rope_parameters": dict(scaled if name.startswith("llama") else plain),
            **fields,
        }
        model = model_class(config_class(**fields)).float()
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms too, which transformers leaves at 0 and 1
                parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(0.1))
                if parameter.dim() == 1:
                    parameter.add_(1.0)
        model.save_pretrained(root / name)
    return {name: root / name for name in variants}


@pytest.fixture(scope="session")
def main_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Eleven steps of the arithmetic example with tensor parallelism over two ranks: a `Finished` run."""
    from .e2e.conftest import succeed

    checkpoints = {"checkpoint.every": 2, "checkpoint.verify": "digests"}
    return succeed(tmp_path_factory.mktemp("main"), {"train.steps": 11} | checkpoints)

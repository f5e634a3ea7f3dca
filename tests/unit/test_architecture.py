"""config.json is understood in full, or refused by name."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.models.architecture import Architecture, read_architecture

LLAMA31: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN2 = {name: value for name, value in QWEN3.items() if name != "head_dim"} | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "sliding_window": 4096,
    "use_mrope": False,
}
QWEN3_MOE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}
MISTRAL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32768,
}

Write = Callable[[dict[str, Any]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_folder(config: dict[str, Any]) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.safetensors").touch()
        return tmp_path

    return write_folder


def test_published_configurations_are_read_field_by_field(write: Write) -> None:
    llama = read_architecture(write(LLAMA31))
    assert llama == Architecture(
        folder=llama.folder,
        model_type="llama",
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=131072,
        norm_epsilon=1e-5,
        tied_embeddings=False,
        rope_type="llama3",
        rope_theta=500000.0,
    )
    assert (llama.qk_norm, llama.qkv_bias) == (False, False)
    qwen3 = read_architecture(write(QWEN3))
    assert (qwen3.head_dim, qwen3.query_size, qwen3.key_size) == (128, 4096, 1024)
    assert (qwen3.qk_norm, qwen3.qkv_bias, qwen3.tied_embeddings) == (True, False, True)
    assert (qwen3.rope_type, qwen3.rope_theta) == ("default", 1e6)
    qwen2 = read_architecture(write(QWEN2))
    assert (qwen2.head_dim, qwen2.qk_norm, qwen2.qkv_bias) == (80, False, True)
    moe = read_architecture(write(QWEN3_MOE))
    assert (moe.num_experts, moe.experts_per_token, moe.ffn_hidden_size) == (128, 8, 768)
    assert (moe.renormalized_routing, moe.qk_norm) == (True, True)
    mistral = read_architecture(write(MISTRAL))
    assert (mistral.head_dim, mistral.qk_norm, mistral.qkv_bias) == (128, False, False)


def test_old_and_new_spelling_of_rope_mean_the_same(write: Write) -> None:
    old = read_architecture(write(LLAMA31))
    config = {name: value for name, value in LLAMA31.items() if not name.startswith("rope")}
    config["rope_parameters"] = LLAMA31["rope_scaling"] | {"rope_theta": LLAMA31["rope_theta"]}
    assert read_architecture(write(config)) == old


def test_two_spellings_of_one_rope_do_not_contradict_each_other(write: Write) -> None:
    former = {"type": "linear", "factor": 4.0}
    current = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0, "partial_rotary_factor": 1.0}
    both = read_architecture(write(LLAMA31 | {"rope_scaling": former, "rope_parameters": current}))
    assert (both.rope_type, both.rope_theta) == ("linear", 500000.0)
    with pytest.raises(ConfigError, match="contradicts rope_scaling"):
        read_architecture(write(LLAMA31 | {"rope_scaling": former, "rope_parameters": current | {"factor": 8.0}}))


def test_bookkeeping_and_fields_without_value_change_nothing(write: Write) -> None:
    plain = read_architecture(write(QWEN3))
    kept = {"_commit_hash": "1a2b", "tokenizer_class": "Qwen2Tokenizer", "unsloth_fixed": True, "unsloth_version": "1"}
    kept |= {"temperature": 0.6, "max_length": 20, "model_name": "x", "rope_interleave": None}
    assert read_architecture(write(QWEN3 | kept)) == plain


def test_what_transformers_writes_agrees_with_what_it_reads(tiny_models: dict[str, Path]) -> None:
    from transformers import AutoConfig

    for folder in tiny_models.values():
        architecture, config = read_architecture(folder), AutoConfig.from_pretrained(folder)
        assert architecture.num_layers == config.num_hidden_layers
        assert architecture.num_query_groups == config.num_key_value_heads
        width = config.moe_intermediate_size if architecture.num_experts else config.intermediate_size
        assert architecture.ffn_hidden_size == width
        assert architecture.tied_embeddings == config.tie_word_embeddings
        assert architecture.rope_type == config.rope_parameters["rope_type"]
        assert architecture.rope_theta == config.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (LLAMA31, {"model_type": "gemma3"}, "'gemma3' is not supported: use one of llama, mistral, qwen2, qwen3"),
        (LLAMA31, {"model_type": "gemma3_text"}, "not supported, since its norms after attention"),
        (LLAMA31, {"architectures": None}, "architectures = None"),
        (LLAMA31, {"model_type": ["llama"]}, "not supported"),
        (LLAMA31, {"architectures": ["LlamaForSequenceClassification"]}, r"must have \['LlamaForCausalLM'\]"),
        (LLAMA31, {"attention_bias": True}, "attention_bias = True"),
        (LLAMA31, {"mlp_bias": True}, "mlp_bias = True"),
        (LLAMA31, {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (LLAMA31, {"sliding_window": 4096}, "sliding_window = 4096"),
        (LLAMA31, {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        (LLAMA31, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA31, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (LLAMA31, {"num_attention_heads": 0}, "num_attention_heads = 0"),
        (LLAMA31, {"hidden_size": "4096"}, "hidden_size = '4096'"),
        (LLAMA31, {"vocab_size": None}, "vocab_size = None"),
        (LLAMA31, {"rms_norm_eps": None}, "rms_norm_eps = None"),
        (LLAMA31, {"num_key_value_heads": 5}, "num_key_value_heads = 5 does not divide"),
        (LLAMA31, {"rope_theta": -1}, "rope_theta = -1"),
        (LLAMA31, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'"),
        (LLAMA31, {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type = 'dynamic'"),
        (LLAMA31, {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "high_freq_factor of"),
        (LLAMA31, {"rope_scaling": {"type": "linear", "factor": 4.0, "mscale": 1.0}}, "mscale = 1.0"),
        (LLAMA31, {"rope_parameters": {"rope_type": "default"}}, "contradicts rope_scaling"),
        (QWEN3, {"attention_bias": True}, "attention_bias = True"),
        (QWEN3, {"use_sliding_window": True}, "use_sliding_window = True"),
        (QWEN3, {"layer_types": ["full_attention"] * 35 + ["sliding_attention"]}, "layer_types"),
        (QWEN3, {"num_experts": 8}, "num_experts = 8"),
        (QWEN2, {"use_mrope": True}, "use_mrope = True"),
        (MISTRAL, {"sliding_window": 4096}, "sliding_window = 4096"),
        (QWEN3_MOE, {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        (QWEN3_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        (QWEN3_MOE, {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size = 64"),
    ],
)
def test_a_field_that_would_be_computed_differently_is_refused_by_name(
    write: Write, config: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    folder = write(config)
    read_architecture(folder)
    with pytest.raises(ConfigError, match=message):
        read_architecture(write(config | change))


def test_a_field_whose_absence_means_something_else_must_be_there(write: Write) -> None:
    del (config := dict(MISTRAL))["sliding_window"]
    with pytest.raises(ConfigError, match="sliding_window is missing"):
        read_architecture(write(config))


def test_a_folder_without_readable_safetensors_is_refused_with_what_it_holds(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        read_architecture(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no config.json, only nothing at all"):
        read_architecture(tmp_path)
    folder = write(QWEN3)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"only config.json, pytorch_model.bin: pickle files are never"):
        read_architecture(folder)
    for text, message in (("{", "cannot be read as JSON"), ("[]", "holds a list")):
        (folder / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_architecture(folder)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "message"),
    [
        (3, 1, "tensor parallel size 3 does not divide num_attention_heads = 32"),
        (16, 1, "tensor parallel size 16 does not divide num_key_value_heads = 8"),
        (1, 5, "pipeline parallel size 5 does not divide num_hidden_layers = 36"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused(write: Write, tensor: int, pipeline: int, message: str) -> None:
    architecture = read_architecture(write(QWEN3))
    architecture.check_parallel(8, 4)
    with pytest.raises(ConfigError, match=message):
        architecture.check_parallel(tensor, pipeline)


def test_experts_must_divide_too(write: Write) -> None:
    with pytest.raises(ConfigError, match="has no experts"):
        read_architecture(write(QWEN3)).check_parallel(1, 1, 2)
    architecture = read_architecture(write(QWEN3_MOE))
    architecture.check_parallel(4, 4, 16)
    with pytest.raises(ConfigError, match="expert parallel size 3 does not divide num_experts = 128"):
        architecture.check_parallel(1, 1, 3)


def test_reading_needs_neither_torch_nor_transformers_nor_megatron() -> None:
    code = (
        "import sys, megatron_sgopd.models.architecture; "
        "print([name for name in ('torch', 'transformers', 'megatron') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

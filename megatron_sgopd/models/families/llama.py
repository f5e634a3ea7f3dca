"""Llama 3.x, and what is built like it (SmolLM2)."""

from megatron_sgopd.models.families.base import DENSE_MLP, Family, attention

FAMILY = Family(
    "llama",
    "LlamaForCausalLM",
    layer=(*attention(), *DENSE_MLP),
    multi_head_by_default=True,
    fixed={"attention_bias": False, "mlp_bias": False, "sliding_window": None, "rope_interleaved": False},
    ignored=frozenset({"pretraining_tp", "is_llama_config", "transformers.js_config"}),
)

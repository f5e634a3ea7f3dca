"""Qwen3, dense: norms on the heads of q and k."""

from megatron_sgopd.models.families.base import DENSE_MLP, QK_NORM, Family, attention

FAMILY = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    layer=(*attention(*QK_NORM), *DENSE_MLP),
    default_head_dim=128,
    fixed={"attention_bias": False, "use_sliding_window": False},
    ignored=frozenset({"sliding_window", "max_window_layers"}),  # read only where use_sliding_window
)

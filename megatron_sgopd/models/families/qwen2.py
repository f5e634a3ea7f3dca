"""Qwen2 and Qwen2.5: biases on q, k and v."""

from megatron_sgopd.models.families.base import DENSE_MLP, QKV_BIAS, Family, attention

FAMILY = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    layer=(*attention(QKV_BIAS), *DENSE_MLP),
    fixed={"use_sliding_window": False, "use_mrope": False},
    ignored=frozenset({"sliding_window", "max_window_layers"}),  # read only where use_sliding_window
)

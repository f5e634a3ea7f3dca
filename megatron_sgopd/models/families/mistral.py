"""Mistral's dense models without a sliding window: 7B from v0.3 on, Nemo, Small."""

from megatron_sgopd.models.families.base import DENSE_MLP, Family, attention

FAMILY = Family(
    "mistral",
    "MistralForCausalLM",
    layer=(*attention(), *DENSE_MLP),
    needed={"sliding_window": None},
)

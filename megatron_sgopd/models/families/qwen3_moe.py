"""Qwen3 mixture of experts: Qwen3's attention, and experts in every layer."""

from megatron_sgopd.models.families.base import EXPERTS, QK_NORM, Family, attention

FAMILY = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    layer=(*attention(*QK_NORM), *EXPERTS),
    fixed={"attention_bias": False, "use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ignored=frozenset(
        {
            "sliding_window",  # read only where use_sliding_window
            "max_window_layers",
            "intermediate_size",  # of layers without experts
            "output_router_logits",  # with the next: an extra loss, when training by transformers
            "router_aux_loss_coef",
        }
    ),
)

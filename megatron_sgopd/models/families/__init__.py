"""The architectures that Megatron can compute exactly, a file each. A new one: see docs/adding_an_architecture.md."""

from megatron_sgopd.models.families import llama, mistral, qwen2, qwen3, qwen3_moe

FAMILIES = {module.FAMILY.model_type: module.FAMILY for module in (llama, mistral, qwen2, qwen3, qwen3_moe)}

REFUSED = {
    "gemma3_text": "its norms after attention and MLP, and its two rope bases, do not exist in Megatron's GPTModel",
}
"""Architectures that users ask for, and why they cannot be computed exactly."""

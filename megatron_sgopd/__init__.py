"""Sign-gated on-policy distillation on Megatron-Core's own training loop."""

from megatron_sgopd.plugin import register

__all__ = ["register"]
__version__ = "0.1.0"

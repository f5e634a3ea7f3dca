"""Sign-gated on-policy distillation on Megatron-Core's own training loop."""

import os

# Before anything is imported, and inherited by every process that is started: torch would unpickle, and so execute,
# whatever object somebody put into a checkpoint.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

from megatron_sgopd.plugin import register

__all__ = ["register"]
__version__ = "0.1.0"

"""An objective for a crash loop."""

import torch

from megatron_sgopd.objective.loss import TokenSignals, TokenUpdate

_calls = 0


def fails_in_the_third_step(update: TokenUpdate, signals: TokenSignals) -> torch.Tensor:
    """The preset's advantage, until a few microbatches have been trained."""
    global _calls
    _calls += 1
    if _calls > 12:
        raise RuntimeError("the third step always fails")
    return update.advantage_T

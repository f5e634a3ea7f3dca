"""Frozen weights whose home is the host's memory."""

from __future__ import annotations

import torch

from megatron_sgopd.fp8 import drop_fp8_copies
from megatron_sgopd.platform import current


class HostedWeights:
    """Brings a frozen model's weights to the device, and drops them there: they never change, so none goes back."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._homes = [(parameter, current().host_copy(parameter.data)) for parameter in model.parameters()]
        self.release()

    def fetch(self, part: str) -> None:
        """Begin to copy them all, beside what the device computes."""
        with current().copying():
            for parameter, home in self._homes:
                parameter.data = home.to(current().device, non_blocking=True)

    def ready(self) -> None:
        """Let what the device computes from now on wait for the copies."""
        current().wait_for_copies([parameter.data for parameter, _ in self._homes])

    def release(self) -> None:
        """Leave the device."""
        drop_fp8_copies(self._model)
        for parameter, home in self._homes:
            parameter.data = home
        current().free_cached_memory()

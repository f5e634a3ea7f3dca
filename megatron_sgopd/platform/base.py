"""The one interface that a platform implements."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer import ModuleSpec, TransformerConfig


class Platform(abc.ABC):
    """What differs between running on CPUs and on GPUs."""

    name: ClassVar[str]
    environment: ClassVar[dict[str, str]]
    """Environment variables that must be set before torch, Megatron and vLLM are imported."""
    megatron_flags: ClassVar[tuple[str, ...]]
    """Megatron flags without which a run cannot work here."""
    several_engines: ClassVar[bool]
    """Whether the teacher's rollout engine may live beside the student's in one process."""
    saves_in_background: ClassVar[bool]
    """Whether Megatron can save a checkpoint while training goes on."""

    @abc.abstractmethod
    def install(self) -> None:
        """Make this process able to import and run Megatron and vLLM on this platform."""

    @property
    @abc.abstractmethod
    def device(self) -> torch.device:
        """Where this rank's tensors live."""

    @abc.abstractmethod
    def memory_used(self) -> int:
        """Bytes of that device's memory in use."""

    @abc.abstractmethod
    def layer_spec(self, config: TransformerConfig) -> ModuleSpec:
        """The decoder layers that a `GPTModel` of this configuration is built from."""

    @abc.abstractmethod
    def packed_attention(self, segment_ids_BS: torch.Tensor) -> dict[str, Any]:
        """Arguments of `GPTModel.forward` that keep packed sequences apart.

        Args:
            segment_ids_BS: int tensor [rows, seq_length]; tokens attend only to earlier tokens with the
                same number. Numbers rise along a row.
        """

    @abc.abstractmethod
    def engine_options(self, memory_fraction: float, cache_bytes: int) -> dict[str, Any]:
        """Arguments of `vllm.LLM` that depend on the platform."""

    @staticmethod
    @abc.abstractmethod
    def refresh_engine_model(model: torch.nn.Module) -> None:
        """Called on vLLM's model after its weights were replaced: renew what vLLM derived from them itself."""

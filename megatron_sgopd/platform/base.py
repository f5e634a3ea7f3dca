"""The one interface that a platform implements."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer import ModuleSpec, TransformerConfig
    from vllm import LLM


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
    loads_distributed_optimizer: ClassVar[bool]
    """Whether Megatron can load its distributed optimizer's state from a checkpoint."""
    groups_experts: ClassVar[bool]
    """Whether the experts of a layer are multiplied by at once."""
    planned_as: ClassVar[str]
    """The device of cluster/hardware.json whose layers and engine are this platform's."""
    one_long_row: ClassVar[bool]
    """Whether the rows of a microbatch pass through the model as one, [1, B * S], told apart by `packed_attention`."""
    shares_prompts: ClassVar[bool]
    """Whether several responses of a group may lie behind one copy of their prompt."""

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
    def reset_peak_memory(self) -> None:
        """From now on `peak_memory` says what was in use at most."""

    @abc.abstractmethod
    def peak_memory(self) -> int:
        """Bytes of the device's memory that this process had in use at most."""

    @abc.abstractmethod
    def free_cached_memory(self) -> None:
        """Give back what an allocator keeps of freed tensors, for others and for other streams."""

    @abc.abstractmethod
    def copying(self) -> contextlib.AbstractContextManager[None]:
        """Copies from the host that the body begins go on beside what the device computes."""

    @abc.abstractmethod
    def wait_for_copies(self, copies: Sequence[torch.Tensor]) -> None:
        """What the device computes from now on waits for them."""

    @abc.abstractmethod
    def plain_torch(self) -> contextlib.AbstractContextManager[None]:
        """Torch as it is, for code that names no other device than this platform's."""

    @abc.abstractmethod
    def layer_spec(self, config: TransformerConfig) -> ModuleSpec:
        """The decoder layers that a `GPTModel` of this configuration is built from."""

    @abc.abstractmethod
    def packed_attention(
        self, segments_BS: torch.Tensor, responses_BS: torch.Tensor, context_group: Any = None
    ) -> dict[str, Any]:
        """Arguments of `GPTModel.forward` that keep packed sequences apart.

        Args:
            segments_BS: int tensor [rows, seq_length] on the host; tokens attend only to earlier tokens of their row
                with the same number. Numbers rise along a row.
            responses_BS: likewise; of these tokens, only to those that have their own number or 0. A segment has one
                response where the platform does not share prompts.
            context_group: the ranks that split each row as `context_columns` does; None: no other rank.
        """

    @abc.abstractmethod
    def engine_options(
        self, memory_fraction: float, cache_bytes: int, quantization: str | None = None
    ) -> dict[str, Any]:
        """Arguments of `vllm.LLM` that depend on the platform.

        Args:
            quantization: `per_tensor` or `per_block`: FP8 weights, made by vLLM of those that it is given.

        Raises:
            ConfigError: this platform has no FP8.
        """

    @abc.abstractmethod
    def check_training(self, precision: str) -> None:
        """Check that layers work on this device, in `bf16` or `float32`, as a recipe calls them.

        Raises:
            ConfigError: they do not.
        """

    @abc.abstractmethod
    def check_fp8(self, recipe: str) -> None:
        """Check that layers can multiply in FP8 by one of Megatron's recipes.

        Raises:
            ConfigError: they cannot.
        """

    @abc.abstractmethod
    def host_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in the host's memory from which the device can fetch while it computes."""

    @abc.abstractmethod
    def load_engine_weights(self, engine: LLM, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights that vLLM multiplies by with full tensors under their Hugging Face names."""

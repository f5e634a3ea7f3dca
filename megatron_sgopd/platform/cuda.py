"""Megatron-Core and vLLM on NVIDIA GPUs: NCCL, Transformer Engine layers, packed rows as THD sequences.

Not run on a GPU yet; see the table in the README.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch

from megatron_sgopd.fp8 import check_device
from megatron_sgopd.platform.base import Platform
from megatron_sgopd.rollout.packing import segment_bounds

APEX_KERNELS = {
    "fused_weight_gradient_mlp_cuda": "gradients of weights summed in float32 by the product itself",
    "fused_layer_norm_cuda": "norms in one kernel, where Transformer Engine has none",
    "amp_C": "Adam over many tensors in one kernel; Transformer Engine's is used first",
}
"""Compiled modules that Megatron uses of Apex where they are installed, and for what."""


def has_kernel(name: str) -> bool:
    """Whether one of Apex's modules is installed."""
    return importlib.util.find_spec(name) is not None


class CudaPlatform(Platform):
    """One process a GPU."""

    name = "cuda"
    several_engines = False  # vLLM's sleep mode allows one in a process
    saves_in_background = True
    planned_as = "h100-80g"
    one_long_row = True
    shares_prompts = False  # attention kernels for packed rows know no prefix with branches
    environment: ClassVar[dict[str, str]] = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron overlaps communication only in this order of launches
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine shares this process, its device and its weights
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TOKENIZERS_PARALLELISM": "false",
    }
    megatron_flags = (
        "--distributed-backend=nccl",
        "--transformer-impl=transformer_engine",
        # Megatron's default, which its output layer refuses without Apex.
        *(() if has_kernel("fused_weight_gradient_mlp_cuda") else ("--no-gradient-accumulation-fusion",)),
    )

    def install(self) -> None:
        for key, value in self.environment.items():
            os.environ.setdefault(key, value)
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        self._copies = torch.cuda.Stream()

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def memory_used(self) -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free

    def reset_peak_memory(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        self._outside = self.memory_used() - torch.cuda.memory_reserved()  # the engine's pool, NCCL and the context

    def peak_memory(self) -> int:
        outside = max(self._outside, self.memory_used() - torch.cuda.memory_reserved())
        return outside + torch.cuda.max_memory_reserved()

    def free_cached_memory(self) -> None:
        torch.cuda.empty_cache()

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        # What they overwrite may still be read.
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            yield

    def wait_for_copies(self, copies: Sequence[torch.Tensor]) -> None:
        torch.cuda.current_stream().wait_stream(self._copies)
        for copy in copies:  # their memory belongs to the other stream
            copy.record_stream(torch.cuda.current_stream())

    def plain_torch(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def layer_spec(self, config: Any) -> Any:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )

    def packed_attention(
        self, segments_BS: torch.Tensor, responses_BS: torch.Tensor, context_group: Any = None
    ) -> dict[str, Any]:
        from megatron.core.packed_seq_params import PackedSeqParams

        length = segments_BS.shape[1]
        cu_seqlens = segment_bounds(segments_BS).int().pin_memory().to(self.device, non_blocking=True)
        # The longest sequence need only be bounded; a bound that stays the same keeps one table of rope.
        return {
            "attention_mask": None,
            "packed_seq_params": PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_kv=cu_seqlens,
                max_seqlen_q=length,
                max_seqlen_kv=length,
            ),
        }

    def check_fp8(self, recipe: str) -> None:
        check_device(recipe, torch.cuda.get_device_capability())

    def host_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("cpu").pin_memory()

    def engine_options(
        self, memory_fraction: float, cache_bytes: int, quantization: str | None = None
    ) -> dict[str, Any]:
        options = {"gpu_memory_utilization": memory_fraction, "enable_sleep_mode": True}
        return options | ({"quantization": f"fp8_{quantization}"} if quantization else {})

    def load_engine_weights(self, engine: Any, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})

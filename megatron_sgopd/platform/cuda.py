"""Megatron-Core and vLLM on NVIDIA GPUs: NCCL, Transformer Engine layers, packed rows as THD sequences.

Not run on a GPU yet; see the table in the README.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch

from megatron_sgopd.platform.base import Platform


class CudaPlatform(Platform):
    """One process a GPU."""

    name = "cuda"
    several_engines = False  # vLLM's sleep mode allows one in a process
    saves_in_background = True
    environment: ClassVar[dict[str, str]] = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron overlaps communication only in this order of launches
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine shares this process, its device and its weights
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TOKENIZERS_PARALLELISM": "false",
    }
    megatron_flags = ("--distributed-backend=nccl", "--transformer-impl=transformer_engine")

    def install(self) -> None:
        for key, value in self.environment.items():
            os.environ.setdefault(key, value)
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def memory_used(self) -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free

    def layer_spec(self, config: Any) -> Any:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )

    def packed_attention(self, segment_ids_BS: torch.Tensor) -> dict[str, Any]:
        from megatron.core.packed_seq_params import PackedSeqParams

        rows, length = segment_ids_BS.shape
        starts_BS = torch.ones_like(segment_ids_BS, dtype=torch.bool)
        starts_BS[:, 1:] = segment_ids_BS[:, 1:] != segment_ids_BS[:, :-1]
        starts = starts_BS.flatten().nonzero().flatten()
        cu_seqlens = torch.cat([starts, starts.new_tensor([rows * length])]).to(torch.int32)
        longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
        return {
            "attention_mask": None,
            "packed_seq_params": PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_kv=cu_seqlens,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            ),
        }

    def engine_options(self, memory_fraction: float, cache_bytes: int) -> dict[str, Any]:
        return {"gpu_memory_utilization": memory_fraction, "enable_sleep_mode": True}

    @staticmethod
    def refresh_engine_model(model: torch.nn.Module) -> None:
        """Nothing: the engine multiplies by the weights themselves."""

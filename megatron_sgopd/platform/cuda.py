"""Megatron-Core and vLLM on NVIDIA GPUs: NCCL, Transformer Engine layers, packed rows as THD sequences.

Not run on a GPU yet; see the table in the README.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from megatron_sgopd.common.ownership import own_temporary_folder
from megatron_sgopd.errors import Alarm, ConfigError
from megatron_sgopd.fp8 import check_device
from megatron_sgopd.platform.base import Platform
from megatron_sgopd.processes import local_rank
from megatron_sgopd.rollout.packing import segment_bounds

if TYPE_CHECKING:
    from vllm import LLM

_ATTENTION_CAPABILITY = (9, 0)
"""Of GPUs on which Transformer Engine's own attention takes packed rows; on others it would pad each sequence."""
RELOAD_LOG = "vllm.model_executor.model_loader.reload.layerwise"
LAYER_WITHOUT_WEIGHTS = "%s: Failed to load weights"
"""What vLLM logs there of a layer that a reload gave nothing."""
APEX_KERNELS = {
    "fused_weight_gradient_mlp_cuda": "gradients of weights summed in float32 by the product itself",
    "fused_layer_norm_cuda": "norms in one kernel, where Transformer Engine has none",
    "amp_C": "Adam over many tensors in one kernel; Transformer Engine's is used first",
}
"""Compiled modules that Megatron uses of Apex where they are installed, and for what."""


def has_kernel(name: str) -> bool:
    """Whether a package of kernels is installed."""
    return importlib.util.find_spec(name) is not None


def check_precision(precision: str) -> None:
    """Check a recipe's `train.precision`.

    Raises:
        ConfigError: it is not possible on GPUs.
    """
    if precision != "bf16":
        raise ConfigError(
            f"train.precision={precision} is not possible on GPUs, where attention over packed rows is in BF16: let it "
            "be bf16"
        )


class CudaPlatform(Platform):
    """One process a GPU."""

    name = "cuda"
    several_engines = False  # vLLM's sleep mode allows one in a process
    saves_in_background = True
    loads_distributed_optimizer = True
    groups_experts = True
    planned_as = "h100-80g"
    one_long_row = True
    shares_prompts = False  # attention kernels for packed rows know no prefix with branches
    environment: ClassVar[dict[str, str]] = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron overlaps communication only in this order of launches
        "NCCL_GRAPH_REGISTER": "0",  # else NCCL holds the memory of vLLM's CUDA graphs while they are offloaded
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine shares this process, its device and its weights
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",  # else each engine reports itself to vLLM's makers
        "TOKENIZERS_PARALLELISM": "false",
    }
    megatron_flags = (
        "--distributed-backend=nccl",
        "--transformer-impl=transformer_engine",
        "--async-strategy=mcore",  # Megatron's default takes nvidia-resiliency-ext
        "--distributed-timeout-minutes=60",  # ranks load for longer than Megatron's 10; hangs are told by heartbeats
        # Megatron's default, which its output layer refuses without Apex.
        *(() if has_kernel("fused_weight_gradient_mlp_cuda") else ("--no-gradient-accumulation-fusion",)),
    )

    def install(self) -> None:
        for key, value in self.environment.items():
            os.environ.setdefault(key, value)
        if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:  # torch's own name for it can be foretold
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(own_temporary_folder("sgopd-torchinductor"))
        number, seen = local_rank(), torch.cuda.device_count()
        if number >= seen:
            raise ConfigError(
                f"rank {number} of this node sees {seen} GPU{'s' * (seen > 1)}: start as many ranks on a node as it "
                "has GPUs, and let each of them see all (--gpus-per-node, not --gpus-per-task or --gpu-bind)"
            )
        torch.cuda.set_device(number)
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

    def check_training(self, precision: str) -> None:
        check_precision(precision)
        capability = torch.cuda.get_device_capability()
        if capability < _ATTENTION_CAPABILITY and not has_kernel("flash_attn"):
            raise ConfigError(
                f"attention over packed rows needs a GPU of compute capability {_ATTENTION_CAPABILITY}, and this one "
                f"has {capability}: take H100s, or install flash-attn"
            )

    def check_fp8(self, recipe: str) -> None:
        check_device(recipe, torch.cuda.get_device_capability())

    def host_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("cpu").pin_memory()

    def engine_options(
        self, memory_fraction: float, cache_bytes: int, quantization: str | None = None
    ) -> dict[str, Any]:
        options = {
            "dtype": "bfloat16",  # of the trainer's weights, whatever config.json says
            "gpu_memory_utilization": memory_fraction,
            "enable_sleep_mode": True,
            "sleep_mode_offload_cudagraph": True,
        }
        return options | ({"quantization": f"fp8_{quantization}"} if quantization else {})

    def load_engine_weights(self, engine: Any, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        reload_weights(engine, weights)


def reload_weights(engine: LLM, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Replace the weights of a vLLM engine, quantized anew where it quantizes.

    vLLM only logs the layers that were given none and keep what they had: for those of a rope, and for an output layer
    that is the embedding, that is as it should be.

    Raises:
        Alarm: another layer was given none.
    """
    tied = engine.llm_engine.vllm_config.model_config.hf_text_config.tie_word_embeddings
    given_none: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        if record.msg != LAYER_WITHOUT_WEIGHTS:
            return True
        assert isinstance(record.args, tuple)
        given_none.append(str(record.args[0]))
        return False

    log = logging.getLogger(RELOAD_LOG)
    level = log.level
    log.addFilter(note)
    log.setLevel(logging.WARNING)  # VLLM_LOGGING_LEVEL may hide them
    try:
        engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    finally:
        log.removeFilter(note)
        log.setLevel(level)
    without = ("RotaryEmbedding", "LMHead") if tied else ("RotaryEmbedding",)
    if left_out := sorted({name for name in given_none if not name.endswith(without)}):
        raise Alarm(
            f"weight sync: layers of the rollout engine got no weights and keep old ones ({', '.join(left_out)}): "
            "rollouts would come from a wrong policy. Check the model's entry in the weight table."
        )

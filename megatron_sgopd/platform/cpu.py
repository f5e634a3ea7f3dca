"""Megatron-Core and vLLM on CPUs: gloo for NCCL, host memory for device memory, torch's own attention.

Megatron names the device `cuda` in many places and offers no switch. Everything that stands in for it is
here, one line of reason each, and is installed only when the CPU platform was selected.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import psutil
import torch
from torch.overrides import TorchFunctionMode

from megatron_sgopd.common.ownership import own_temporary_folder
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.platform.base import Platform
from megatron_sgopd.rollout.packing import context_columns

CPU = torch.device("cpu")
_KERNELS_OF_GPUS = ("transformer_engine", "apex", "amp_C")
"""Packages whose kernels Megatron would take for tensors on the host, in norms, routers and optimizers, if they were
installed: a conversion, say, runs on the CPU in the environment of a GPU."""


class CpuPlatform(Platform):
    """One or several processes on CPU cores."""

    name = "cpu"
    several_engines = True
    saves_in_background = False
    loads_distributed_optimizer = False  # torch's Adam has no state before its first step, which Megatron asserts
    groups_experts = False
    planned_as = "cpu-core"
    one_long_row = False
    shares_prompts = True
    environment: ClassVar[dict[str, str]] = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron asserts it with tensor parallelism
        "TORCHDYNAMO_DISABLE": "1",  # torch.compile inside vLLM's sampler fails under the device redirection
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine shares this process and its weights
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # ranks of one machine must not be bound to the same cores
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; read at import, replaced by the exact size in engine_options
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",  # else each engine reports itself to vLLM's makers
        "THP_MEM_ALLOC_ENABLE": "1",  # large tensors on huge pages: a weight sync is a tenth faster
        "TOKENIZERS_PARALLELISM": "false",
    }
    megatron_flags = (
        "--distributed-backend=gloo",
        "--transformer-impl=local",
        "--use-cpu-initialization",
        "--no-gradient-accumulation-fusion",
        "--no-bias-swiglu-fusion",
        "--no-bias-dropout-fusion",
        "--no-rope-fusion",
        "--no-masked-softmax-fusion",
        "--no-persist-layer-norm",
        "--attention-backend=unfused",
    )

    def install(self) -> None:
        for key, value in self.environment.items():
            os.environ.setdefault(key, value)
        if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:  # torch's own name for it can be foretold
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(own_temporary_folder("sgopd-torchinductor"))
        for package in _KERNELS_OF_GPUS:
            sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # so that importing it fails
        _keep_freed_memory()
        _redirect_devices()
        _replace_cuda_runtime()
        _adapt_megatron()

    @property
    def device(self) -> torch.device:
        return CPU

    def memory_used(self) -> int:
        return psutil.Process().memory_info().rss

    def reset_peak_memory(self) -> None:
        with contextlib.suppress(OSError):  # some containers forbid it; the peak is then that of the whole run
            Path("/proc/self/clear_refs").write_text("5")

    def peak_memory(self) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    def free_cached_memory(self) -> None:
        """Nothing: the host's memory is everybody's."""

    def copying(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def wait_for_copies(self, copies: Sequence[torch.Tensor]) -> None:
        """They are the host's own tensors."""

    def plain_torch(self) -> contextlib.AbstractContextManager[None]:
        return torch._C.DisableTorchFunction()  # the detour of `_CudaMeansCpu` takes microseconds a call

    def layer_spec(self, config: Any) -> Any:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        spec = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
            normalization=config.normalization,
        )
        spec.submodules.self_attention.submodules.core_attention = _sdpa_attention_class()
        return spec

    def packed_attention(
        self, segments_BS: torch.Tensor, responses_BS: torch.Tensor, context_group: Any = None
    ) -> dict[str, Any]:
        rank, ranks = (0, 1) if context_group is None else (context_group.rank(), context_group.size())
        columns_CBL = context_columns(segments_BS, ranks)
        queries_BL = columns_CBL[rank]
        keys_BS = columns_CBL.transpose(0, 1).reshape(segments_BS.shape)  # as `SdpaAttention` gathers them
        segment_BL, response_BL = segments_BS.gather(1, queries_BL), responses_BS.gather(1, queries_BL)
        segment_BS, response_BS = segments_BS.gather(1, keys_BS), responses_BS.gather(1, keys_BS)
        seen_BLS = segment_BL[:, :, None] == segment_BS[:, None, :]
        seen_BLS &= (response_BL[:, :, None] == response_BS[:, None, :]) | (response_BS == 0)[:, None, :]
        seen_BLS &= queries_BL[:, :, None] >= keys_BS[:, None, :]
        return {"attention_mask": ~seen_BLS[:, None], "packed_seq_params": None}

    def check_training(self, precision: str) -> None:
        """Either works."""

    def check_fp8(self, recipe: str) -> None:
        raise ConfigError(f"FP8 recipe {recipe} needs a GPU and Transformer Engine: leave it out on the CPU platform")

    def host_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor  # it is there

    def engine_options(
        self, memory_fraction: float, cache_bytes: int, quantization: str | None = None
    ) -> dict[str, Any]:
        if quantization is not None:
            raise ConfigError(f"fp8.rollouts={quantization} needs a GPU: leave it out on the CPU platform")
        _adapt_vllm()
        return {
            "enforce_eager": True,
            "kv_cache_memory_bytes": cache_bytes,
            "dtype": "float32",
            # A seeded request whose prompt is prefilled in pieces rewinds its generator: CUDA generators only.
            "enable_chunked_prefill": False,
        }

    def load_engine_weights(self, engine: Any, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        engine.apply_model(lambda model: model.load_weights(weights))


def _keep_freed_memory() -> None:
    """Let the next tensor of some MiB have the pages of the last one, whose first touch costs more than filling them.

    glibc would give them back to the kernel, as CUDA's caching allocator does not.
    """
    mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3  # malloc.h
    mallopt(mmap_threshold, 32 << 20)  # the most that it takes
    mallopt(trim_threshold, 256 << 20)


class _CudaMeansCpu(TorchFunctionMode):
    """Megatron creates and moves tensors with device="cuda"; here that is host memory."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and (isinstance(device, int) or str(device).startswith("cuda")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # for whose copy to a GPU there is none
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


def _names_cuda(value: Any) -> bool:
    return isinstance(value, (str, torch.device)) and str(value).startswith("cuda")


def _redirect_devices() -> None:
    _CudaMeansCpu().__enter__()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]  # already in place
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]  # likewise
    torch.Tensor.record_stream = lambda self, s: None  # type: ignore[method-assign]  # no streams

    # Megatron compares Tensor.type() with CUDA names; torch dispatches the method to its patched self again.
    original_type = torch.Tensor.type

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name_or_tensor = original_type(self, *args, **kwargs)
        if not isinstance(name_or_tensor, str) or ".cuda." in name_or_tensor:
            return name_or_tensor
        return name_or_tensor.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = tensor_type  # type: ignore[method-assign, assignment]


class _Stream:
    """CPU work is synchronous: a stream or event has nothing to wait for."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def record_event(self, *args: Any) -> _Stream:
        return self

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _replace_cuda_runtime() -> None:
    stream = _Stream()

    # Every entry is a function of its own: torch._dynamo keeps rules by identity and refuses duplicates.
    def nothing() -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def resident_bytes() -> Callable[..., int]:
        return lambda *args, **kwargs: psutil.Process().memory_info().rss

    replacements: dict[str, Any] = {
        # The "device" of a rank.
        "current_device": lambda: CPU,
        "set_device": nothing(),
        "is_available": lambda: False,  # torch itself would conclude from device_count that there is a GPU
        "device_count": lambda: 1,  # Megatron builds its process groups only where there is a device
        "get_device_properties": lambda *args: SimpleNamespace(
            total_memory=psutil.virtual_memory().total, multi_processor_count=1, name="cpu", major=0, minor=0
        ),
        "get_device_capability": lambda *args: (0, 0),
        # Streams and synchronization: nothing runs behind our back.
        "synchronize": nothing(),
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": lambda *args: stream,
        "default_stream": lambda *device: stream,
        "set_stream": nothing(),
        "stream": lambda *args: contextlib.nullcontext(),
        # Memory reports speak of this process.
        "empty_cache": nothing(),
        "memory_allocated": resident_bytes(),
        "max_memory_allocated": resident_bytes(),
        "memory_reserved": resident_bytes(),
        "max_memory_reserved": resident_bytes(),
        "memory_stats": lambda *args, **kwargs: {
            "allocated_bytes.all.current": psutil.Process().memory_info().rss,
            "allocated_bytes.all.peak": psutil.Process().memory_info().rss,
            "allocation.all.current": 0,
        },
        "reset_peak_memory_stats": nothing(),
        # The generator that Megatron seeds, forks and saves.
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.manual_seed(seed),
        # Tensor constructors that predate device=.
        "FloatTensor": torch.FloatTensor,
        "IntTensor": torch.IntTensor,
        "LongTensor": torch.LongTensor,
        "ByteTensor": torch.ByteTensor,
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)


def _adapt_megatron() -> None:
    import megatron.core.tensor_parallel.random as tensor_parallel_random

    # These reach into the CUDA generator object itself.
    tensor_parallel_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    tensor_parallel_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    import megatron.training.training as training

    initialize_megatron = training.initialize_megatron

    @functools.wraps(initialize_megatron)
    def initialize_without_cuda(*args: Any, **kwargs: Any) -> Any:
        return initialize_megatron(*args, allow_no_cuda=True, **kwargs)

    training.initialize_megatron = initialize_without_cuda  # its own switch, which pretrain() does not pass on

    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def host_copy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    # Its own makes arrays of GPU tensors only, and torch's all-to-all takes no tensor of split sizes.
    token_dispatcher.maybe_move_tensor_to_cpu = host_copy


def _adapt_vllm() -> None:
    """Called when an engine is built: a process without one is spared the seconds that importing vLLM takes.

    Raises:
        ConfigError: it is the vLLM for GPUs.
    """
    from vllm import _custom_ops
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise ConfigError(
            "vLLM is installed for GPUs here, and none is seen: run this where there is one, or in the environment of "
            "`make setup`"
        )
    # Else linear layers multiply by packed copies of their weights, to be made anew at each sync.
    _custom_ops._supports_onednn = False
    # Else, with AVX-512, ranks sum over shared memory whose name is the same for all runs on a machine: no second one
    # starts beside the first, nor after one that was killed. Without it they use gloo.
    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False


def _sdpa_attention_class() -> type:
    """Torch's attention kernel in the place of Megatron's unfused one, which writes out all scores.

    Nor does Megatron's know context parallelism: this one gathers the keys and values of all ranks.
    """
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
    from megatron.core.transformer.module import MegatronModule
    from torch.nn.functional import scaled_dot_product_attention

    class SdpaAttention(MegatronModule):
        def __init__(self, config: Any, *, pg_collection: Any, softmax_scale: float | None = None, **_: Any) -> None:
            super().__init__(config=config)
            self._context_group = pg_collection.cp
            self._scale = softmax_scale

        def forward(
            self,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None,
            **kwargs: Any,
        ) -> torch.Tensor:
            """[L, B, heads, head_dim] each -> [L, B, heads * head_dim].

            True in the mask [B, 1, L, S] hides one of the positions of all ranks, in the ranks' order.
            """
            if self._context_group.size() > 1:
                key, value = (
                    gather_from_sequence_parallel_region(tensor, group=self._context_group) for tensor in (key, value)
                )
            query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
            context = scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=None if attention_mask is None else ~attention_mask,
                is_causal=attention_mask is None,
                scale=self._scale,
                enable_gqa=key.shape[1] != query.shape[1],
            )
            return context.permute(2, 0, 1, 3).flatten(2)

    return SdpaAttention

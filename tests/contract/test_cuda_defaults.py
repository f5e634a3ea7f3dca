"""Defaults and behaviours that the way over a GPU relies on, read where there is none: a version that changes one is
seen on a CPU.

Most are read from the text of the installed packages, which the CPU's and CUDA's wheels share; what a configuration
object can be asked is asked. Transformer Engine's rows need it installed: `make test-te`, `make test-gpu-stack`.
"""

import importlib.util
import logging
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sgopd.platform.cuda import LAYER_WITHOUT_WEIGHTS, RELOAD_LOG, CudaPlatform

TRANSFORMER_ENGINE = importlib.util.find_spec("transformer_engine") is not None

# What is relied on; a file of an installed package; a pattern of its text.
TABLE = {
    # ---- vLLM: process groups and scheduling ------------------------------------------------------------
    "replicas are groups of their own, of consecutive ranks": (
        "vllm/distributed/parallel_state.py",
        r"ExternalDP x DP x PP x PCP x TP",
    ),
    "Megatron's process group is kept": (
        "vllm/distributed/parallel_state.py",
        r"if not torch\.distributed\.is_initialized\(\):",
    ),
    "collectives of replicas only where vLLM knows of them": (
        "vllm/v1/engine/llm_engine.py",
        r"self\.external_launcher_dp = \(\s+parallel_config\.data_parallel_size > 1",
    ),
    "all ranks build their engines together: the smallest cache is everybody's": (
        "vllm/v1/executor/uniproc_executor.py",
        r"get_world_group\(\)\.cpu_group.*ReduceOp\.MIN",
    ),
    "model runner V2 where there is Triton": ("vllm/config/vllm.py", r"if not HAS_TRITON:.{0,200}return False"),
    "asynchronous scheduling unless something forbids it": (
        "vllm/config/vllm.py",
        r"else:\s+self\.scheduler_config\.async_scheduling = True",
    ),
    "none of it on a CPU": ("vllm/platforms/cpu.py", r"scheduler_config\.async_scheduling = False"),
    "process groups are not split off the default one": (
        "vllm/envs.py",
        r'os\.getenv\("VLLM_DISTRIBUTED_USE_SPLIT_GROUP", "0"\)',
    ),
    # ---- vLLM: sleep ------------------------------------------------------------------------------------
    "sleep keeps what is neither weights nor cache": (
        "vllm/device_allocator/sleep_mode_backend.py",
        r'offload_tags: tuple\[str, \.\.\.\] = \("runtime", "cudagraph"\)\s+if level == 1:',
    ),
    "buffers come back after level 2, and nothing else": (
        "vllm/v1/worker/gpu_worker.py",
        r"_sleep_saved_buffers = \{\s+name: buffer\.cpu\(\)\.clone\(\) for name, buffer in model\.named_buffers\(\)",
    ),
    "graphs that are offloaded are not registered with the other ranks": (
        "vllm/distributed/device_communicators/cuda_communicator.py",
        r"register = config is None or not config\.use_cumem_cudagraph_pool",
    ),
    "graphs that are offloaded want NCCL to leave them alone": (
        "vllm/config/vllm.py",
        r'setdefault\("NCCL_GRAPH_REGISTER", "0"\)',
    ),
    "the cache hangs on the attention layer by this name": (
        "vllm/model_executor/layers/attention/attention.py",
        r"self\.kv_cache = torch\.tensor\(\[\]\)",
    ),
    # ---- vLLM: weights ----------------------------------------------------------------------------------
    "a layer without weights is only logged": (
        "vllm/model_executor/model_loader/reload/layerwise.py",
        re.escape(f'logger.warning("{LAYER_WITHOUT_WEIGHTS}", layer.__class__.__name__)'),
    ),
    "a layer is quantized anew when it is complete": (
        "vllm/model_executor/model_loader/reload/layerwise.py",
        r"if info\.load_numel >= info\.load_numel_total:.{0,60}_layerwise_process\(layer, info\)",
    ),
    "names of quantizations": (
        "vllm/model_executor/layers/quantization/__init__.py",
        r'"fp8_per_tensor",\s+"fp8_per_block",',
    ),
    "blocks are 128 long, and sizes multiples of that": (
        "vllm/model_executor/layers/quantization/utils/fp8_utils.py",
        r"assert x\.shape\[-1\] % group_size == 0",
    ),
    # ---- vLLM: what it says of tokens -------------------------------------------------------------------
    "seeds are a request's own": ("vllm/v1/worker/gpu/sample/states.py", r"seed = sampling_params\.seed"),
    "log-probs after the temperature": (
        "vllm/v1/worker/gpu/sample/sampler.py",
        r"if self\.logprobs_mode in PROCESSED_LOGPROBS_MODES:",
    ),
    "with logprobs=0 the sampled token's alone": (
        "vllm/v1/worker/gpu/sample/logprob.py",
        r"logprob_token_ids = sampled_token_ids\.unsqueeze\(-1\)\s+if num_logprobs > 0:",
    ),
    "sequences decoded at once, as the planner counts them": (
        "vllm/engine/arg_utils.py",
        r"UsageContext\.LLM_CLASS: 1024",
    ),
    # ---- Megatron-Core ----------------------------------------------------------------------------------
    "norm of the last layer: Transformer Engine's wherever it can be imported": (
        "megatron/core/transformer/transformer_block.py",
        r"if HAVE_TE:.{0,200}LayerNormImpl = TENorm",
    ),
    "Adam: Transformer Engine's, else Apex', else torch's": (
        "megatron/core/optimizer/__init__.py",
        r"transformer_engine\.pytorch\.optimizers import FusedAdam as Adam.*apex\.optimizers.*USING_PYTORCH_OPTIM",
    ),
    "a distributed optimizer of torch's Adam wants a step before it loads": (
        "megatron/core/optimizer/distrib_optimizer.py",
        r"if not HAVE_APEX_OR_TE:\s+steps = .{0,120}assert len\(steps\) == 1",
    ),
    "saves in the background fork a process, unless it is there": (
        "megatron/training/async_utils.py",
        r'get_write_results_queue\(mp_mode="fork"\)',
    ),
    "and keep the one that is there": (
        "megatron/core/dist_checkpointing/strategies/filesystem_async.py",
        r"if _results_queue is None:",
    ),
    "packed rows: a mask that pads": (
        "megatron/core/extensions/transformer_engine.py",
        r"if attn_mask_type == AttnMaskType\.causal:\s+attn_mask_type = AttnMaskType\.padding_causal",
    ),
    "weights are cast to FP8 once a step": (
        "megatron/core/pipeline_parallel/schedules.py",
        r"if is_first_microbatch and hasattr\(model, 'set_is_first_microbatch'\):",
    ),
    "the output layer refuses fused gradients without Apex": (
        "megatron/core/tensor_parallel/layers.py",
        r"if config\.gradient_accumulation_fusion and not _grad_accum_fusion_available:\s+raise",
    ),
    # ---- Transformer Engine -----------------------------------------------------------------------------
    "delayed scales are pickled into checkpoints": (
        "transformer_engine/pytorch/_extra_state.py",
        r'"DelayedScaling"\): CheckpointExtraStatePolicy\.STATEFUL_FP8_DELAYED_SCALING',
    ),
    "current scales leave nothing there": (
        "transformer_engine/pytorch/_extra_state.py",
        r'"Float8CurrentScaling"\): CheckpointExtraStatePolicy\.STATELESS',
    ),
    "nor do block scales": (
        "transformer_engine/pytorch/_extra_state.py",
        r'"Float8BlockScaling"\): CheckpointExtraStatePolicy\.STATELESS',
    ),
    "pickled state is refused unless a variable allows it": (
        "transformer_engine/pytorch/_extra_state.py",
        r'os\.getenv\(UNSAFE_PICKLE_EXTRA_STATE_ENV, "0"\) == "1"',
    ),
    "products in FP8 need sizes of 16": ("transformer_engine/pytorch/utils.py", r"tensor\.shape\[-1\] % 16 != 0"),
    "copies of weights in FP8 lie here": ("transformer_engine/pytorch/module/base.py", r"self\._fp8_workspaces: Dict"),
    "Megatron 0.19 finds FP8 here": ("transformer_engine/pytorch/fp8.py", r"FP8GlobalStateManager"),
}


def folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def text_of(path: str) -> str:
    """A file of an installed package, which need not be importable."""
    package, _, rest = path.partition("/")
    return (folder_of(package) / rest).read_text()


@pytest.mark.parametrize("relied_on", TABLE)
def test_what_is_relied_on_still_stands_there(relied_on: str) -> None:
    path, pattern = TABLE[relied_on]
    if path.startswith("transformer_engine") and not TRANSFORMER_ENGINE:
        pytest.skip("needs Transformer Engine: make test-te")
    assert re.search(pattern, text_of(path), re.S), f"{path} has no {pattern!r} any more"


def test_an_engine_of_an_external_launcher_has_no_replicas_unless_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import ParallelConfig
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    monkeypatch.setenv("RANK", "3")
    alone = ParallelConfig(tensor_parallel_size=2, distributed_executor_backend="external_launcher")
    assert (alone.world_size, alone.data_parallel_size) == (2, 1)
    told = ParallelConfig(
        tensor_parallel_size=2, data_parallel_size=2, distributed_executor_backend="external_launcher"
    )
    assert (told.world_size, told.data_parallel_rank) == (4, 1), "else leaving it out would change nothing"
    assert ExecutorWithExternalLauncher.supports_async_scheduling(), "by which replicas would fall out of step"


def test_the_engines_options_are_options_and_offload_its_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.platforms
    from vllm.config import CUDAGraphMode, ModelConfig, VllmConfig
    from vllm.device_allocator import DEFERRABLE_TAGS
    from vllm.engine.arg_utils import EngineArgs

    options = CudaPlatform().engine_options(0.5, 0, "per_block")
    assert options.keys() <= EngineArgs.__dataclass_fields__.keys()
    assert not EngineArgs.sleep_mode_offload_cudagraph and not EngineArgs.enable_sleep_mode, (
        "on by default: leave it out"
    )
    assert DEFERRABLE_TAGS == ("weights", "kv_cache"), "the parts that are waked one by one"
    monkeypatch.setattr(type(vllm.platforms.current_platform), "is_cuda_alike", lambda self: True)
    model = SimpleNamespace(sleep_mode_backend=ModelConfig.sleep_mode_backend, **options)
    config: Any = SimpleNamespace(
        model_config=model, compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE)
    )
    assert VllmConfig.use_cumem_cudagraph_pool.fget(config)
    assert CudaPlatform.environment["NCCL_GRAPH_REGISTER"] == "0"


def test_an_engines_dtype_would_follow_the_folder() -> None:
    import torch
    from vllm.config.model import _resolve_auto_dtype

    assert _resolve_auto_dtype("llama", torch.float16, is_pooling_model=False) == torch.float16
    assert CudaPlatform().engine_options(0.5, 0)["dtype"] == "bfloat16"


def test_vllm_logs_by_the_names_of_its_modules() -> None:
    assert importlib.util.find_spec("vllm") is not None
    assert "logger = init_logger(__name__)" in text_of(RELOAD_LOG.replace(".", "/") + ".py")
    assert logging.getLogger(RELOAD_LOG).name.startswith("vllm.")


PARSE = """
import sys
from megatron_sgopd.platform import select
select("cpu")
from megatron.training.arguments import add_megatron_arguments
import argparse
parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
for flags in ([], sys.argv[1:]):
    print(vars(parser.parse_args(flags)))
"""


@pytest.fixture(scope="module")
def parsed() -> list[str]:
    """What Megatron's own parser makes of no flags, and of the CUDA platform's."""
    words = [sys.executable, "-c", PARSE, *CudaPlatform.megatron_flags]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("name", "default", "ours"),
    [
        ("async_strategy", "'nvrx'", "'mcore'"),
        ("distributed_timeout_minutes", "10", "60"),
        ("transformer_impl", "'transformer_engine'", "'transformer_engine'"),
        ("distributed_backend", "'nccl'", "'nccl'"),
        ("ckpt_fully_parallel_save", "True", "True"),
        ("ckpt_fully_parallel_load", "False", "False"),  # the recipes ask for it
        ("fp8_recipe", "'delayed'", "'delayed'"),  # fp8.py never leaves it to Megatron
        ("moe_grouped_gemm", "False", "False"),  # provider.py sets it for scorers
        ("apply_rope_fusion", "True", "True"),
        ("bias_swiglu_fusion", "True", "True"),
    ],
)
def test_megatrons_defaults_and_what_the_platform_makes_of_them(
    name: str, default: str, ours: str, parsed: list[str]
) -> None:
    for said, expected in zip(parsed, (default, ours), strict=True):
        assert f"'{name}': {expected}," in said, re.search(rf"'{name}': [^,]*", said)


@pytest.mark.skipif(not TRANSFORMER_ENGINE, reason="needs Transformer Engine: make test-gpu-stack")
def test_transformer_engine_refuses_delayed_scales_of_a_checkpoint() -> None:
    if not list(folder_of("transformer_engine").glob("wheel_lib/transformer_engine_torch*.so")):
        pytest.skip("needs its compiled module: make test-gpu-stack")
    from transformer_engine.common.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling
    from transformer_engine.pytorch._extra_state import is_stateless_recipe, should_load_extra_state_pickle

    assert is_stateless_recipe(Float8CurrentScaling()) and is_stateless_recipe(Float8BlockScaling())
    state = pickle.dumps({"recipe": DelayedScaling(), "scale_fwd": 1.0})
    with pytest.raises(RuntimeError, match="NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"):
        should_load_extra_state_pickle(state, "a layer")


@pytest.mark.skipif(not TRANSFORMER_ENGINE, reason="needs Transformer Engine: make test-gpu-stack")
def test_attention_over_packed_rows_needs_an_h100() -> None:
    library = folder_of("transformer_engine") / "wheel_lib/libtransformer_engine.so"
    if not library.is_file():
        pytest.skip("needs its library: make test-gpu-stack")
    assert b"fused attention with THD format requires sm90 or later" in library.read_bytes()

"""The places where the rollout engine touches vLLM still have the shape that it relies on."""

import inspect

import vllm
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.core_client import InprocClient
from vllm.v1.worker.gpu_worker import Worker


def test_sampling_parameters_have_seeds_and_flat_logprobs():
    parameters = vllm.SamplingParams(seed=1, logprobs=0, flat_logprobs=True, detokenize=False)
    assert parameters.seed == 1 and parameters.flat_logprobs


def test_the_engine_takes_a_log_prob_mode_and_an_external_launcher():
    fields = vllm.EngineArgs.__dataclass_fields__
    assert {"logprobs_mode", "distributed_executor_backend", "data_parallel_size", "kv_cache_memory_bytes"} <= set(
        fields
    )
    assert (
        "processed_logprobs" in str(fields["logprobs_mode"].type) or fields["logprobs_mode"].default == "raw_logprobs"
    )


def test_weights_are_reloaded_from_an_iterator():
    assert (
        "weights_iterator" in inspect.getsource(Worker.reload_weights)
        or "kwargs" in inspect.signature(Worker.reload_weights).parameters
    )


def test_shutdown_destroys_the_default_process_group_so_its_finalizer_is_detached():
    # Once vLLM leaves the group alone, RolloutEngine.close() can call shutdown() instead.
    assert "cleanup_dist_env_and_memory()" in inspect.getsource(EngineCore.shutdown)
    assert "self._finalizer = weakref.finalize(self, self.engine_core.shutdown)" in inspect.getsource(
        InprocClient.__init__
    )


def test_without_onednn_linear_layers_on_a_cpu_multiply_by_the_weights_they_were_given():
    *_, fallback = inspect.getsource(dispatch_cpu_unquantized_gemm).partition("ops._supports_onednn")
    assert "torch.nn.functional.linear(\n        x, weight, bias\n    )" in fallback


def test_ranks_of_a_cpu_engine_use_gloo_where_they_do_not_share_a_name():
    source = inspect.getsource(CpuCommunicator.__init__)
    assert source.index("self.dist_module = torch.distributed") < source.index(
        "_all_group_ranks_share_shm_group_name()"
    )
    assert source.index("_all_group_ranks_share_shm_group_name()") < source.index("= _CPUSHMDistributed(self)")

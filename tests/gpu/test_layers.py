"""Transformer Engine's layers compute what transformers does, packed or not, in BF16 and FP8."""

from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_ranks
from megatron_models import base_config

BF16_GAP = 0.05
"""Mean difference of log-probs that BF16 makes in models of this size."""


def scored(
    models: str, name: str, fp8_recipe: str | None = None, offload: bool = False, context: int = 1
) -> tuple[Any, Any, Any]:
    """A scorer on this rank's GPU, rows of seven random responses, and their log-probs by it."""
    import torch.distributed as dist

    from megatron_sgopd import platform
    from megatron_sgopd.models.architecture import read_architecture
    from megatron_sgopd.rollout.packing import pack
    from megatron_sgopd.rollout.prompts import Prompt
    from megatron_sgopd.rollout.trajectory import Trajectory

    platform.select("cuda")
    dist.init_process_group("nccl")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_sgopd.models.scorer import Scorer

    parallel_state.initialize_model_parallel(1, context_parallel_size=context)
    model_parallel_cuda_manual_seed(1)
    generator = torch.Generator().manual_seed(0)
    prompt = Prompt("p", "", (1, 2, 3), "", "", {})
    drawn = [tuple(torch.randint(0, 250, (n,), generator=generator).tolist()) for n in (5, 30, 61, 17, 40, 2, 9)]
    trajectories = [Trajectory(prompt, i, t, (0.0,) * len(t), False) for i, t in enumerate(drawn)]
    rows = pack(trajectories, 64, 1, 2, False, context)
    fields = {"bf16": True, "params_dtype": torch.bfloat16, "use_cpu_initialization": False}
    base = base_config(**fields, context_parallel_size=context)
    architecture = read_architecture(Path(models) / name)
    scorer = Scorer(architecture, base, 1, 1, offload, 0, fp8_recipe=fp8_recipe)
    if scorer.hosted is not None:
        scorer.hosted.fetch("weights")
        scorer.hosted.ready()
    logprobs_T, _ = scorer.score(rows, 1.0)
    return scorer, rows, (logprobs_T[rows.trajectory_order()], [prompt.token_ids + t for t in drawn])


def compare_with_transformers(models: str, name: str, context: int) -> None:
    from transformers import AutoModelForCausalLM

    _, _, (logprobs_T, sequences) = scored(models, name, context=context)
    model = AutoModelForCausalLM.from_pretrained(Path(models) / name, dtype=torch.float32)
    expected = []
    for sequence in sequences:
        tokens = torch.tensor([sequence])
        with torch.no_grad():
            all_logprobs = model(tokens).logits[0, :-1].log_softmax(-1)
        expected.append(all_logprobs.gather(1, tokens[0, 1:, None])[2:, 0])
    assert (logprobs_T - torch.cat(expected)).abs().mean() < BF16_GAP


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "qwen3", "mistral", "qwen3_moe"])
def test_packed_rows_give_the_logprobs_of_transformers(tiny_models: dict[str, Path], name: str) -> None:
    """Proves THD packing, two rows to a microbatch, rope that restarts, fused layers' weights and the output layer."""
    run_ranks(1, compare_with_transformers, str(tiny_models[name].parent), name, 1)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["llama_tied", "qwen3", "qwen3_moe"])
def test_rows_that_two_gpus_share_give_the_logprobs_of_transformers(tiny_models: dict[str, Path], name: str) -> None:
    """Proves context parallelism of THD rows: each rank's two chunks of a sequence, their rope, and ring attention."""
    run_ranks(2, compare_with_transformers, str(tiny_models[name].parent), name, 2)


def compare_recipes(models: str, recipe: str) -> None:
    from megatron_sgopd.fp8 import prove_fp8

    scorer, _, (fp8_T, _) = scored(models, "llama_untied", recipe)
    prove_fp8(scorer.model)
    assert torch.isfinite(fp8_T).all()


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_a_scorer_in_fp8_multiplies_in_fp8(tiny_models: dict[str, Path], recipe: str) -> None:
    """Proves that Megatron's context reaches every layer, and that `prove_fp8` reads the layers' state right."""
    run_ranks(1, compare_recipes, str(tiny_models["llama_untied"].parent), recipe)


def release_and_fetch(models: str) -> None:
    scorer, rows, _ = scored(models, "llama_untied", offload=True)
    assert scorer.hosted is not None
    first, _ = scorer.score(rows, 1.0)
    scorer.hosted.release()
    torch.cuda.synchronize()
    assert all(parameter.device.type == "cpu" for parameter in scorer.model.parameters())
    scorer.hosted.fetch("weights")
    scorer.hosted.ready()
    again, _ = scorer.score(rows, 1.0)
    assert torch.equal(first, again)


def test_weights_that_left_the_gpu_come_back_as_they_were(tiny_models: dict[str, Path]) -> None:
    """Proves pinned copies, the copy stream's order, and that nothing reads weights before they have arrived."""
    run_ranks(1, release_and_fetch, str(tiny_models["llama_untied"].parent))

"""The platform's layers compute what transformers does, packed or not, split or not, and in FP8."""

from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_ranks
from megatron_models import base_config

from .conftest import Where


def scored(
    platform_name: str,
    models: str,
    name: str,
    split: tuple[int, int, int] = (1, 1, 1),
    fp8_recipe: str | None = None,
    offload: bool = False,
    row_tokens: int = 64,
) -> tuple[Any, Any, Any]:
    """A scorer on this rank's device, rows of seven random responses, and their log-probs by it.

    Args:
        split: tensor, pipeline and context parallel sizes.
    """
    import torch.distributed as dist

    from megatron_sgopd import platform
    from megatron_sgopd.models.architecture import read_architecture
    from megatron_sgopd.rollout.packing import pack
    from megatron_sgopd.rollout.prompts import Prompt
    from megatron_sgopd.rollout.trajectory import Trajectory

    on_gpu = platform.select(platform_name).name == "cuda"  # type: ignore[arg-type]
    dist.init_process_group("nccl" if on_gpu else "gloo")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_sgopd.models.scorer import Scorer

    tensor, pipeline, context = split
    parallel_state.initialize_model_parallel(tensor, pipeline, context_parallel_size=context)
    model_parallel_cuda_manual_seed(1)
    generator = torch.Generator().manual_seed(0)
    prompt = Prompt("p", "", (1, 2, 3), "", "", {})
    drawn = [tuple(torch.randint(0, 250, (n,), generator=generator).tolist()) for n in (5, 30, 61, 17, 40, 2, 9)]
    trajectories = [Trajectory(prompt, i, t, (0.0,) * len(t), False) for i, t in enumerate(drawn)]
    rows = pack(trajectories, row_tokens, 1, 2, False, context)
    fields: dict[str, Any] = {"tensor_model_parallel_size": tensor, "context_parallel_size": context}
    fields["num_attention_heads"] = 4
    if on_gpu:
        fields |= {"bf16": True, "params_dtype": torch.bfloat16, "use_cpu_initialization": False}
        fields["sequence_parallel"] = tensor > 1
    architecture = read_architecture(Path(models) / name)
    scorer = Scorer(architecture, base_config(**fields), tensor, pipeline, offload, 0, fp8_recipe=fp8_recipe)
    if scorer.hosted is not None:
        scorer.hosted.fetch("weights")
        scorer.hosted.ready()
    logprobs_T, _ = scorer.score(rows, 1.0)
    return scorer, rows, (logprobs_T[rows.trajectory_order()], [prompt.token_ids + t for t in drawn])


def compare_with_transformers(
    platform_name: str, models: str, name: str, split: tuple[int, int, int], gap: float
) -> None:
    from transformers import AutoModelForCausalLM

    _, _, (logprobs_T, sequences) = scored(platform_name, models, name, split)
    model = AutoModelForCausalLM.from_pretrained(Path(models) / name, dtype=torch.float32)
    expected = []
    for sequence in sequences:
        tokens = torch.tensor([sequence])
        with torch.no_grad():
            all_logprobs = model(tokens).logits[0, :-1].log_softmax(-1)
        expected.append(all_logprobs.gather(1, tokens[0, 1:, None])[2:, 0])
    assert (logprobs_T - torch.cat(expected)).abs().mean() < gap


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "qwen3", "mistral", "qwen3_moe"])
def test_packed_rows_give_the_logprobs_of_transformers(tiny_models: dict[str, Path], name: str, where: Where) -> None:
    """Proves packing, two rows to a microbatch, rope that restarts, the weights of all layers and the output layer: on
    a GPU of THD rows and fused layers."""
    arguments = (where.name, str(tiny_models[name].parent), name, (1, 1, 1), where.gap)
    run_ranks(1, compare_with_transformers, *arguments)


@pytest.mark.parametrize("name", ["llama_tied", "qwen3", "qwen3_moe"])
def test_rows_that_two_ranks_share_give_the_logprobs_of_transformers(
    tiny_models: dict[str, Path], name: str, where: Where
) -> None:
    """Proves context parallelism: each rank's two chunks of a sequence and their rope, on a GPU by ring attention."""
    where.need(2)
    arguments = (where.name, str(tiny_models[name].parent), name, (1, 1, 2), where.gap)
    run_ranks(2, compare_with_transformers, *arguments)


@pytest.mark.parametrize("split", [(2, 1, 1), (2, 2, 1)])
def test_a_scorer_that_ranks_share_gives_the_logprobs_of_transformers(
    tiny_models: dict[str, Path], split: tuple[int, int, int], where: Where
) -> None:
    """Proves a teacher's tensor and pipeline parallelism, on a GPU with sequence parallelism."""
    ranks = split[0] * split[1]
    where.need(ranks)
    arguments = (where.name, str(tiny_models["qwen3"].parent), "qwen3", split, where.gap)
    run_ranks(ranks, compare_with_transformers, *arguments)


def compare_recipes(folder: str, recipe: str) -> None:
    from megatron_sgopd.fp8 import prove_fp8

    path = Path(folder)
    scorer, _, (fp8_T, _) = scored("cuda", str(path.parent), path.name, fp8_recipe=recipe, row_tokens=128)
    prove_fp8(scorer.model)
    assert torch.isfinite(fp8_T).all()


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_a_scorer_in_fp8_multiplies_in_fp8(cuda: Where, wide_model: Path, recipe: str) -> None:
    """Proves that Megatron's context reaches every layer, and that `prove_fp8` reads the layers' state right."""
    run_ranks(1, compare_recipes, str(wide_model), recipe)


def release_and_fetch(platform_name: str, models: str) -> None:
    from megatron_sgopd.platform import current

    scorer, rows, _ = scored(platform_name, models, "llama_untied", offload=True)
    assert scorer.hosted is not None
    first, _ = scorer.score(rows, 1.0)
    scorer.hosted.release()
    torch.cuda.synchronize()
    assert all(parameter.device.type == "cpu" for parameter in scorer.model.parameters())
    scorer.hosted.fetch("weights")
    scorer.hosted.ready()
    assert all(parameter.device.type == current().device.type for parameter in scorer.model.parameters())
    again, _ = scorer.score(rows, 1.0)
    assert torch.equal(first, again)


def test_weights_that_left_the_device_come_back_as_they_were(tiny_models: dict[str, Path], where: Where) -> None:
    """Proves that nothing reads weights before they are there: on a GPU pinned copies and the copy stream's order."""
    run_ranks(1, release_and_fetch, where.name, str(tiny_models["llama_untied"].parent))

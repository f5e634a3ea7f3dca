"""The CPU platform's models are computed by torch alone where Transformer Engine is installed too.

So it is in the environment of a GPU, in which `convert` proves its work on the CPU.
"""

import importlib.util
from pathlib import Path

import pytest
from launch import run_ranks

if importlib.util.find_spec("transformer_engine") is None:
    pytest.skip("needs Transformer Engine's Python: make test-te", allow_module_level=True)


def compute(folders: list[Path]) -> None:
    from megatron_models import build, each_layout, forward, process_groups

    for _ in each_layout(((1, 1, 1),)):
        import torch
        from transformers import AutoModelForCausalLM

        from megatron_sgopd.models.architecture import read_architecture
        from megatron_sgopd.models.weights import load_weights

        for folder in folders:
            architecture = read_architecture(folder)
            model = build(architecture)
            load_weights(model, architecture, process_groups())
            tokens = torch.randint(0, architecture.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
            reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            with torch.no_grad():
                expected = reference(tokens).logits.log_softmax(-1)
            found = forward(model, tokens, architecture.vocab_size)
            assert found is not None and (found - expected).abs().max() < 1e-4, folder  # float32, other order of sums
            update(model)


def update(model: object) -> None:
    """Megatron's optimizer clips and steps, by which its own kernels would be called for."""
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)  # type: ignore[attr-defined]
    settings = OptimizerConfig(optimizer="adam", lr=0.1, clip_grad=1.0, params_dtype=torch.float32)
    optimizer = get_megatron_optimizer(settings, [wrapped])
    before = [parameter.detach().clone() for parameter in wrapped.parameters()]
    for parameter in wrapped.parameters():
        parameter.main_grad.fill_(1.0)
    stepped, norm, _ = optimizer.step()
    assert stepped and norm == pytest.approx(sum(parameter.numel() for parameter in before) ** 0.5, rel=1e-4)
    assert all(not torch.equal(old, new) for old, new in zip(before, wrapped.parameters(), strict=True))


def test_models_and_updates_need_no_kernel_of_a_gpu(tiny_models: dict[str, Path]) -> None:
    run_ranks(1, compute, [tiny_models["qwen3"], tiny_models["qwen3_moe"]])

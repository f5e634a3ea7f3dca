"""The planner's bytes are those that Megatron really allocates."""

import json
import os
from pathlib import Path

import pytest
from launch import run_ranks
from megatron_models import base_config, build, each_layout, process_groups

LAYOUTS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1))
"""Tensor, pipeline and expert parallel sizes, on four ranks: what is left is data parallel."""


def count_bytes(models: str, out: str) -> None:
    """Each rank writes, for each model, precision and layout, what it holds after a step of the optimizer."""
    import torch

    found = []
    for tensor, pipeline, _ in each_layout(LAYOUTS):
        from megatron.core import parallel_state
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.module import Float16Module

        from megatron_sgopd.models.architecture import read_architecture
        from megatron_sgopd.models.provider import build_model, padded_vocab_size, transformer_config

        stage = parallel_state.get_pipeline_model_parallel_rank()
        for name in ("llama_tied", "llama_untied", "qwen3"):
            for precision in ("float32", "bf16"):
                bf16 = precision == "bf16"
                architecture = read_architecture(Path(models) / name)
                base = base_config(bf16=bf16, params_dtype=torch.bfloat16 if bf16 else torch.float32)
                config = transformer_config(architecture, base, tensor, pipeline)
                model = build_model(
                    architecture,
                    config,
                    process_groups(),
                    pre_process=stage == 0,
                    post_process=stage == pipeline - 1,
                    padded_vocab_size=padded_vocab_size(architecture, tensor),
                )
                wrapped = Float16Module(config, model) if bf16 else model
                buffers = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
                wrapped = DistributedDataParallel(config, buffers, wrapped)
                settings = OptimizerConfig(optimizer="adam", lr=1e-3, bf16=bf16, params_dtype=config.params_dtype)
                optimizer = get_megatron_optimizer(settings, [wrapped])
                wrapped.zero_grad_buffer()
                optimizer.step()
                found.append([name, precision, tensor, pipeline, stage, *held(wrapped, optimizer)])
    (Path(out) / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


def held(model, optimizer) -> tuple[int, int, int]:
    """Bytes of weights, of gradient buffers, and of what the optimizer has of its own."""
    import torch

    weights = {p.data_ptr(): p.nbytes for p in model.parameters()}
    gradients = sum(buffer.grad_data.nbytes for buffer in model.buffers)
    states: dict[int, int] = {}
    for inner in optimizer.chained_optimizers:
        tensors = [t for state in inner.optimizer.state.values() for t in state.values()]
        tensors += [p for group in inner.optimizer.param_groups for p in group["params"]]
        states |= {t.data_ptr(): t.nbytes for t in tensors if torch.is_tensor(t) and t.numel() > 1}
    return sum(weights.values()), gradients, sum(n for pointer, n in states.items() if pointer not in weights)


def test_weights_gradients_and_optimizer_are_counted_to_the_byte(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    from megatron_sgopd.cluster.memory import training_state
    from megatron_sgopd.models.architecture import read_architecture
    from megatron_sgopd.models.weight_map import ParallelLayout

    root = next(iter(tiny_models.values())).parent
    run_ranks(4, count_bytes, str(root), str(tmp_path))
    measured = [line for path in sorted(tmp_path.glob("*.json")) for line in json.loads(path.read_text())]
    assert len(measured) == 4 * 4 * 3 * 2
    for name, precision, tensor, pipeline, stage, weights, gradients, optimizer in measured:
        layout = ParallelLayout(tensor, pipeline)
        planned = training_state(read_architecture(root / name), layout, stage, precision)
        assert (planned.weights, planned.gradients, planned.optimizer) == (weights, gradients, optimizer), (
            name,
            precision,
            layout,
            stage,
        )


def saved_bytes(models: str, out: str) -> None:
    """Each rank writes what its part of a forward pass keeps for the backward pass, weights aside."""
    import torch

    from megatron_sgopd import platform
    from megatron_sgopd.models.architecture import read_architecture

    found = []
    for layout in each_layout(((1, 1, 1), (2, 1, 1)), contexts=(1, 2)):
        group = process_groups().cp
        context = group.size()
        for name in ("llama_untied", "qwen2", "qwen3"):
            model = build(read_architecture(Path(models) / name), layout, context_parallel_size=context).train()
            weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
            for rows, row_tokens in ((2, 128), (1, 256), (4, 64)):
                whole = torch.zeros(rows, row_tokens, dtype=torch.long)
                tokens = whole[:, : row_tokens // context]
                kept: list[torch.Tensor] = []  # a storage that is freed may be used for another
                with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
                    model(tokens, tokens, **platform.current().packed_attention(whole, whole, group))
                storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
                total = sum(n for pointer, n in storages.items() if pointer not in weights)
                found.append([name, layout[0], context, rows, row_tokens, total])
    (Path(out) / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


@pytest.mark.long
def test_activations_are_counted_within_a_tenth(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    from megatron_sgopd.cluster.memory import activation_bytes
    from megatron_sgopd.models.architecture import read_architecture
    from megatron_sgopd.models.weight_map import ParallelLayout

    root = next(iter(tiny_models.values())).parent
    run_ranks(2, saved_bytes, str(root), str(tmp_path))
    found = json.loads((tmp_path / "0.json").read_text())
    assert len(found) == 3 * 3 * 3
    for name, tensor, context, rows, row_tokens, measured in found:
        architecture = read_architecture(root / name)
        layer = activation_bytes(architecture, ParallelLayout(tensor), rows, row_tokens, "float32", context)
        outside = 4 * 3 * architecture.hidden_size * rows * row_tokens // context  # embeddings, and the last norm's
        planned = architecture.num_layers * layer + outside
        assert abs(planned / measured - 1) < 0.1, (name, tensor, context, rows, row_tokens, planned / measured)

"""Models of Transformer Engine's layers: every weight has the name, place and shape that the tables say. No numerics.

`make test-te` runs them beside Transformer Engine's own Python; see structure.py.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("transformer_engine") is None:
    pytest.skip("needs Transformer Engine's Python: make test-te", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))  # also in the processes of run_ranks
from structure import building, install

install()

from launch import run_ranks  # noqa: E402
from megatron_models import base_config, each_layout, process_groups  # noqa: E402

from megatron_sgopd.errors import Alarm  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
LAYOUTS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2))


def cuda_layers() -> None:
    """Take layers as they are on a GPU from now on; all else stays as on a CPU."""
    from megatron_sgopd import platform
    from megatron_sgopd.platform.cuda import CudaPlatform

    platform._current = CudaPlatform()


def build(
    architecture: Any,
    layout: tuple[int, int, int],
    fp8_recipe: str | None = None,
    device: str = "cpu",
    **changes: Any,
) -> Any:
    from megatron.core import parallel_state

    from megatron_sgopd.models.provider import build_model, padded_vocab_size, transformer_config

    fields = {"bf16": True, "params_dtype": torch.bfloat16, "sequence_parallel": layout[0] > 1}
    base = base_config(**fields, tensor_model_parallel_size=layout[0], num_attention_heads=4, **changes)
    with building(device):
        return build_model(
            architecture,
            transformer_config(architecture, base, *layout, fp8_recipe=fp8_recipe),
            process_groups(),
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            padded_vocab_size=padded_vocab_size(architecture, layout[0]),
        )


def load_and_export(models: str) -> None:
    """On each rank and layout: what was loaded under Transformer Engine's names comes out under Hugging Face's."""
    from safetensors.torch import load_file

    from megatron_sgopd.models.architecture import read_architecture
    from megatron_sgopd.models.digests import tensor_digest
    from megatron_sgopd.models.weights import export_weights, load_weights, shard_digests

    for layout in each_layout(LAYOUTS):
        cuda_layers()
        for folder in sorted(Path(models).iterdir()):
            architecture = read_architecture(folder)
            if layout[2] > 1 and not architecture.num_experts:
                continue
            model = build(architecture, layout)
            groups = process_groups()
            load_weights(model, architecture, groups)
            names = [name for name, _ in model.named_parameters()]
            dense = not architecture.num_experts
            assert any(name.endswith("self_attention.linear_qkv.layer_norm_weight") for name in names), names
            assert any(name.endswith("mlp.linear_fc1.layer_norm_weight") for name in names) == dense, names
            assert any(name.endswith("_extra_state") for name in model.state_dict()), "FP8's state is no weight"
            experts = {type(layer.mlp.experts).__name__ for layer in model.decoder.layers if not dense}
            assert experts == (set() if dense else {"TEGroupedMLP"}), "each expert in turn"
            digests = shard_digests(model, architecture, groups)
            exported = dict(export_weights(model, architecture, groups, memory_bytes=1 << 20))
            original = load_file(folder / "model.safetensors")
            assert exported.keys() == original.keys() == digests.keys()
            for name, tensor in exported.items():
                assert torch.equal(tensor, original[name].to(tensor.dtype)), (folder.name, layout, name)
                assert tensor_digest(tensor) == digests[name], (folder.name, layout, name)


def test_weights_are_loaded_exported_and_digested_under_the_fused_layers_names(tiny_models: dict[str, Path]) -> None:
    run_ranks(2, load_and_export, str(next(iter(tiny_models.values())).parent))


def fp8_layers(models: str, out: str) -> None:
    from megatron.core.fp8_utils import get_fp8_recipe

    from megatron_sgopd.fp8 import prove_fp8
    from megatron_sgopd.models.architecture import read_architecture

    architecture = read_architecture(Path(models) / "llama_untied")
    found: dict[str, Any] = {}
    for layout in each_layout(((1, 1, 1),)):
        cuda_layers()
        for recipe in ("tensorwise", "blockwise"):
            with building():
                model = build(architecture, layout, recipe)
                found[recipe] = type(get_fp8_recipe(model.config)).__name__
        try:
            prove_fp8(model)
        except Alarm as alarm:
            found["alarm"] = str(alarm)
        plain = build(architecture, layout)
        prove_fp8(plain)
    Path(out).write_text(json.dumps(found))


def test_a_model_whose_layers_did_not_multiply_in_fp8_is_found(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    run_ranks(1, fp8_layers, str(next(iter(tiny_models.values())).parent), str(out))
    found = json.loads(out.read_text())
    assert found["tensorwise"] == "Float8CurrentScaling" and found["blockwise"] == "Float8BlockScaling"
    assert "layer 1 should multiply in FP8 (blockwise), and self_attention.linear_proj does not" in found["alarm"]


def split_rows(models: str) -> None:
    """On each of two context-parallel ranks: its tokens are those that attention takes them for."""
    import torch.distributed as dist
    from transformer_engine.pytorch.attention.dot_product_attention.context_parallel import get_batch_on_this_cp_rank

    from megatron_sgopd.models.architecture import read_architecture
    from megatron_sgopd.models.microbatch import microbatches
    from megatron_sgopd.rollout.packing import pack
    from megatron_sgopd.rollout.prompts import Prompt
    from megatron_sgopd.rollout.trajectory import Trajectory

    prompt = Prompt("p", "", (1, 2, 3), "", "", {})
    lengths = (5, 30, 17, 40, 2, 9)
    drawn = [Trajectory(prompt, i, tuple(range(n)), (0.0,) * n, False) for i, n in enumerate(lengths)]
    rows = pack(drawn, 64, 1, 4, False, context_ranks=2)
    architecture = read_architecture(Path(models) / "llama_untied")
    for layout in each_layout(((1, 1, 1),), contexts=(2,)):
        context = process_groups().cp
        (batch,) = microbatches(rows, 0, rows.rows, context)
        begins = torch.cat([torch.ones(rows.rows, 1), rows.segments_RS.diff()], dim=1).flatten().nonzero()[:, 0]
        cu_seqlens = torch.cat([begins, torch.tensor([rows.tokens_RS.numel()])]).int()
        whole = rows.tokens_RS.view(1, -1)
        expected, _, positions = get_batch_on_this_cp_rank(
            cu_seqlens, whole, None, rows.positions_RS.view(1, -1), context
        )
        assert torch.equal(batch.tokens_BL.view(1, -1), expected)
        assert torch.equal(batch.positions_BL.view(1, -1), positions)
        cuda_layers()
        model = build(architecture, layout, context_parallel_size=2)
        for layer in model.decoder.layers:
            attention = layer.self_attention.core_attention
            assert dist.get_process_group_ranks(attention.cp_group) == [0, 1]
            assert attention.cp_comm_type == "p2p"


def test_context_parallel_ranks_hold_the_tokens_that_attention_expects(tiny_models: dict[str, Path]) -> None:
    run_ranks(2, split_rows, str(next(iter(tiny_models.values())).parent))


def full_size(folders: list[Path]) -> None:
    from megatron_sgopd.models.architecture import read_architecture
    from megatron_sgopd.models.weight_map import parameter_count, parameters
    from megatron_sgopd.models.weights import _bind

    on_meta = {"init_model_with_meta_device": True, "use_cpu_initialization": False}
    for layout in each_layout(((1, 1, 1),)):
        cuda_layers()
        for folder in folders:
            architecture = read_architecture(folder, with_weights=False)
            model = build(architecture, layout, device="meta", **on_meta)
            bound = _bind(model, architecture, process_groups())
            assert {tensor.device.type for tensor in bound.values()} == {"meta"}, folder
            assert len(bound) == sum(1 for p in parameters(architecture) if not p.entry.duplicate), folder
            padding = model.vocab_size - architecture.vocab_size
            copies = 1 if architecture.tied_embeddings else 2
            counted = sum(tensor.numel() for tensor in bound.values()) - copies * padding * architecture.hidden_size
            assert counted == parameter_count(architecture), folder


def test_each_parameter_of_the_examples_models_is_accounted_for() -> None:
    folders = sorted(EXAMPLES.glob("*/configs/*"))
    assert len(folders) == 6
    run_ranks(1, full_size, folders)

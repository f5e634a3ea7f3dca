"""The places where the plugin touches Megatron still have the shape that it relies on."""

import inspect
import io
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from megatron.core.inference.shards import build_inference_pg_collection
from megatron.core.models.common.embeddings import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)
from megatron.training import training
from megatron.training.async_utils import maybe_finalize_async_save
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import MetadataIndex


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_loop_calls_train_step_by_its_module_name_with_these_arguments():
    assert parameters(training.train_step)[:8] == [
        "forward_step_func",
        "data_iterator",
        "model",
        "optimizer",
        "opt_param_scheduler",
        "config",
        "forward_backward_func",
        "iteration",
    ]
    call = inspect.getsource(training.train)
    assert "= train_step(" in call
    assert "forward_backward_func, iteration=iteration," in call


def test_the_loop_saves_and_loads_by_module_names_with_these_arguments():
    for function in (training.save_checkpoint, training.save_checkpoint_and_time):
        assert parameters(function)[:5] == [
            "iteration",
            "model",
            "optimizer",
            "opt_param_scheduler",
            "num_floating_point_operations_so_far",
        ]
    assert parameters(training.save_checkpoint_and_time)[5] == "checkpointing_context"
    assert parameters(training.load_checkpoint)[3] == "load_arg"
    assert "\n    save_checkpoint(\n        iteration," in inspect.getsource(training.save_checkpoint_and_time)
    assert "= load_checkpoint(\n" in inspect.getsource(training.setup_model_and_optimizer)
    assert parameters(maybe_finalize_async_save) == ["blocking", "terminate"]


def test_train_step_gives_the_schedule_the_number_of_microbatches_by_name():
    source = inspect.getsource(training.train_step)
    assert "losses_reduced = forward_backward_func(" in source
    assert "num_microbatches=get_num_microbatches()" in source


def test_train_step_returns_the_gradient_norm_sixth():
    returned = inspect.getsource(training.train_step).rsplit("return ", 1)[1]
    assert [name.strip() for name in returned.split(",")][5] == "grad_norm"


def test_the_last_pipeline_stage_hands_hidden_states_to_an_output_processor():
    assert {"output_processor", "output_processor_context"} <= set(parameters(GPTModel.forward))
    source = inspect.getsource(GPTModel._postprocess)
    for argument in ("hidden_states", "output_layer", "output_weight", "config"):
        assert f"{argument}={argument}" in source or f"{argument}=self.{argument}" in source
    assert "context=output_processor_context" in source


@pytest.mark.parametrize("schedule", [forward_backward_no_pipelining, forward_backward_pipelining_without_interleaving])
def test_schedules_take_the_groups_of_a_second_model(schedule: object):
    assert {"p2p_communicator", "pg_collection", "forward_only", "collect_non_loss_data"} <= set(parameters(schedule))
    assert parameters(get_forward_backward_func)[:2] == ["pp_size", "vp_size"]
    assert {"tp_size", "pp_size", "cp_size"} <= set(parameters(build_inference_pg_collection))


def test_pretrain_takes_a_model_provider_and_calls_the_dataset_provider():
    assert {"cfg_container", "train_valid_test_dataset_provider", "forward_step_func", "model_provider"} <= set(
        parameters(training.pretrain)
    )
    assert 'getattr(build_train_valid_test_datasets_provider, "is_distributed", False)' in inspect.getsource(
        training.build_train_valid_test_data_loaders
    )


def test_initialization_has_a_switch_for_machines_without_cuda():
    assert "allow_no_cuda" in parameters(training.initialize_megatron)


def test_the_wheel_ships_the_compiled_dataset_helpers():
    import megatron.core.datasets.helpers_cpp  # noqa: F401


class Hostile:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_objects_in_a_checkpoint_are_not_unpickled_freely_once_the_plugin_has_asked_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert MCoreLoadPlanner.load_bytes is DefaultLoadPlanner.load_bytes
    content = io.BytesIO()
    torch.save(Hostile(tmp_path / "executed"), content)
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.state_dict = {"object": None}
    item = SimpleNamespace(dest_index=MetadataIndex("object"))
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    content.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        planner.load_bytes(item, content)
    assert not (tmp_path / "executed").exists()
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    content.seek(0)
    planner.load_bytes(item, content)
    assert (tmp_path / "executed").exists(), "else there was nothing to prevent"


def test_the_rope_of_all_columns_goes_to_the_decoder_by_name():
    assert "rotary_pos_emb=rotary_pos_emb," in inspect.getsource(GPTModel.forward)
    assert parameters(RotaryEmbedding.forward)[1:] == ["max_seq_len", "offset", "packed_seq", "cp_group"]

"""FP8 is refused before anything is loaded where it would fail, or where Megatron would silently leave it out."""

from pathlib import Path
from typing import Any

import pytest

from megatron_sgopd.checks import method_of
from megatron_sgopd.cluster.plan import setup_of
from megatron_sgopd.config import Recipe
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.fp8 import check_device, check_fp8, training_flags
from megatron_sgopd.models.architecture import Architecture, read_architecture
from megatron_sgopd.recipe import load_recipe

EXAMPLE = Path(__file__).parents[2] / "examples/llama31_70b_to_8b"


@pytest.fixture(scope="module")
def models() -> tuple[Architecture, Architecture]:
    return tuple(read_architecture(EXAMPLE / "configs" / name, with_weights=False) for name in ("student", "teacher"))


def recipe(*changes: str) -> Recipe:
    return load_recipe(EXAMPLE / "recipe.yaml", changes)


def check(changes: list[str], student: Architecture, teacher: Architecture) -> None:
    changed = recipe(*changes)
    check_fp8(changed, setup_of(changed), student, teacher)


@pytest.mark.parametrize(
    "changes",
    [
        ["fp8.format=hybrid"],
        ["fp8.format=e4m3", "fp8.recipe=blockwise", "fp8.teacher=blockwise", "fp8.rollouts=per_block"],
        ["fp8.format=hybrid", "parallel.tensor=8"],
        ["fp8.format=hybrid", "fp8.first_last_layers_bf16=true"],
    ],
)
def test_what_can_run_is_accepted(models: tuple[Architecture, Architecture], changes: list[str]) -> None:
    check(changes, *models)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["fp8.format=hybrid", "platform=cpu"], "fp8.format=hybrid needs a GPU and Transformer Engine"),
        (["fp8.rollouts=per_tensor", "platform=cpu"], "fp8.rollouts=per_tensor needs a GPU"),
        (["fp8.format=hybrid", "train.row_tokens=4100"], "a multiple of 32 tokens, but .* is 4100: let it be 4128"),
        (["fp8.format=hybrid", "train.row_tokens=4112", "parallel.sequence=false", "fp8.recipe=blockwise"], "be 4224"),
        (["fp8.teacher=tensorwise", "train.row_tokens=4104"], "fp8.teacher .* a multiple of 64 tokens"),
        (["fp8.format=hybrid", "parallel.context=2", "train.row_tokens=4128"], "a multiple of 64 tokens"),
    ],
)
def test_what_cannot_is_refused_with_the_mend(
    models: tuple[Architecture, Architecture], changes: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check(changes, *models)


def test_sizes_that_tensor_parallelism_leaves_too_odd_are_refused(tiny_models: dict[str, Path]) -> None:
    tiny = read_architecture(tiny_models["qwen2"])  # 96 / 4 = 24 rows of an MLP's weight on a rank
    with pytest.raises(ConfigError, match=r"tensor parallel size 4 intermediate size / TP of .* is 24"):
        check(["fp8.format=hybrid", "parallel.tensor=4"], tiny, tiny)


def test_sizes_that_vllm_cannot_cut_into_blocks_are_refused(tiny_models: dict[str, Path]) -> None:
    tiny = read_architecture(tiny_models["qwen2"])  # 64 hidden units; per_tensor is padded by vLLM itself
    check(["fp8.rollouts=per_tensor"], tiny, tiny)
    with pytest.raises(
        ConfigError, match=r"fp8.rollouts with recipe blockwise .* 128, .* size 4 hidden_size of .* is 64"
    ):
        check(["fp8.rollouts=per_block"], tiny, tiny)


@pytest.mark.parametrize(
    "setting", ["fp8.recipe=mxfp8", "fp8.recipe=delayed", "fp8.teacher=delayed", "fp8.format=e5m2"]
)
def test_names_that_do_not_fit_the_place_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=setting.partition("=")[0]):
        recipe(setting)


def test_a_gpu_without_the_arithmetic_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mxfp8 needs compute capability \(10, 0\), and this GPU has \(9, 0\)"):
        check_device("mxfp8", (9, 0))
    with pytest.raises(ConfigError, match=r"tensorwise needs compute capability \(8, 9\)"):
        check_device("tensorwise", (8, 0))


def test_scales_that_no_checkpoint_gives_back_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"delayed, whose scales .* refuses to load from a checkpoint, .* tensorwise"):
        check_device("delayed", (9, 0))


def test_a_transformer_engine_that_does_not_load_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.core.fp8_utils.HAVE_TE", False)
    with pytest.raises(ConfigError, match="Transformer Engine, which Megatron could not import"):
        check_device("tensorwise", (9, 0))


def test_megatrons_own_default_is_never_left_to_it() -> None:
    flags: dict[str, Any] = {name: value for name, (value, _) in training_flags(recipe("fp8.format=hybrid")).items()}
    assert flags["fp8-recipe"] == "tensorwise"


@pytest.mark.parametrize(
    ("changes", "clip"),
    [
        (["platform=cpu"], None),
        ([], 2.0),
        (["platform=cuda"], 2.0),
        (["platform=cuda", "sgopd.importance_clip=0"], None),
        (["platform=cpu", "fp8.rollouts=per_block"], 2.0),
        (["fp8.rollouts=per_block", "sgopd.importance_clip=0"], None),
        (["fp8.rollouts=per_block", "sgopd.importance_clip=1.5"], 1.5),
    ],
)
def test_an_engine_that_computes_otherwise_turns_importance_weights_on(changes: list[str], clip: float | None) -> None:
    assert method_of(recipe("sgopd.noise_floor=0", *changes)).importance_clip == clip


@pytest.mark.parametrize("setting", ["fp8.rollouts=per_block", "fp8.teacher=blockwise"])
def test_a_noise_floor_is_not_measured_by_another_noise(setting: str) -> None:
    assert method_of(recipe("sgopd.noise_floor=auto", "fp8.format=hybrid")).measured_noise_floor
    name = setting.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"noise_floor=auto reads \|s - b\|, which with {name}=.*noise-floor RECIPE"):
        method_of(recipe("sgopd.noise_floor=auto", setting))

"""The planner against published figures, against arithmetic, and what it says to a user."""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sgopd.cli import main
from megatron_sgopd.cluster import memory, times
from megatron_sgopd.cluster.hardware import device
from megatron_sgopd.cluster.plan import check_divides, setup_of, teacher_engine_bytes
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.models.architecture import Architecture, read_architecture
from megatron_sgopd.models.weight_map import ParallelLayout, parameter_count
from megatron_sgopd.recipe import load_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"
LLAMA = EXAMPLES / "llama31_70b_to_8b"
H100 = device("h100-80g")
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def architecture(folder: Path, **fields: Any) -> Architecture:
    """One that is described by its config.json alone."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": ROPE,
        **fields,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return read_architecture(folder, with_weights=False)


@pytest.mark.parametrize(
    ("rows", "data", "pipeline", "tensor", "published"), [(2, 8, 1, 1, 69.1), (4, 4, 1, 2, 55.7), (2, 4, 2, 1, 49.8)]
)
def test_peak_memory_of_llama_2_7b_is_that_measured_for_megatron(
    tmp_path: Path, rows: int, data: int, pipeline: int, tensor: int, published: float
) -> None:
    # Peak_Memory_Actual in GiB of the table in tools/get_training_info/README.md of pull request 482 of
    # NVIDIA/Megatron-LM: BF16, distributed optimizer, flash attention, no sequence parallelism, no recomputation, on
    # H800s. It does not state the length of a row: 2048 fits all of its lines. Its fourth line (TP 8) is of a time when
    # Megatron held 41 bytes, not 34, for each token and hidden unit: without sequence parallelism that counts most.
    llama = architecture(tmp_path)
    layout, tokens = ParallelLayout(tensor, pipeline), rows * 2048
    state = memory.training_state(llama, layout, 0, "bf16", data).total
    layer = memory.fused_activation_bytes(llama, layout, tokens, sequence=False)
    in_flight = pipeline * llama.num_layers // pipeline
    # Stock Megatron has logits in BF16, in float32, and their gradient.
    logits = 10 * tokens * llama.vocab_size / tensor if pipeline == 1 else 0
    planned = (state + in_flight * layer + logits) / 2**30
    assert planned == pytest.approx(published, rel=0.15)


def test_activations_of_a_layer_are_those_that_a_pipeline_of_four_stages_left(tmp_path: Path) -> None:
    # Megatron's own log of Llama 2 7B at TP 1, PP 4, one row of 4096 tokens, as in Infinigence's guide to training on
    # RTX 4090s: ranks 0, 2 and 4 had 16869, 12657 and 8509 MiB above their state with 4, 3 and 2 microbatches of 8
    # layers in flight.
    llama = architecture(tmp_path)
    layer = memory.fused_activation_bytes(llama, ParallelLayout(1, 4), 4096, sequence=False) / 2**20
    for in_flight, measured in ((4, 16869), (3, 12657), (2, 8509)):
        assert in_flight * 8 * layer == pytest.approx(measured, rel=0.15)


def test_state_of_mixtral_8x22b_is_what_megatron_allocated_after_a_step(tmp_path: Path) -> None:
    # mem-allocated-bytes on the last rank in NVIDIA/Megatron-LM's tests/functional_tests/test_cases/mixtral/
    # mixtral_8x22b_tp2pp8ep8vpp1_release, which has 8 data-parallel ranks and one of each expert's halves.
    mixtral = architecture(
        tmp_path,
        model_type="qwen3_moe",  # the same matrices, and norms of heads of 128 numbers each
        architectures=["Qwen3MoeForCausalLM"],
        num_hidden_layers=56,
        hidden_size=6144,
        num_attention_heads=48,
        num_key_value_heads=8,
        head_dim=128,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16384,
        norm_topk_prob=True,
    )
    layout = ParallelLayout(2, 8, expert=8)
    planned = memory.training_state(mixtral, layout, 7, "bf16", optimizer_shards=8).total
    assert planned == pytest.approx(23_002_929_152, rel=0.15)


@pytest.mark.parametrize(
    ("folder", "parameters"),
    [
        ("llama31_70b_to_8b/configs/student", 8_030_261_248),
        ("llama31_70b_to_8b/configs/teacher", 70_553_706_496),
        ("qwen3_32b_to_4b/configs/student", 4_022_468_096),
        ("qwen3_32b_to_4b/configs/teacher", 32_762_123_264),
        ("qwen3_30b_a3b_to_1p7b/configs/student", 1_720_574_976),
        ("qwen3_30b_a3b_to_1p7b/configs/teacher", 30_532_122_624),
    ],
)
def test_the_examples_models_have_as_many_parameters_as_their_makers_say(folder: str, parameters: int) -> None:
    assert parameter_count(read_architecture(EXAMPLES / folder, with_weights=False)) == parameters


def test_a_dense_forward_pass_takes_two_operations_a_weight() -> None:
    llama = read_architecture(LLAMA / "configs/student", with_weights=False)
    outside = 2 * llama.vocab_size * llama.hidden_size
    norms = (2 * llama.num_layers + 1) * llama.hidden_size
    flops = times.forward_flops(llama, context=0) / 2
    assert flops == parameter_count(llama) - outside - norms


def test_a_tokens_experts_are_those_that_it_is_given_to() -> None:
    # Qwen3-30B-A3B has 3.3 billion active parameters, 0.6 of which are embedding and output layer.
    moe = read_architecture(EXAMPLES / "qwen3_30b_a3b_to_1p7b/configs/teacher", with_weights=False)
    outside = 2 * moe.vocab_size * moe.hidden_size
    assert times.active_elements(moe) + outside == pytest.approx(3.3e9, rel=0.03)


def work(**changes: Any) -> times.Workload:
    fields = {"prompts": 64, "group_size": 8, "prompt_tokens": 200, "response_tokens": 1000}
    return times.Workload(**{**fields, "longest_response": 2000, "row_tokens": 4096, **changes})


@pytest.mark.parametrize(
    "seconds",
    [
        lambda a, w, r: times.forward_seconds(a, times.Spread(ParallelLayout(2), 4), w, r, 1, H100),
        lambda a, w, r: times.train_seconds(a, times.Spread(ParallelLayout(2), 4), w, r, 1, H100, False, 4),
    ],
    ids=["forward", "train"],
)
def test_twice_the_responses_or_layers_take_twice_as_long(tmp_path: Path, seconds: Callable[..., float]) -> None:
    llama, twice_as_deep = architecture(tmp_path / "a"), architecture(tmp_path / "b", num_hidden_layers=64)
    one, two = work(), work(prompts=128)
    base = seconds(llama, one, one.rows(4))
    assert seconds(llama, two, two.rows(4)) == pytest.approx(2 * base, rel=0.1)
    assert seconds(twice_as_deep, one, one.rows(4)) == pytest.approx(2 * base, rel=0.1)


def test_tokens_travel_to_their_experts_and_back() -> None:
    moe = read_architecture(EXAMPLES / "qwen3_30b_a3b_to_1p7b/configs/teacher", with_weights=False)
    few = dataclasses.replace(moe, experts_per_token=4)

    def added(architecture: Architecture, expert: int) -> float:
        alone, spread = (times.Spread(ParallelLayout(expert=e), 16) for e in (1, expert))
        passes = [times.forward_seconds(architecture, s, work(), 16, 1, H100) for s in (spread, alone)]
        return passes[0] - passes[1]

    # 8 experts a token, 7 of 8 elsewhere: 2048 numbers of two bytes, there and back, in 48 layers.
    sent = 4096 * 8 * 7 / 8 * 2048 * 2 * 2 * 48
    assert added(moe, 8) == pytest.approx(sent / times.Spread(ParallelLayout(), 1).bandwidth(H100, 8), rel=1e-6)
    assert added(few, 8) == pytest.approx(added(moe, 8) / 2, rel=1e-6)
    assert added(moe, 16) > 2 * added(moe, 8)  # over the network


def test_context_parallel_ranks_share_the_tokens_and_hand_on_keys_and_values() -> None:
    student = read_architecture(LLAMA / "configs/student", with_weights=False)
    alone, two = times.Spread(ParallelLayout(), 2), times.Spread(ParallelLayout(), 1, context=2)
    # Half of 16 rows' keys and values, 1024 numbers of two bytes each, in 32 layers.
    sent = 16 * 4096 / 2 * 2 * 1024 * 2 * 32 / two.bandwidth(H100, 2)
    forward = [times.forward_seconds(student, spread, work(), 16, 1, H100) for spread in (alone, two)]
    assert forward[1] - forward[0] == pytest.approx(sent, rel=1e-6)
    train = [times.train_seconds(student, spread, work(), 16, 1, H100, False, 2) for spread in (alone, two)]
    assert train[1] - train[0] == pytest.approx(3 * sent, rel=1e-6)


@pytest.mark.parametrize(("row_tokens", "contexts"), [(4096, {1}), (262144, {4})])
def test_rows_are_split_over_ranks_where_they_would_not_fit_otherwise(
    capsys: pytest.CaptureFixture[str], row_tokens: int, contexts: set[int]
) -> None:
    _, found, _ = plan(capsys, "--gpus=16", f"--set=train.row_tokens={row_tokens}")
    assert {one["settings"]["parallel.context"] for one in found["best"]} == contexts
    one = found["best"][0]["settings"]
    for model in ("parallel.tensor", "parallel.pipeline"), ("teacher.tensor_parallel", "teacher.pipeline_parallel"):
        assert 16 % math.prod([one["parallel.context"], *(one[name] for name in model)]) == 0


def test_a_student_with_experts_is_planned_with_them_split(capsys: pytest.CaptureFixture[str]) -> None:
    folder = EXAMPLES / "qwen3_30b_a3b_to_1p7b"
    both = [f"--set={name}.path={folder}/configs/teacher" for name in ("model", "teacher")]
    split = ["--set=parallel.expert=8", "--set=parallel.pipeline=2", "--set=rollout.tensor_parallel=4"]
    main(["plan", str(folder / "recipe.yaml"), "--json", "--gpus=64", *both, *split])
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    moe = read_architecture(folder / "configs/teacher", with_weights=False)
    state = memory.training_state(moe, ParallelLayout(1, 2, expert=8), 1, "bf16", optimizer_shards=32)
    assert recipe["phase_bytes"]["train"]["student"] == state.total
    assert recipe["phase_bytes"]["train"]["reference"] == state.weights


def test_experts_are_not_trained_by_tensor_parallel_ranks_without_sequence_parallelism() -> None:
    moe = read_architecture(EXAMPLES / "qwen3_30b_a3b_to_1p7b/configs/teacher", with_weights=False)
    recipe = load_recipe(EXAMPLES / "qwen3_30b_a3b_to_1p7b/recipe.yaml", ["parallel.tensor=2"])
    setup = dataclasses.replace(setup_of(recipe), sequence=False)
    with pytest.raises(ConfigError, match=r"set parallel.sequence, or let parallel.tensor be 1"):
        check_divides(setup, moe, None, 512)
    check_divides(dataclasses.replace(setup, sequence=True), moe, None, 512)


def test_an_engine_that_is_split_as_the_student_is_sent_nothing() -> None:
    student = read_architecture(LLAMA / "configs/student", with_weights=False)
    spread = times.Spread(ParallelLayout(4), 1)
    copied, gathered = (times.sync_seconds(student, spread, H100, alike) for alike in (True, False))
    assert copied == 2 * 2 * parameter_count(student) / 4 / H100.memory_bandwidth < gathered / 4


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any, str]:
    models = [f"--set=model.path={LLAMA}/configs/student", f"--set=teacher.path={LLAMA}/configs/teacher"]
    code = main(["plan", str(LLAMA / "recipe.yaml"), *models, "--json", *arguments])
    said = capsys.readouterr()
    return code, json.loads(said.out), said.err


@pytest.mark.parametrize("gpus", [8, 16, 32, 64])
def test_layouts_that_are_proposed_fit_and_the_recipes_own_one_does(
    capsys: pytest.CaptureFixture[str], gpus: int
) -> None:
    began = time.process_time()
    code, found, _ = plan(capsys, f"--gpus={gpus}")
    assert time.process_time() - began < 5
    assert len(found["best"]) == 3
    steps = [one["step_seconds"] for one in found["best"]]
    assert steps == sorted(steps) and code == (0 if found["recipe"]["fits"] else 1)
    for one in found["best"]:
        assert one["fits"] and one["settings"]["parallel.ranks"] == gpus
        assert all(sum(parts.values()) <= found["usable_bytes"] for parts in one["phase_bytes"].values())
    if gpus == 32:
        assert found["recipe"]["fits"], found["recipe"]["problems"]


def test_no_layout_is_proposed_that_fp8_cannot_multiply(capsys: pytest.CaptureFixture[str]) -> None:
    _, found, _ = plan(capsys, "--gpus=32", "--set=train.row_tokens=4128", "--set=fp8.format=hybrid")
    assert found["best"]
    for one in found["best"]:  # 4128 is 16 times 2 times an odd number
        assert one["settings"]["parallel.tensor"] <= 2


def test_no_layout_is_proposed_whose_logits_cannot_be_compared_where_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, found, _ = plan(capsys, "--gpus=64", "--set=sgopd.method=opd", "--set=sgopd.estimator=full")
    assert found["best"]
    for one in found["best"]:
        settings = one["settings"]
        assert settings["teacher.tensor_parallel"] == settings["parallel.tensor"]
        assert settings["teacher.pipeline_parallel"] == settings["parallel.pipeline"]
        assert not settings["teacher.offload"]


def test_what_is_impossible_is_refused_with_the_nearest_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.process_time()
    code, found, said = plan(capsys, "--gpus=1")
    assert time.process_time() - began < 5
    assert code == 2 and found["best"] == [] and found["nearest"]["fits"]
    assert "no layout fits 1 x h100-80g" in said
    assert f"The nearest that fits takes {found['nearest']['settings']['parallel.ranks']}: " in said


def test_settings_that_do_not_fit_are_named_with_the_mend(capsys: pytest.CaptureFixture[str]) -> None:
    code, found, _ = plan(capsys, "--set=rollout.memory_fraction=0.8")
    assert code == 1 and list(found["recipe"]["problems"]) == ["generate"]
    assert "rollout.tensor_parallel" in found["recipe"]["problems"]["generate"]


def test_an_unknown_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(LLAMA / "recipe.yaml"), "--gpu=h100"]) == 2
    assert "use one of h100-80g" in capsys.readouterr().err


def test_a_teachers_own_engine_fits_or_the_mend_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    teacher = read_architecture(LLAMA / "configs/teacher", with_weights=False)
    parts = teacher_engine_bytes(load_recipe(LLAMA / "recipe.yaml"), teacher, H100)
    assert parts["engine"] == parameter_count(teacher) * 2 // 4 + 4 * 2**30
    assert sum(parts.values()) == int(0.9 * H100.memory)
    # As when rollout.memory_fraction counted, which leaves the student's engine beside the trainer.
    for change, mend in (("memory_fraction=0.28", 8), ("tensor_parallel=1", 2)):
        with pytest.raises(ConfigError, match=f"let teacher_rollouts.tensor_parallel be {mend}$"):
            teacher_engine_bytes(load_recipe(LLAMA / "recipe.yaml", [f"teacher_rollouts.{change}"]), teacher, H100)
    folders = [
        f"--set={name}.path={LLAMA}/configs/{part}" for name, part in (("model", "student"), ("teacher", "teacher"))
    ]
    assert main(["plan", str(LLAMA / "recipe.yaml"), *folders]) == 0
    assert "Teacher rollouts ahead of training: an engine takes 4 GPUs" in capsys.readouterr().out

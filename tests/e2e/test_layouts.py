"""One recorded batch under many layouts: the numbers do not depend on how the models are split."""

import json
import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import ONE_RANK, STUDENT, TEACHER, Finished, in_pairs, succeed

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": ONE_RANK,
    "TP 2": {},  # as the run that made the batch: nothing is replayed
    "TP 2, teacher PP 2": {"teacher.tensor_parallel": 1, "teacher.pipeline_parallel": 2},
    "PP 2": {"parallel.ranks": 2, "parallel.tensor": 1, "parallel.pipeline": 2, "teacher.tensor_parallel": 1}
    | {"teacher.offload": True},
    "TP 2 x PP 2": {"parallel.ranks": 4, "parallel.tensor": 2, "parallel.pipeline": 2},
    "DP 2": {"parallel.ranks": 2, "parallel.tensor": 1, "teacher.tensor_parallel": 2},
    "CP 2": {"parallel.ranks": 2, "parallel.tensor": 1, "parallel.context": 2},
    "CP 2 x TP 2": {"parallel.ranks": 4, "parallel.tensor": 2, "parallel.context": 2, "teacher.tensor_parallel": 1},
    "CP 2 x PP 2": {"parallel.ranks": 4, "parallel.tensor": 1, "parallel.context": 2, "parallel.pipeline": 2},
}


OFTEN = ("one rank", "TP 2", "DP 2")
"""The others are for `make test-long`."""


def layouts(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in OFTEN else [pytest.mark.long]) for name in names]


@pytest.fixture(scope="session")
def replayed(main_run: Finished, recorded_batch: Path, tmp_path_factory: pytest.TempPathFactory):
    """Train one step on the recorded batch under a layout, scoring it anew; each layout runs once."""

    @cache
    def replay(layout: str) -> Finished:
        if not LAYOUTS[layout]:
            return main_run
        changes = LAYOUTS[layout] | {"train.steps": 1, "logging.replay": str(recorded_batch)}
        return succeed(tmp_path_factory.mktemp("layout"), changes)

    return replay


def transformers_logprobs(folder: Path, batch: dict) -> torch.Tensor:
    """float32 [T], trajectory by trajectory, from transformers' own forward."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parts = []
    for trajectory in batch["trajectories"]:
        prompt = batch["prompts"][trajectory["prompt"]]["token_ids"]
        tokens = torch.tensor([prompt + trajectory["token_ids"]])
        with torch.no_grad():
            logprobs = model(tokens).logits[0, :-1].log_softmax(-1)
        parts.append(logprobs.gather(1, tokens[0, 1:, None])[len(prompt) - 1 :, 0])
    return torch.cat(parts)


@pytest.mark.parametrize("layout", layouts(LAYOUTS))
def test_student_logprobs_are_those_of_transformers(replayed, layout: str):
    run = replayed(layout)
    expected = transformers_logprobs(STUDENT, run.recorded_text(0))
    assert (run.recorded(0)["student_logprobs_T"] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("layout", layouts(LAYOUTS))
def test_teacher_logprobs_are_those_of_transformers_whatever_the_teachers_layout(replayed, layout: str):
    run = replayed(layout)
    expected = transformers_logprobs(TEACHER, run.recorded_text(0))
    assert (run.recorded(0)["teacher_logprobs_T"] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("layout", layouts(name for name in LAYOUTS if name != "one rank"))
def test_logprobs_loss_and_gradient_do_not_depend_on_the_layout(replayed, layout: str):
    # float32 sums in another order: 1e-5 relative.
    run, single = replayed(layout), replayed("one rank")
    torch.testing.assert_close(
        run.recorded(0)["student_logprobs_T"], single.recorded(0)["student_logprobs_T"], rtol=1e-5, atol=1e-5
    )
    assert run.metrics[0]["loss"] == pytest.approx(single.metrics[0]["loss"], rel=1e-5)
    assert run.metrics[0]["grad_norm"] == pytest.approx(single.metrics[0]["grad_norm"], rel=1e-5)


@pytest.fixture(scope="module")
def special(recorded_batch: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    changed = {"teacher is student": {"teacher.path": str(STUDENT)}, "live reference": {"sgopd.method": "sgopd_scaled"}}
    same = ONE_RANK | {"train.steps": 1, "logging.replay": str(recorded_batch)}
    return in_pairs(lambda name: succeed(tmp_path_factory.mktemp("special"), same | changed[name]), changed)


@pytest.mark.long
def test_a_teacher_that_is_the_student_teaches_nothing(special: dict[str, Finished]):
    # In the student's own layout: another order of float32 sums would already differ by 1e-6.
    (line,) = special["teacher is student"].metrics
    assert abs(line["loss"]) < 1e-6
    assert line["grad_norm"] < 1e-6


@pytest.mark.long
def test_a_live_reference_takes_no_forward(special: dict[str, Finished]):
    (line,) = special["live reference"].metrics
    assert (line["teacher_forwards"], line["reference_forwards"]) == (1, 0)


EXPERTS = {
    "one rank": ONE_RANK,
    "EP 2": {"parallel.ranks": 2, "parallel.tensor": 1, "parallel.expert": 2},
    "EP 2 x CP 2": {"parallel.ranks": 2, "parallel.tensor": 1, "parallel.expert": 2, "parallel.context": 2},
}


@pytest.fixture(scope="module")
def student_with_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of random weights, with the tokenizer of the example's student."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("experts") / "student"
    shutil.copytree(STUDENT, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    same = ("vocab_size", "max_position_embeddings", "eos_token_id", "bos_token_id", "pad_token_id")
    dense = json.loads((STUDENT / "config.json").read_text())
    config = Qwen3MoeConfig(
        **{name: dense[name] for name in same if name in dense},
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).float().save_pretrained(folder)
    return folder


@pytest.mark.long
def test_a_student_with_experts_is_trained_alike_wherever_its_experts_are(
    student_with_experts: Path, recorded_batch: Path, tmp_path: Path
):
    changes: dict[str, Any] = {"model.path": str(student_with_experts), "train.steps": 1}
    changes["logging.replay"] = str(recorded_batch)
    changes["alarms.logprob_gap"] = 100.0  # the responses are another model's
    runs = {name: succeed(tmp_path / name, changes | layout) for name, layout in EXPERTS.items()}
    single = runs["one rank"]
    expected = transformers_logprobs(student_with_experts, single.recorded_text(0))
    for run in runs.values():
        assert (run.recorded(0)["student_logprobs_T"] - expected).abs().max() < 1e-4
        for name in ("loss", "grad_norm"):
            assert run.metrics[0][name] == pytest.approx(single.metrics[0][name], rel=1e-5), name


FULL = {"sgopd.method": "sgopd_scaled", "sgopd.estimator": "full", "train.steps": 1}
SAME = {
    "one rank": ONE_RANK,
    "TP 2": {"parallel.ranks": 2, "parallel.tensor": 2},
    "CP 2": {"parallel.ranks": 2, "parallel.tensor": 1, "parallel.context": 2},
}


@pytest.fixture(scope="session")
def full_runs(recorded_batch: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    return {
        name: succeed(tmp_path_factory.mktemp("full"), layout | FULL | {"logging.replay": str(recorded_batch)})
        for name, layout in SAME.items()
    }


def transformers_kl(batch: dict) -> float:
    """Mean reverse KL of student and teacher over the response tokens, from transformers' own logits."""
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (STUDENT, TEACHER)]
    total, count = 0.0, 0
    for trajectory in batch["trajectories"]:
        prompt = batch["prompts"][trajectory["prompt"]]["token_ids"]
        tokens = torch.tensor([prompt + trajectory["token_ids"]])
        with torch.no_grad():
            ours, theirs = (model(tokens).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for model in models)
        total += float((ours.exp() * (ours - theirs)).sum())
        count += len(ours)
    return total / count


@pytest.mark.long
def test_the_full_estimator_is_the_kl_of_whole_distributions_under_any_layout(full_runs: dict[str, Finished]):
    single = full_runs["one rank"]
    assert single.metrics[0]["full_kl"] == pytest.approx(transformers_kl(single.recorded_text(0)), rel=1e-4)
    for run in full_runs.values():
        for name in ("full_kl", "loss", "grad_norm", "agree"):
            assert run.metrics[0][name] == pytest.approx(single.metrics[0][name], rel=1e-5), name

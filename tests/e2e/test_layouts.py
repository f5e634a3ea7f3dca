"""One recorded batch under many layouts: the numbers do not depend on how the models are split."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import ONE_RANK, STUDENT, TEACHER, Finished, in_pairs, succeed

LAYOUTS = {
    "one rank": ONE_RANK,
    "TP 2": {"parallel.ranks": 2, "parallel.tensor": 2, "teacher.tensor_parallel": 1, "teacher.pipeline_parallel": 2},
    "PP 2": {"parallel.ranks": 2, "parallel.tensor": 1, "parallel.pipeline": 2, "teacher.tensor_parallel": 1}
    | {"teacher.offload": True},
    "TP 2 x PP 2": {"parallel.ranks": 4, "parallel.tensor": 2, "parallel.pipeline": 2},
    "DP 2": {"parallel.ranks": 2, "parallel.tensor": 1, "teacher.tensor_parallel": 2},
    "CP 2": {"parallel.ranks": 2, "parallel.tensor": 1, "parallel.context": 2},
    "CP 2 x TP 2": {"parallel.ranks": 4, "parallel.tensor": 2, "parallel.context": 2, "teacher.tensor_parallel": 1},
    "CP 2 x PP 2": {"parallel.ranks": 4, "parallel.tensor": 1, "parallel.context": 2, "parallel.pipeline": 2},
}


OFTEN = ("one rank", "TP 2 x PP 2", "DP 2", "CP 2")
"""The others hold nothing that these have not, but for a teacher of another layout."""


def layouts(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in OFTEN else [pytest.mark.long]) for name in names]


@pytest.fixture(scope="session")
def replayed(recorded_batch: Path, tmp_path_factory: pytest.TempPathFactory):
    """Train one step on the recorded batch under a layout, scoring it anew; each layout runs once."""

    @cache
    def replay(layout: str) -> Finished:
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


def test_a_teacher_that_is_the_student_teaches_nothing(special: dict[str, Finished]):
    # In the student's own layout: another order of float32 sums would already differ by 1e-6.
    (line,) = special["teacher is student"].metrics
    assert abs(line["loss"]) < 1e-6
    assert line["grad_norm"] < 1e-6


def test_a_live_reference_takes_no_forward(special: dict[str, Finished]):
    (line,) = special["live reference"].metrics
    assert (line["teacher_forwards"], line["reference_forwards"]) == (1, 0)


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

"""Every bad input: exit code 2, one readable message with the mend, no traceback, nothing left behind."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sgopd.checks import check_inputs
from megatron_sgopd.cli import main
from megatron_sgopd.recipe import load_recipe
from megatron_sgopd.rollout.bank import writing
from megatron_sgopd.rollout.teacher_rollouts import teacher_worker

from .conftest import RECIPE, REPOSITORY, STUDENT, TEACHER, Finished


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)


def refusal(capsys: pytest.CaptureFixture[str], run_dir: Path, *changes: str) -> str:
    arguments = ["train", str(RECIPE), "--set", f"run_dir={run_dir}"]
    for change in changes:
        arguments += ["--set", change]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("megatron-sgopd: ")
    assert "Traceback" not in message
    assert message.strip().count("\n") == 0
    return message


def jsonl(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def other_tokenizer(folder: Path) -> Path:
    shutil.copytree(TEACHER, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def bank(folder: Path, **other: object) -> Path:
    """A bank without rollouts of the example's teacher and prompts."""
    recipe = load_recipe(RECIPE, [f"teacher_rollouts.bank={folder}"])
    inputs = check_inputs(recipe, recipe.train.row_tokens, recipe.train.seed)
    worker = teacher_worker(recipe, inputs.tokenizer, recipe.train.row_tokens, recipe.train.seed)
    identity = dataclasses.replace(worker.identity(inputs.train), **other)
    with writing(folder, identity, "train-0"):
        return folder


def with_rows(folder: Path, model: Path, rows: int) -> Path:
    """A folder whose config.json promises so many rows of vocabulary."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    return folder


def with_experts(folder: Path) -> Path:
    """A folder without weights."""
    shutil.copytree(STUDENT, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    shutil.copy(REPOSITORY / "examples/qwen3_30b_a3b_to_1p7b/configs/teacher/config.json", folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    return folder


TAUGHT = ["teacher_rollouts.weight=0.5", "teacher_rollouts.end_step=10"]
GOOD = {"prompt": "1+1", "answer": "2"}

BAD = {
    "missing model folder": (lambda tmp: ["model.path=no/such/folder"], "no/such/folder"),
    "recipe typo": (lambda tmp: ["rollout.group_sise=8"], "did you mean 'group_size'"),
    "TP that does not divide the heads": (
        lambda tmp: ["parallel.ranks=3", "parallel.tensor=3"],
        "tensor parallel size 3 does not divide num_attention_heads",
    ),
    "teacher with another tokenizer": (
        lambda tmp: [f"teacher.path={other_tokenizer(tmp / 'other')}"],
        "student and teacher have different tokenizers",
    ),
    "a tokenizer with more ids than the model has rows": (
        lambda tmp: [f"model.path={with_rows(tmp / 'few', STUDENT, 18)}"],
        "the tokenizer has ids up to 21, and model.path=",
    ),
    "a teacher that cannot score all that the student may emit": (
        lambda tmp: [f"teacher.path={with_rows(tmp / 'fewer', TEACHER, 22)}"],
        "the student has 24 rows of vocabulary and can emit any of their ids, the teacher only 22",
    ),
    "prompt longer than the context": (
        lambda tmp: [
            "data.train={source: '"
            + str(jsonl(tmp / "p.jsonl", *[GOOD] * 40, {"prompt": "1+" * 400, "answer": "2"}))
            + "'}"
        ],
        "tokens",
    ),
    "a student with experts": (
        lambda tmp: [f"model.path={with_experts(tmp / 'experts')}"],
        "has experts, and vLLM takes no new weights for experts on a CPU",
    ),
    "row longer than the model's context": (lambda tmp: ["train.row_tokens=4096"], "more than the context"),
    "empty dataset": (lambda tmp: ["data.train={source: '" + str(jsonl(tmp / "p.jsonl")) + "'}"], "p.jsonl"),
    "dataset line that is no JSON": (
        lambda tmp: ["data.train={source: '" + str(jsonl(tmp / "p.jsonl", GOOD, GOOD, "{oops")) + "'}"],
        "3",
    ),
    "answer missing": (
        lambda tmp: ["data.train={source: '" + str(jsonl(tmp / "p.jsonl", GOOD, {"prompt": "1+1"})) + "'}"],
        "answer",
    ),
    "batch size not divisible": (lambda tmp: ["train.rows_per_microbatch=7"], "not divisible"),
    "groups of one for outcomes relative to a group": (
        lambda tmp: ["rollout.group_size=1", "rollout.prompts_per_step=16"],
        "rollout.group_size=1 leaves nothing to compare a response with",
    ),
    "wandb that is not there": (
        lambda tmp: ["megatron.wandb-project=x"],
        "megatron.wandb-project is set, and wandb is not installed",
    ),
    "a learning rate that ends above its peak": (
        lambda tmp: ["train.learning_rate=1e-5", "train.min_learning_rate=1e-4"],
        "train.min_learning_rate=0.0001 is more than train.learning_rate=1e-05: lower it",
    ),
    "unknown verifier": (lambda tmp: ["verify.verifier=maths"], "math"),
    "unknown method": (lambda tmp: ["sgopd.method=sgopt"], "sgopd"),
    "a Megatron flag that contradicts the recipe": (
        lambda tmp: ["megatron.lr=0.5"],
        "megatron.lr=0.5 contradicts train.learning_rate",
    ),
    "a save in the background that Megatron would not do": (
        lambda tmp: ["megatron.async-save=true"],
        "megatron.async-save without megatron.use-persistent-ckpt-worker",
    ),
    "an objective that is not there": (lambda tmp: ["sgopd.objective=nowhere:f"], "sgopd.objective 'nowhere:f' cannot"),
    "the full estimator with a frozen reference": (
        lambda tmp: ["sgopd.estimator=full"],
        "sgopd.estimator=full takes the KL from the student to the teacher",
    ),
    "the full estimator with a teacher laid out otherwise": (
        lambda tmp: ["sgopd.estimator=full", "sgopd.method=opd", "teacher.tensor_parallel=1"],
        "the teacher is laid out 1 x 1, the student 2 x 1",
    ),
    "rows that context-parallel ranks cannot split": (
        lambda tmp: ["parallel.ranks=4", "parallel.context=2", "train.row_tokens=386"],
        "parallel.context=2 splits rows into 4 chunks, but train.row_tokens=386 is no multiple of that: let it be 388",
    ),
    "responses split over ranks for a method that needs them whole": (
        lambda tmp: ["parallel.ranks=4", "parallel.context=2", "sgopd.method=rgopd"],
        "leave parallel.context out, or take another method",
    ),
    "a fraction of the slots above 1": (
        lambda tmp: [*TAUGHT, "teacher_rollouts.mode=mixture", "teacher_rollouts.weight=1.5"],
        "teacher_rollouts.weight=1.5 is a fraction of the slots in mode mixture: give 0 to 1",
    ),
    "the end before the hold": (
        lambda tmp: [*TAUGHT, "teacher_rollouts.hold_steps=11"],
        "teacher_rollouts.end_step=10 is before hold_steps=11",
    ),
    "weight without an end": (lambda tmp: ["teacher_rollouts.weight=1"], "let it be the first step without"),
    "a bank that is none": (
        lambda tmp: [*TAUGHT, f"teacher_rollouts.bank={tmp}"],
        "is no bank of rollouts",
    ),
    "a bank of another teacher": (
        lambda tmp: [*TAUGHT, f"teacher_rollouts.bank={bank(tmp / 'bank', model='another')}"],
        "is a bank with another model (model is 'another', and the recipe has '",
    ),
    "an empty bank": (
        lambda tmp: [*TAUGHT, f"teacher_rollouts.bank={bank(tmp / 'bank')}"],
        "has 0 rollouts and none that was approved, but teacher_rollouts.weight=0.5",
    ),
    "a teacher's engine of another split than the student's": (
        lambda tmp: [*TAUGHT, "teacher_rollouts.tensor_parallel=2"],
        "teacher_rollouts.tensor_parallel=2 is not rollout.tensor_parallel=1, and vLLM has one in a process",
    ),
    "replay folder without the step": (lambda tmp: [f"logging.replay={tmp}"], "step_000000.json"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_starts(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    changes, expected = BAD[name]
    message = refusal(capsys, tmp_path / "run", *changes(tmp_path))
    assert expected in message
    assert not (tmp_path / "run").exists()


def test_run_folder_of_another_recipe_is_refused(main_run: Finished, capsys: pytest.CaptureFixture[str]):
    before = (main_run.folder / "recipe.yaml").read_bytes()
    message = refusal(capsys, main_run.folder, "train.seed=12")
    assert "belongs to a run with" in message
    assert (main_run.folder / "recipe.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["teacher-rollouts", "--all", "--bank=DIR", "--set=teacher_rollouts.tensor_parallel=4"], "teacher_rollouts"),
        (["teacher-rollouts", "--all", "--bank=DIR", "--set=rollout.tensor_parallel=4"], "teacher_rollouts"),
        (["eval", "--out=DIR", "--tensor-parallel=4"], "rollout"),
    ],
)
def test_an_engine_of_more_ranks_than_there_are_is_refused(
    command: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], main_run: Finished
):
    name, *options = (word.replace("DIR", str(tmp_path / "out")) for word in command)
    assert main([name, str(RECIPE if name == "teacher-rollouts" else main_run.folder), *options]) == 2
    message = capsys.readouterr().err
    assert f"{said}.tensor_parallel=4 does not divide the number of ranks, which is 1: start 4 or a multiple" in message
    assert not (tmp_path / "out").exists(), "also before a checkpoint is converted"


def test_the_command_itself_exits_with_two(tmp_path: Path):
    command = [sys.executable, "-m", "megatron_sgopd.cli", "train", str(tmp_path / "none.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert result.stderr.strip().count("\n") == 0 and "cannot be read" in result.stderr


def test_a_dry_run_prints_recipe_and_command_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_dir = tmp_path / "run"
    arguments = [
        "train",
        str(RECIPE),
        "--dry-run",
        "--set",
        f"run_dir={run_dir}",
        "--set",
        "megatron.log-throughput=true",
    ]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "group_size: " in output
    assert "--tensor-model-parallel-size=2" in output and "--log-throughput" in output
    assert f'--sgopd-model-path="{STUDENT.relative_to(REPOSITORY)}"' in output
    assert not run_dir.exists()

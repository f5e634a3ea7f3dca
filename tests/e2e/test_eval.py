"""`megatron-sgopd eval` on models, runs and benchmark files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_sgopd.cli import main
from megatron_sgopd.config import PromptSettings
from megatron_sgopd.evaluation.contamination import overlapping
from megatron_sgopd.rollout.bank import RolloutBank
from megatron_sgopd.rollout.prompts import read_prompts
from megatron_sgopd.rollout.tokenizer import load_tokenizer

from .conftest import RECIPE, REPOSITORY, STUDENT, Finished

SENTENCE = "State the final answer to the following arithmetic problem: "

SHAPES: dict[str, list[dict[str, Any]]] = {
    "AIME24": [{"ID": "2024-I-1", "Problem": f"{SENTENCE}4 - 1 =", "Solution": "It is 3.", "Answer": 3}],
    "AIME25": [{"problem": f"{SENTENCE}4 - 1 =", "answer": "3"}],
    "AMC23": [{"id": 0, "problem": f"{SENTENCE}4 - 1 =", "answer": 3.0, "url": "https://example.org"}],
    "MATH-500": [{"problem": f"{SENTENCE}4 - 1 =", "solution": "It is $3$.", "answer": "3", "subject": "Algebra"}],
    "GSM8K": [{"question": f"{SENTENCE}4 - 1 =", "answer": "Four less one is three.\n#### 3"}],
    "OlympiadBench": [{"question": f"{SENTENCE}4 - 1 =", "solution": ["It is 3."], "final_answer": ["3"]}],
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_benchmarks_are_read_by_their_own_column_names(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in SHAPES[name]))
    else:
        pq.write_table(pa.Table.from_pylist(SHAPES[name]), path)
    [one] = read_prompts(PromptSettings(source=str(path)), load_tokenizer(str(STUDENT)), pytest.fail)
    prompt = one.prompt
    assert f"{SENTENCE}4 - 1 =" in prompt.text
    assert float(prompt.answer) == 3


def test_problems_that_training_has_shown_are_found() -> None:
    words = "how many ways are there to put seven red balls into three boxes of one kind"
    problems = [words, "What is 1+1?", words.replace("seven", "eight"), "Find x."]
    training = ["A story. " + words.upper() + "?", "what is  1 + 1 ?", "Find x. Then find y."]
    assert overlapping(problems, training) == [0, 1], "the short one that a training prompt only begins with is not"
    assert overlapping(problems, training, words=5) == [0, 1, 2]
    assert overlapping(problems, []) == []


def test_an_instruction_that_all_problems_have_flags_none_of_them() -> None:
    instruction = "Think step by step, and at the end put your final answer within a box, as in the example."
    problems = [f"There are {i} ducks on pond number {i}; {i + 2} leave. How many? {instruction}" for i in range(40)]
    training = [f"Here are pigs. {instruction}", problems[7].upper()]
    assert overlapping(problems, training) == [7]
    assert overlapping([instruction] * 40, training) == list(range(40)), "nothing else is theirs"


def run_eval(*arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "megatron_sgopd.cli", "eval", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=REPOSITORY)


def test_a_model_on_two_benchmark_files_with_every_response_kept(tmp_path: Path) -> None:
    sums = [(a, b) for a in range(2, 9) for b in range(1, 4)]
    files = {}
    for name, rows in (
        ("gsm8k", [{"question": f"{SENTENCE}{a} - {b} + 1 - 1 =", "answer": f"So.\n#### {a - b}"} for a, b in sums]),
        ("math500", [{"problem": f"{SENTENCE}{a} + {b} + 1 - 1 =", "answer": str(a + b)} for a, b in sums[:5]]),
    ):
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    arguments = [STUDENT, "--out", out, "--samples", 4, "--max-new-tokens", 64, "--platform", "cpu"]
    arguments += ["--data", files["gsm8k"], "--data", f"easy={files['math500']}", "--contamination", files["math500"]]
    arguments += ["--top-p", 0.95, "--top-k", 20, "--stop", "</answer>"]
    result = run_eval(*arguments)
    assert result.returncode == 0, result.stderr
    report = json.loads((out / "results.json").read_text())
    assert set(report["scores"]) == {"gsm8k", "easy", "overall"}
    assert [report["scores"][name]["problems"] for name in ("gsm8k", "easy", "overall")] == [21, 5, 26]
    bank = RolloutBank(out / "gsm8k")
    outcomes = [[rollout.outcome for rollout in bank.of(f"problem {i}")] for i in range(21)]
    assert all(len(each) == 4 for each in outcomes)
    score = report["scores"]["gsm8k"]
    assert score["avg@4"]["mean"] == pytest.approx(sum(map(sum, outcomes)) / 84)
    assert score["pass@4"]["mean"] == pytest.approx(sum(map(any, outcomes)) / 21)
    for name in ("avg@4", "pass@2", "pass@4", "maj@2", "maj@4"):
        assert 0 <= score[name]["low"] <= score[name]["mean"] <= score[name]["high"] <= 1, name
    assert score["pass@4"]["mean"] > 0, "the student can do some sums"
    assert report["contamination"]["easy"] == {"problems": [0, 1, 2, 3, 4], "share": 1.0}
    measured = report["measured"]["gsm8k"]
    assert [measured[name] for name in ("samples", "top_p", "top_k", "stop")] == [4, 0.95, 20, '["</answer>"]']
    ended = [r for i in range(21) for r in bank.of(f"problem {i}") if not r.truncated]
    assert ended and all(rollout.response.endswith("</answer>") for rollout in ended)
    right = [r for i in range(21) for r in bank.of(f"problem {i}") if r.outcome]
    assert all("<answer>" in rollout.response and rollout.reason == "right" for rollout in right)

    before = (out / "results.json").read_bytes()
    again = run_eval(*arguments)
    assert again.returncode == 0 and "21 of 21 problems are there already" in again.stdout
    assert (out / "results.json").read_bytes() == before


@pytest.mark.long
def test_a_run_is_evaluated_by_its_own_recipe(main_run: Finished, tmp_path: Path) -> None:
    result = run_eval(main_run.folder, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["scores"]["heldout"]["problems"] == 8
    assert (tmp_path / "model_iter_0000011/model.safetensors").is_file()
    lines = [json.loads(line) for line in (main_run.folder / "evaluations.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["before", "after"]
    assert all(set(line["scores"]) == {"avg@2", "pass@2", "maj@2"} for line in lines)
    assert set(report["scores"]["heldout"]) >= {"avg@2", "pass@2", "maj@2"}, "as often as the recipe says"
    measured = report["measured"]["heldout"]
    assert measured["stop"] == "[]" and lines[0]["measured"]["stop"] == []
    assert all(
        measured[name.replace("problems", "prompts")] == value
        for name, value in lines[0]["measured"].items()
        if name != "stop"
    )


@pytest.mark.long
def test_two_ranks_share_the_problems_and_find_the_same(main_run: Finished, tmp_path: Path) -> None:
    results, banks = [], []
    for ranks in (1, 2):
        out = tmp_path / f"ranks_{ranks}"
        result = run_eval(main_run.folder, "--out", out, "--samples", 4, ranks=ranks)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("32 of 32 rollouts") == 1, "one rank speaks"
        results.append((out / "results.json").read_bytes())
        bank = RolloutBank(out / "heldout")
        banks.append([bank.of(f"problem {number}") for number in range(8)])
    assert results[0] == results[1] and banks[0] == banks[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "1,16", "--samples", "8"], "--k has 16, more than the 8 responses to a problem: raise --samples"),
        (["--k", "one"], "--k 'one' is not of the form 1,8,32"),
        (["--samples", "0"], "setting 'samples' is 0"),
        (["--top-p", "1.5"], "setting 'top_p' is 1.5"),
        ([], "there are no problems: give --data FILE, or a recipe with data.heldout"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (
            ["--data", "{columns}"],
            "has no column of a name that is known for prompt_field, it has text, label",
        ),
        (["--data", "{good}", "--data", "{good}"], "two sets of one name"),
        (["--data", "{good}", "--verifier", "task"], "needs prompts of a reasoning-gym task"),
        (["--data", "{good}", "--verifier", "maths"], "did you mean 'math'"),
        (["--data", "{good}", "--max-new-tokens", "2048"], "is more than the model's context of 2048"),
    ],
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, columns = tmp_path / "good.jsonl", tmp_path / "columns.jsonl"
    good.write_text(json.dumps({"prompt": "1 + 1 =", "answer": "2"}) + "\n")
    columns.write_text(json.dumps({"text": "1", "label": "2"}) + "\n")
    given = [argument.format(good=good, columns=columns) for argument in arguments]
    assert main(["eval", str(STUDENT), "--out", str(tmp_path / "out"), *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tmp_path), "--recipe", str(RECIPE), "--out", str(tmp_path / "out")]) == 2
    assert "is no torch_dist checkpoint" in capsys.readouterr().err

"""`check-data`: what it says of data that people have, with one bad row of each kind."""

import json
from pathlib import Path
from typing import Any

import pytest
from commands import REPOSITORY

from megatron_sgopd.cli import main

RECIPE = REPOSITORY / "examples/arithmetic_cpu/recipe.yaml"
STUDENT = REPOSITORY / "examples/arithmetic_cpu/models/student"


def rows(prompt: str, answer: str, bad: list[dict[str, Any]], form: str = "{}") -> list[dict[str, Any]]:
    """Ten rows, the last ones bad."""
    good: list[dict[str, Any]] = []
    for number in range(10 - len(bad)):
        row: dict[str, Any] = {}
        for path, value in ((prompt, f"What is {number} + 1?"), (answer, form.format(number + 1))):
            inner = row
            *parents, last = path.split(".")
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[last] = [{"role": "user", "content": value}] if path == "prompt" else value
        good.append(row)
    return [*good, *bad]


SHAPES = {
    "verl": rows(
        "prompt",
        "reward_model.ground_truth",
        [{"prompt": [], "reward_model": {"ground_truth": "1"}}, {"prompt": [{"role": "user", "content": "x"}]}],
    ),
    "OpenMathReasoning": rows("problem", "expected_answer", [{"problem": "x", "expected_answer": None}]),
    "NuminaMath": rows("problem", "solution", [{"problem": "x", "solution": "no box"}], "So \\boxed{{{}}}."),
    "Big-Math": rows("problem", "answer", [{"problem": " ", "answer": "1"}]),
    "DeepMath": rows("question", "final_answer", [{"question": "x"}]),
    "GSM8K": rows("question", "answer", [{"question": "x", "answer": "work\n####"}], "work\n#### {}"),
}


def checked(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, list[dict[str, Any]]]:
    code = main(["check-data", *map(str, words), "--json"])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("name", SHAPES)
def test_a_file_of_each_known_shape(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = 2 if name == "verl" else 1
    code, [report] = checked(capsys, write(tmp_path / "rows.jsonl", SHAPES[name]))
    assert code == 1 and (report["rows"], report["usable"]) == (10, 10 - bad)
    assert all(f"line {11 - bad + i}" in said for i, said in enumerate(report["unusable"]))
    assert report["kinds"] == {"integer": 10 - bad} and report["refusals"] == 0 and report["tokens"] is None


def test_what_contradicts_itself_and_what_the_verifier_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = ["2", "2.0", "3", "\\frac12", "yes", "B", "(1,2)", "1, 2", "x+1", "?"]
    prompts = ["a", "a", "a", "b", "c", "d", "e", "f", "g", "h"]
    lines = [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]
    code, [report] = checked(capsys, write(tmp_path / "rows.jsonl", lines), "--model", STUDENT)
    assert code == 1 and report["duplicates"] == 2
    assert report["contradictions"] == 1 and report["contradicting"] == ["'2' (line 1) and '3' (line 3)"]
    assert report["refusals"] == 1 and "line 10: '?'" in report["refused"][0]
    assert set(report["kinds"]) >= {"integer", "fraction", "word", "choice", "list", "expression"}
    assert report["tokens"]["min"] > 0 and len(report["samples"]) == 3


def test_a_worked_solution_that_ends_in_another_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def row(number: int, solution: str) -> dict[str, str]:
        return {"problem": f"{number}?", "solution": solution, "answer": "7"}

    lines = [row(0, "So \\boxed{7}."), row(1, "So \\boxed{14/2}."), row(2, "So \\boxed{6}."), row(3, "Proof by cases.")]
    code, [report] = checked(capsys, write(tmp_path / "numina.jsonl", lines))
    assert code == 1 and report["refusals"] == 0 and report["unsolved_rows"] == 2
    assert report["unsolved"][0] == "line 3: ends in '6', and the reference is '7'"
    assert report["unsolved"][1].startswith("line 4: ")
    code, [report] = checked(
        capsys, write(tmp_path / "odd.jsonl", [row(0, "\ud800 \\boxed{\ud800}"), row(1, "\\boxed{7}")])
    )
    assert code == 1 and report["unsolved_rows"] == 1
    worked = [{"question": "x", "answer": "3 + 4 = 7\n#### 7"}, {"question": "y", "answer": "It is 1,250.\n#### 1,250"}]
    code, [report] = checked(capsys, write(tmp_path / "gsm8k.jsonl", worked))
    assert code == 0 and report["unsolved_rows"] == 0


def test_a_recipes_own_data_and_what_a_person_sees(capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(RECIPE), "--set", "data.train.size=50", "--set", "data.heldout.size=10"]
    assert main(["check-data", *words]) == 0
    said = capsys.readouterr().out
    assert "data.train: reasoning_gym:chain_sum" in said and "50 rows, 50 of them usable" in said
    assert "tokens of a prompt: min" in said and "answers: 50 integer" in said and "data.heldout" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["nowhere.jsonl", "--set", "x=1"], "--set changes a recipe, and nowhere.jsonl is none"),
        (["nowhere.jsonl", "--verifier", "maths"], "maths"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-data", *words]) == 2
    assert message in capsys.readouterr().err

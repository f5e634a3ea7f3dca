"""What the report reads and shows; tests/e2e/test_report.py opens it in a browser."""

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_sgopd.cli import main
from megatron_sgopd.report.contents import SAMPLE_TOKENS, SERIES_POINTS, contents
from megatron_sgopd.report.page import write_page
from megatron_sgopd.report.runs import read_run, state

STAGES = ("sync", "generate", "pack", "verify", "teacher", "reference", "train", "record")


def write_run(
    folder: Path, steps: int, seed: int = 1, sample_tokens: int = 20, every: int = 10, samples: int = 8
) -> Path:
    """A run folder with as many numbers as a real one's and random values, which no packing makes small."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    recipe = {
        "run_dir": str(folder),
        "train": {"seed": seed, "steps": steps, "learning_rate": 1e-6},
        "sgopd": {"method": "sgopd"},
        "model": {"path": "student"},
        "teacher": {"path": "teacher"},
        "alarms": {"logprob_gap": 0.5},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    numbers = [f"number_{i}" for i in range(70)]
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        line = dict(zip(numbers, rng.normal(size=70).tolist(), strict=True))
        line |= {"step": step, "seconds": 8.0, "pass_rate": step / steps, "teacher_approval": None if step > 5 else 0.5}
        lines.append(line | {"stage_seconds": dict.fromkeys(STAGES[: 7 + step % 2], 1.0)})
    write_lines(folder / "metrics.jsonl", lines)
    evaluations = [
        {"name": name, "step": step, "pass_rate": rate, "by_problem": rng.permutation([rate * 2, 0.0] * 50).tolist()}
        for name, step, rate in (("teacher", 0, 0.5), ("before", 0, 0.1), ("after", steps, 0.4))
    ]
    write_lines(folder / "evaluations.jsonl", evaluations)
    words = ["".join(letters) for letters in rng.choice(list("abcdefgh "), (20_000, 5))]
    kept = [
        {
            "step": step,
            "outcome": int(rng.integers(2)),
            "response": "",
            "prompt": "",
            "tokens": random_tokens(rng, sample_tokens, words),
        }
        for step in range(1, steps + 1, every)
        for _ in range(samples)
    ]
    write_lines(folder / "samples.jsonl", kept)
    return folder


def random_tokens(rng: np.random.Generator, count: int, words: list[str]) -> dict[str, Any]:
    names = ("student", "teacher", "reference", "behaviour", "delta", "advantage")
    tokens: dict[str, Any] = {name: np.round(rng.normal(size=count), 4).tolist() for name in names}
    tokens |= {"rank": rng.integers(1, 1000, count).tolist(), "gate": "".join(rng.choice(list("acn"), count))}
    return tokens | {"text": rng.choice(words, count).tolist()}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_page_of_500_steps_stays_below_ten_megabytes_whatever_was_sampled(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 500, sample_tokens=1000)  # 400,000 tokens
    assert write_page([run], tmp_path / "report.html") <= 10e6
    found = contents([read_run(run)])["runs"][0]
    shown = sum(len(line["tokens"]["text"]) for line in found["samples"])
    assert 0.8 * SAMPLE_TOKENS <= shown <= SAMPLE_TOKENS
    assert {line["step"] for line in found["samples"]} >= {1, 491}, "from the first sampled step to the last"
    assert any("of 400 sampled responses are left out" in alarm for alarm in found["alarms"])


def test_series_are_thinned_to_means_and_gaps_stay_gaps(tmp_path: Path) -> None:
    steps = 2 * SERIES_POINTS
    series = contents([read_run(write_run(tmp_path / "run", steps))])["runs"][0]["series"]
    assert len(series["step"]) == SERIES_POINTS and series["step"][:2] == [1.5, 3.5]
    assert series["teacher_approval"][:4] == [0.5, 0.5, 0.5, None]
    assert series["seconds/record"][0] == 0.5, "a stage that a step lacks took no time in it"
    assert set(series) >= {f"seconds/{stage}" for stage in STAGES}


def test_curves_have_the_intervals_of_seeds_and_problems(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / f"seed_{seed}", 100, seed)) for seed in (1, 2)]
    [group] = contents(runs)["groups"]
    assert group["name"] == "runs (2 seeds)" and group["members"] == [0, 1] and group["teacher"] == 0.5
    (start, mean, low, high), (end, *_) = group["heldout"]
    assert (start, end, mean) == (0, 100, 0.1)
    # 2 x 100 problems, half of them at 0.2: a standard error of 0.1 / sqrt(200) to 0.1 / sqrt(100).
    assert 0.1 * 1.96 / 200**0.5 * 0.8 <= (high - low) / 2 <= 0.1 * 1.96 / 100**0.5 * 1.3
    assert len(group["training"]) == 25
    step, mean, low, high = group["training"][0]
    assert (step, mean) == (2.5, 0.025) and 0.01 <= low < mean < high <= 0.04


def test_other_settings_make_another_group(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, 20, seed) for name, seed in (("a/1", 1), ("a/2", 2), ("b/1", 1))]
    recipe = yaml.safe_load((runs[2] / "recipe.yaml").read_text())
    (runs[2] / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"sgopd": {"method": "opd"}}))
    groups = contents([read_run(run) for run in runs])["groups"]
    assert [(group["name"], group["members"]) for group in groups] == [("a (2 seeds)", [0, 1]), ("b/1", [2])]


def test_a_run_that_has_just_begun_and_one_of_an_own_script(tmp_path: Path) -> None:
    for name in ("begun", "own"):
        run = write_run(tmp_path / name, 3)
        (run / "evaluations.jsonl").unlink()
        (run / "samples.jsonl").unlink()
    (tmp_path / "begun/metrics.jsonl").write_text("")
    (tmp_path / "own/recipe.yaml").unlink()
    found = contents([read_run(tmp_path / "begun"), read_run(tmp_path / "own")])
    assert [(run["step"], run["steps"]) for run in found["runs"]] == [(0, 3), (3, None)]
    assert all(group["training"] == group["heldout"] == [] for group in found["groups"])


def test_what_stopped_a_run_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3)
    before = state([run])
    (run / "logs").mkdir()
    (run / "logs/rank-0.error").write_text("step 3: loss is nan: lower train.learning_rate")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert state([run]) != before
    assert read_run(run).alarms == [
        "rank-0 failed: step 3: loss is nan: lower train.learning_rate",
        "metrics.jsonl: its last line is cut off, as of a run that was killed, and is left out",
    ]
    assert [line["step"] for line in read_run(run).metrics] == [1, 2, 3]


def test_a_summary_of_fewer_steps_is_not_the_end(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3)
    (run / "summary.json").write_text("{}")
    assert read_run(run).ended
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["train"]["steps"] = 6
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert not read_run(run).ended


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["report", *map(str, arguments)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("megatron-sgopd: ") and message.strip().count("\n") == 0
    return message


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not the folder of a run: it has no metrics.jsonl" in refusal(capsys, tmp_path)
    run = write_run(tmp_path / "run", 3)
    assert "none is not the folder of a run" in refusal(capsys, run, tmp_path / "none")
    assert "exclude each other" in refusal(capsys, run, "--live", "--out", tmp_path / "x.html")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot be had" in refusal(capsys, run, "--live", "--port", taken.getsockname()[1])
    (run / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n')
    assert "metrics.jsonl, line 2 is not JSON" in refusal(capsys, run)
    assert not list(tmp_path.glob("**/*.html"))

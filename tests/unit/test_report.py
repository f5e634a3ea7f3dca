"""What the report reads and shows; tests/e2e/test_report.py opens it in a browser."""

import json
import math
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_sgopd.cli import main
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.report.contents import SERIES_POINTS, Contents
from megatron_sgopd.report.page import write_page
from megatron_sgopd.report.runs import Samples, read_run, state

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
        {
            "name": name,
            "step": step,
            "pass_rate": rate,
            "by_problem": rng.permutation([rate * 2, 0.0] * 50).tolist(),
            "samples": 8,
            "scores": {"avg@8": {"mean": rate, "low": rate - 0.02, "high": rate + 0.03}},
        }
        for name, step, rate in (("teacher", 0, 0.5), ("before", 0, 0.1), ("after", steps, 0.4))
    ]
    write_lines(folder / "evaluations.jsonl", evaluations)
    words = ["".join(letters) for letters in rng.choice(list("abcdefgh "), (20_000, 5))]
    kept = []
    for step in range(1, steps + 1, every):
        for _ in range(samples):
            tokens = random_tokens(rng, sample_tokens, words)
            prompt = " ".join(rng.choice(words, sample_tokens // 4))
            kept.append({"step": step, "prompt": prompt, "response": "".join(tokens["text"])} | {"tokens": tokens})
    write_lines(folder / "samples.jsonl", kept)
    return folder


def random_tokens(rng: np.random.Generator, count: int, words: list[str]) -> dict[str, Any]:
    names = ("student", "teacher", "reference", "behaviour", "delta", "advantage")
    tokens: dict[str, Any] = {name: np.round(rng.normal(size=count), 4).tolist() for name in names}
    tokens |= {"rank": rng.integers(1, 1000, count).tolist(), "gate": "".join(rng.choice(list("acn"), count))}
    return tokens | {"text": rng.choice(words, count).tolist()}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def contents(paths: list[Path]) -> dict[str, Any]:
    return Contents(paths)()


def read_samples(run: Path, budget: int) -> tuple[list[dict[str, Any]], int]:
    samples = Samples(run / "samples.jsonl")
    samples.refresh()
    return samples.chosen(budget)


def test_a_page_of_500_steps_stays_below_ten_megabytes_whatever_was_sampled(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 500, sample_tokens=1000)  # 40 MB
    assert write_page([run], tmp_path / "report.html") <= 10e6
    [found] = contents([run])["runs"]
    kept = {line["step"] for line in found["samples"]}
    assert kept == {*range(1, 492, 40), 491}, "at even distances, the last among them"
    assert any(
        f"{found['samples_left_out']} of 400 sampled responses are left out" in alarm for alarm in found["alarms"]
    )


def test_samples_stay_within_their_budget_and_stay_chosen_while_a_run_goes_on(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 70)
    path = run / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    everything, left_out = read_samples(run, path.stat().st_size)
    assert [json.dumps(line) + "\n" for line in everything] == lines and left_out == 0
    budget = int(0.6 * path.stat().st_size)
    for steps in range(1, 8):
        path.write_text("".join(lines[: 8 * steps]))
        found, left_out = read_samples(run, budget)
        assert sum(len(json.dumps(line)) + 1 for line in found) <= budget and len(found) + left_out == 8 * steps
        kept = {line["step"] for line in found}
        assert 10 * steps - 9 in kept
    assert kept == {1, 21, 41, 61}
    assert len(read_samples(run, len(lines[0]) + 50)[0]) == 1, "one that does not fit takes no other's place"
    assert read_samples(run, 10)[0] == []


def test_series_are_thinned_to_means_and_gaps_stay_gaps(tmp_path: Path) -> None:
    steps = 2 * SERIES_POINTS
    series = contents([write_run(tmp_path / "run", steps)])["runs"][0]["series"]
    assert len(series["step"]) == SERIES_POINTS and series["step"][:2] == [1.5, 3.5]
    assert series["teacher_approval"][:4] == [0.5, 0.5, 0.5, None]
    assert series["seconds/record"][0] == 0.5, "a stage that a step lacks took no time in it"
    assert set(series) >= {f"seconds/{stage}" for stage in STAGES}


def test_curves_have_the_intervals_of_runs_and_problems(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"seed_{seed}", 100, seed) for seed in (1, 2)]
    [group] = contents([*runs, runs[0]])["groups"]
    assert group["name"] == "sgopd: seed_1, … (2 runs)" and group["members"] == [0, 1], "a folder counts once"
    assert group["teacher"] == 0.5
    (start, mean, low, high, count), (end, *_) = group["heldout"]
    assert (start, end, mean, count) == (0, 100, 0.1, 2)
    # 2 x 100 problems, half of them at 0.2: a standard error of 0.1 / sqrt(200) to 0.1 / sqrt(100), and of two runs
    # Student's t with one degree of freedom.
    assert 0.1 * 12.7 / 200**0.5 * 0.99 <= (high - low) / 2 <= 0.1 * 12.71 / 100**0.5
    assert len(group["training"]) == 25
    step, mean, low, high, count = group["training"][0]
    assert (step, mean, count) == (2.5, 0.025, 2) and 0 <= low < mean < high <= 0.11


def test_a_run_that_died_early_shortens_no_other(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"seed_{seed}", 40, seed) for seed in (1, 2)]
    for name, lines in (("metrics", 9), ("evaluations", 2)):
        path = runs[0] / f"{name}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))
    found = contents(runs)
    [group] = found["groups"]
    assert [point[4] for point in group["training"]] == [2, 2, *[1] * 8]
    assert [(point[0], point[4]) for point in group["heldout"]] == [(0, 2), (40, 1)]
    assert group["heldout"][1][1:4] == [0.4, 0.38, 0.43], "one run's own interval"
    assert [run["after"] for run in found["runs"]] == [None, 0.4]


def test_a_step_without_a_response_of_the_students_has_no_rate(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 12)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[5]["pass_rate"] = None
    write_lines(run / "metrics.jsonl", lines)
    [group] = contents([run])["groups"]
    assert [point[0] for point in group["training"]] == [2.5, 10.5]


def test_other_settings_make_another_group(tmp_path: Path) -> None:
    names = ("a/1", "a/2", "b/1", "c/1", "c/2", "c/3")
    runs = [write_run(tmp_path / name, 8, seed) for seed, name in enumerate(names, start=1)]
    for run in (runs[2], runs[3], runs[4]):
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        (run / "recipe.yaml").write_text(
            yaml.safe_dump(recipe | {"sgopd": {"method": "opd" if run.parent.name == "b" else "grpo"}})
        )
    groups = contents(runs)["groups"]
    assert [(group["name"], group["members"]) for group in groups] == [
        ("sgopd: a/1, … (3 runs)", [0, 1, 5]),
        ("b/1", [2]),
        ("grpo: c/1, … (2 runs)", [3, 4]),
    ]
    assert [group["name"] for group in contents(runs[:3])["groups"]] == ["a (2 runs)", "b/1"]


def test_a_run_that_has_just_begun_and_one_of_an_own_script(tmp_path: Path) -> None:
    for name in ("begun", "own"):
        run = write_run(tmp_path / name, 3)
        (run / "evaluations.jsonl").unlink()
        (run / "samples.jsonl").unlink()
    (tmp_path / "begun/metrics.jsonl").write_text("")
    (tmp_path / "own/recipe.yaml").unlink()
    found = contents([tmp_path / "begun", tmp_path / "own"])
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
        "rank 0: step 3: loss is nan: lower train.learning_rate",
        "metrics.jsonl: its last line is cut off, as of a run that was killed, and is left out",
    ]
    assert [line["step"] for line in read_run(run).recent] == [1, 2, 3]


def test_the_last_step_says_how_many_answers_were_faulty(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 5)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line, count in zip(lines, (1, 4, 4, 6, 7), strict=True):
        line |= {"verifier_timeout": count, "verifier_memory": 0}
    write_lines(run / "metrics.jsonl", lines)
    [alarm] = read_run(run).alarms
    assert alarm.startswith("verifier: 7 answers") and "'timeout'" in alarm


def test_numbers_that_are_none_leave_a_gap_and_the_page_stays_json(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 4)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[1] |= {"loss": math.inf, "grad_norm": -math.inf}
    lines[2] |= {"loss": math.nan, "stage_seconds": {"train": math.nan}}
    lines[3] |= {"loss": 2.0}
    write_lines(run / "metrics.jsonl", lines)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    samples[0]["tokens"]["delta"][0] = math.inf
    write_lines(run / "samples.jsonl", samples)
    write_page([run], tmp_path / "report.html")
    [found] = contents([run])["runs"]
    json.dumps(found, allow_nan=False)
    assert found["series"]["loss"] == [None, None, None, 2.0]
    assert found["samples"][0]["tokens"]["delta"][0] is None


def test_a_page_that_follows_a_run_is_the_one_made_at_its_end(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 60)
    names = ("metrics.jsonl", "samples.jsonl")
    whole = {name: (run / name).read_bytes() for name in names}
    follow = Contents([run])
    for part in (0.2, 0.6, 0.3, 1.0):  # in the third, steps are cut off to be done again
        for name in names:
            content = whole[name] if part != 0.6 else whole[name].replace(b"1", b"2")
            (run / name).write_bytes(content[: int(part * len(content))])
        if part != 0.6:
            assert {**follow(), "made": ""} == {**contents([run]), "made": ""}
        else:
            follow()


def test_a_line_that_is_mended_is_read_with_all_before_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 30)
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:5], "broken\n", *lines[5:]]))
    follow = Contents([run])
    for _ in range(2):
        with pytest.raises(ConfigError, match="line 6 is not JSON"):
            follow()
    path.write_text("".join(lines))
    assert follow()["runs"][0]["step"] == 30 and len(follow()["runs"][0]["series"]["step"]) == 30


def test_a_long_run_makes_a_curve_of_as_many_points_with_narrower_intervals(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    run = write_run(tmp_path / "run", 1)
    rates = (rng.random(8000) < 0.5).astype(float).tolist()
    write_lines(
        run / "metrics.jsonl",
        [{"step": step, "pass_rate": rate, "seconds": 1.0} for step, rate in enumerate(rates, start=1)],
    )
    [group] = contents([run])["groups"]
    assert len(group["training"]) == 40 and group["training"][0][0] == 100.5
    halves = [(high - low) / 2 for _, _, low, high, _ in group["training"]]
    assert 0.8 < np.mean(halves) / (1.96 * 0.5 / 200**0.5) < 1.2, "as of 200 steps that know nothing of each other"


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
    assert "cannot be had" in refusal(capsys, run, "--live", "--port", 70000)
    samples = (run / "samples.jsonl").read_bytes()
    for broken in (b"nonsense\n", b'{"step": 1, nonsense}\n'):
        (run / "samples.jsonl").write_bytes(broken + samples)
        assert "samples.jsonl, line 1 is not" in refusal(capsys, run)
    (run / "samples.jsonl").unlink()
    (run / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n')
    assert "metrics.jsonl, the line at byte 12 is not JSON" in refusal(capsys, run)
    (run / "metrics.jsonl").write_text("nonsense\n" + '{"step": 1, "seconds": 1.0, "pass_rate": 0.5}\n' * 20)
    assert "metrics.jsonl, line 1 is not JSON" in refusal(capsys, run)
    assert not list(tmp_path.glob("**/*.html"))


def test_rates_that_were_measured_otherwise_are_not_set_side_by_side(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, 20) for name in ("a", "b")]
    for run, temperatures in zip(runs, ((1.0, 1.0), (0.6, 1.0)), strict=True):
        path = run / "evaluations.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for number, line in enumerate(lines):
            line["measured"] = {"samples": 2, "temperature": temperatures[number > 1]}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = contents(runs)["runs"]
    assert first["before"] is not None and first["after"] is not None and not first["alarms"]
    assert second["before"] is None and second["after"] is not None
    assert "2 evaluations are left out, since they were measured otherwise" in second["alarms"][0]
    assert second["alarms"][0].endswith("temperature 0.6 and 1.0")

"""`megatron-sgopd plan` after a real run, whose stages it is corrected by."""

import json
from pathlib import Path

import pytest

from megatron_sgopd.cli import main

from .conftest import RECIPE, Finished


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_plan_is_corrected_by_the_stages_of_a_run(main_run: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(main_run.folder / "recipe.yaml")
    lines = main_run.metrics
    responses = 16
    middle = sorted(lines[1:], key=lambda line: line["response_tokens"])[len(lines[1:]) // 2]
    response_tokens = middle["response_tokens"] / responses
    prompt_tokens = middle["rows"] * 128 / responses - response_tokens
    lengths = [f"--prompt-tokens={prompt_tokens}", f"--response-tokens={response_tokens}"]
    arguments = [recipe, "--gpu=cpu-core", *lengths, f"--calibrate={main_run.folder}", "--json"]
    code, out, err = plan(capsys, *arguments)
    assert code == 0, err
    found = json.loads(out)["recipe"]["stage_seconds"]
    for stage in ("sync", "generate", "teacher", "reference", "train"):
        measured = sorted(line["stage_seconds"][stage] for line in lines[1:])
        assert found[stage] == pytest.approx(measured[len(measured) // 2]), stage


def test_what_a_plan_prints_names_phases_settings_and_the_run_that_corrected_it(
    main_run: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = plan(capsys, str(RECIPE), "--gpu=cpu-core", f"--calibrate={main_run.folder}")
    assert code == 0
    for words in (
        "2 x cpu-core",
        "own layout fits",
        "generate",
        "Best 1",
        "--set parallel.tensor=",
        str(main_run.folder),
    ):
        assert words in out, words


def test_a_folder_without_a_run_corrects_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = plan(capsys, str(RECIPE), "--gpu=cpu-core", f"--calibrate={tmp_path}")
    assert code == 2 and "holds no run of at least two steps" in err

"""`megatron-sgopd compare` on real, tiny runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sgopd.cli import main

from ..commands import set_words
from .conftest import RECIPE, REPOSITORY, SMALL

CHANGES: dict[str, Any] = SMALL | {"parallel.ranks": 1, "parallel.tensor": 1, "train.steps": 1}


def compare(*arguments: object) -> list[str]:
    return ["compare", str(RECIPE), *map(str, arguments), *set_words(CHANGES)]


@pytest.mark.long
def test_cells_are_run_resumed_and_told_apart_and_one_that_fails_loses_no_other(tmp_path: Path) -> None:
    out = tmp_path / "out"
    broken = "broken:sgopd.method=opd,alarms.teacher_floor=0.001"  # an alarm at the first step
    arguments = compare("--methods", "opd,grpo", "--variant", broken, "--seeds", 1, "--out", out, "--jobs", 2)
    command = [sys.executable, "-m", "megatron_sgopd.cli", *arguments]
    first = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=REPOSITORY)
    assert first.returncode == 1, "one cell failed"
    assert "cells/broken/seed_1: FAILED, code 1" in first.stdout
    table = (out / "RESULTS.md").read_text()
    assert (
        "| opd | 0.0003 | 1 | " in table
        and "| grpo | 0.0003 | 1 | " in table
        and "| broken | 0.0003 | 0 (1 failed)" in table
    )
    assert "megatron-sgopd compare" in table and "no verdict, for fewer than 3 seeds of both: grpo" in table
    finished = (out / "cells/opd/seed_1/metrics.jsonl").read_bytes()

    for name in ("metrics.jsonl", "summary.json"):  # what is kept beside the table is enough
        (out / f"cells/opd/seed_1/{name}").rename(out / name)
    kept = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=REPOSITORY)
    assert "2 of 3 runs are finished already" in kept.stdout and (out / "RESULTS.md").read_text() == table
    for name in ("metrics.jsonl", "summary.json"):
        (out / name).rename(out / f"cells/opd/seed_1/{name}")
    again = subprocess.run(
        [*command, "--again", "1"], capture_output=True, text=True, timeout=300, check=False, cwd=REPOSITORY
    )
    assert again.returncode == 0 and "opd, seed 1, once more: the same" in again.stdout
    second = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=REPOSITORY)
    assert "2 of 3 runs are finished already" in second.stdout
    assert (out / "cells/opd/seed_1/metrics.jsonl").read_bytes() == finished
    third = subprocess.run(
        [*command, "--set", "train.weight_decay=0.5"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=REPOSITORY,
    )
    assert third.returncode == 2 and "belongs to a run with train.weight_decay=0.0, not 0.5" in third.stderr
    prompts = [
        json.loads((out / f"cells/{name}/seed_1/samples.jsonl").read_text().splitlines()[0])["prompt"]
        for name in ("opd", "grpo")
    ]
    assert prompts[0] == prompts[1], "the same seed draws the same prompts"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--methods", "opd", "--variant", "other:data.heldout.seed=5"],
            "variant 'other' has other held-out problems than 'opd', or none",
        ),
        (["--methods", "opd"], "a comparison needs at least two variants"),
        (["--methods", "opd,sgopt"], "unknown sgopd.method 'sgopt': did you mean 'sgopd'"),
        (["--methods", "opd,grpo", "--baseline", "sgopd"], "--baseline 'sgopd' is not among the variants: opd, grpo"),
        (["--methods", "opd,grpo", "--learning-rates", "fast"], "--learning-rates 'fast' is not of the form"),
        (["--methods", "opd", "--variant", "mine"], "--variant 'mine' is not of the form NAME:SET"),
    ],
)
def test_bad_input(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert main(compare(*arguments, "--out", tmp_path / "out")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

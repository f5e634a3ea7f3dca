"""`megatron-sgopd noise-floor` on the arithmetic example: real rollouts, both models, every precision."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..commands import REPOSITORY
from .conftest import RECIPE


def noise_floor(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "megatron_sgopd.cli", "noise-floor", str(RECIPE), f"--out={out}", *more]
    words += ["--set=data.train.size=200", "--set=data.heldout=null", "--set=rollout.cache_gib=0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"cwd": REPOSITORY, "env": environment, "capture_output": True, "text": True}
    return subprocess.run(words, **options, check=False, timeout=240)


@pytest.mark.long
def test_each_precision_is_measured_and_a_second_call_takes_the_rollouts_that_are_there(tmp_path: Path) -> None:
    first = noise_floor(tmp_path, "--prompts=8")
    assert first.returncode == 0, first.stderr
    report = json.loads((tmp_path / "noise_floor.json").read_text())
    assert report["tokens"] > 100 and report["mean_delta"] > 0
    for model in ("teacher", "student"):
        found = report[model]
        assert list(found) == ["E4M3 tensorwise", "E4M3 tensorwise, ends in BF16", "E4M3 blockwise", "BF16"]
        assert all(one["mean"] > 0 and one["p90"] <= one["p99"] for one in found.values())
        assert found["BF16"]["mean"] < found["E4M3 tensorwise"]["mean"]
        assert all(one["flipped_weighted"] <= one["flipped"] + 1e-9 for one in found.values())
        assert f"{model} alone in lower precision" in first.stdout
    second = noise_floor(tmp_path, "--prompts=8")
    assert second.returncode == 0 and "8 of 8 problems are there already" in second.stdout
    assert json.loads((tmp_path / "noise_floor.json").read_text()) == report


def test_no_prompts_are_refused(tmp_path: Path) -> None:
    refused = noise_floor(tmp_path, "--prompts=0")
    assert refused.returncode == 2 and "--prompts is 0: give at least 1" in refused.stderr

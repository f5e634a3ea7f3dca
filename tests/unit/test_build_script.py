"""The script that compiles Transformer Engine and Apex says what is missing before it compiles anything."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "requirements/build_gpu.sh"


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, "--check", *arguments], capture_output=True, text=True, check=False)


def test_an_environment_without_torch_is_refused(tmp_path: Path) -> None:
    result = check(str(tmp_path))
    assert result.returncode == 2
    assert f"{tmp_path}/bin/python has no torch: install requirements/cuda.txt first" in result.stderr


def test_sources_that_are_none_are_refused(tmp_path: Path) -> None:
    result = check(sys.prefix, str(tmp_path))
    assert result.returncode == 2 and f"{tmp_path} has no setup.py" in result.stderr

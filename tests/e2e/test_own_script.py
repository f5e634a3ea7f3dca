"""A Megatron user's own script with the two lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

from .conftest import REPOSITORY


def test_two_lines_turn_a_plain_megatron_script_into_sgopd(tmp_path: Path):
    script = REPOSITORY / "examples/own_pretrain_script/run.sh"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RUN_DIR": str(tmp_path / "run"),
    }
    result = subprocess.run(
        ["bash", str(script)], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2]
    assert metrics[0]["logprob_gap"] < 1e-4

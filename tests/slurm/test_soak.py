"""Short versions of the soaks: three disturbances each, in other stages and at other moments every time."""

import json
import random
import subprocess
import sys

import pytest

from ..commands import REPOSITORY


@pytest.mark.long
@pytest.mark.parametrize("disturbance", ["preempt", "kill"])
@pytest.mark.usefixtures("cluster")  # skips where there is no Slurm
def test_a_job_that_is_disturbed_three_times_ends_as_one_that_was_not(disturbance: str) -> None:
    seed = random.randrange(1 << 30)
    command = [sys.executable, f"tools/soak/{disturbance}.py", "--times=3", f"--seed={seed}"]
    soak = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False)
    assert soak.returncode == 0, f"seed {seed}: {soak.stdout}{soak.stderr}"
    report = json.loads(soak.stdout.splitlines()[-1])
    assert report["disturbances"] == 3 and report["differs in"] == [] and report["longest end s"] < 60

"""What `slurm/job.sh` does with a job whose command fails or is cancelled, by a command that only notes its starts."""

import time
from pathlib import Path

import pytest

from ..commands import REPOSITORY
from .cluster import Cluster, wait_until

COMMAND = """\
#!/usr/bin/env bash
# The first start of the array's last task fails, and every other one takes a while.
echo "$SLURM_ARRAY_TASK_ID" >>"$STARTS"
if [ "$SLURM_ARRAY_TASK_ID" = 3 ] && [ "$(grep -c 3 "$STARTS")" = 1 ]; then exit 9; fi
sleep 10
"""


@pytest.fixture
def starts(cluster: Cluster, tmp_path: Path) -> Path:
    """The file that gets a line for each start."""
    command = tmp_path / "venv/bin/megatron-sgopd"
    command.parent.mkdir(parents=True)
    command.write_text(COMMAND)
    command.chmod(0o755)
    cluster.environment |= {"SGOPD_VENV": str(tmp_path / "venv"), "STARTS": str(tmp_path / "starts")}
    return tmp_path / "starts"


def submit_array(cluster: Cluster, tmp_path: Path) -> int:
    options = [f"--output={tmp_path}/%A_%a.out", "--array=1-3"]
    return cluster.submit(*options, "slurm/teacher_rollouts.sbatch", "RECIPE", "--bank", "BANK", cwd=REPOSITORY)


@pytest.mark.long
def test_of_an_array_only_the_task_that_failed_is_queued_again(cluster: Cluster, tmp_path: Path, starts: Path) -> None:
    # The last task has the number of the whole array, for Slurm.
    job = submit_array(cluster, tmp_path)
    wait_until(lambda: starts.is_file() and starts.read_text().count("3") == 2, 90)
    wait_until(lambda: not cluster.run(["squeue", "-h", f"--jobs={job}"]), 60)
    assert sorted(starts.read_text().split()) == ["1", "2", "3", "3"]


@pytest.mark.long
def test_a_job_that_is_cancelled_stays_so(cluster: Cluster, tmp_path: Path, starts: Path) -> None:
    job = submit_array(cluster, tmp_path)
    wait_until(lambda: starts.is_file() and "1" in starts.read_text() and "2" in starts.read_text(), 60)
    cluster.run(["scancel", str(job)])
    wait_until(lambda: not cluster.run(["squeue", "-h", f"--jobs={job}"]), 60)
    before = starts.read_text()
    time.sleep(15)  # a job that is queued again waits for five seconds here
    assert starts.read_text() == before and not cluster.run(["squeue", "-h", f"--jobs={job}"])

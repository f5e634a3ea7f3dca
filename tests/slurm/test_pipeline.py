"""The other scripts of slurm/: arrays of teacher rollouts, conversion and evaluation, and all of them in a chain."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sgopd.rollout.bank import RolloutBank

from ..commands import set_words
from ..e2e.conftest import RECIPE, REPOSITORY, SMALL
from .cluster import Cluster, wait_until

BANK = {"data.train.size": 400, "data.heldout": None, "teacher_rollouts.samples": 4, "rollout.cache_gib": 0.1}


@pytest.fixture(autouse=True)
def environment(cluster: Cluster) -> None:
    cluster.environment |= {"SGOPD_VENV": sys.prefix, "OMP_NUM_THREADS": "1", "SGOPD_PYTHON": sys.executable}


def test_the_scripts_are_clean() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck: make slurm-deps")
    scripts = [path for path in sorted((REPOSITORY / "slurm").rglob("*")) if path.suffix in (".sh", ".sbatch")]
    found = subprocess.run(["shellcheck", "-x", *scripts], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.long
def test_an_array_of_which_one_task_is_killed_and_run_again_fills_the_bank_once(
    cluster: Cluster, tmp_path: Path
) -> None:
    bank = tmp_path / "bank"
    task = ["slurm/teacher_rollouts.sbatch", str(RECIPE), "--all", "--bank", str(bank), *set_words(BANK)]
    options = [f"--output={tmp_path}/%A_%a.out", "--no-requeue"]
    job = cluster.submit(*options, "--array=1-4", *task, cwd=REPOSITORY)
    wait_until(lambda: (bank / "shards_4-3.lock").is_file(), 120)
    cluster.run(["scancel", "--signal=KILL", "--full", f"{job}_3"])
    wait_until(lambda: not cluster.run(["squeue", "-h", f"--jobs={job}"]), 180)
    assert len(RolloutBank(bank)) == 300, "the third share is missing"
    cluster.environment["SGOPD_SHARDS"] = "4"
    try:
        again = cluster.submit(*options, "--array=3", *task, cwd=REPOSITORY)
        assert cluster.wait(again, 180) == "COMPLETED"
    finally:
        del cluster.environment["SGOPD_SHARDS"]
    found = RolloutBank(bank)
    assert len(found) == 400 and found.rollouts == 1600
    assert all([r.sample for r in found.of(f"problem {number}")] == [0, 1, 2, 3] for number in range(400))


@pytest.mark.long
def test_the_whole_way_from_one_folder_to_another(cluster: Cluster, tmp_path: Path) -> None:
    settings = SMALL | {"train.steps": 4, "logging.tensorboard": False, "teacher_rollouts.weight": 0.5}
    settings |= {"teacher_rollouts.hold_steps": 1, "teacher_rollouts.end_step": 3, "teacher_rollouts.samples": 2}
    out, run_dir = tmp_path / "out", tmp_path / "run"
    said = cluster.run(["slurm/pipeline.sh", str(RECIPE), str(run_dir), str(out), *set_words(settings)], cwd=REPOSITORY)
    jobs = [int(line.split(":")[0]) for line in said.splitlines()[:-1]]
    assert len(jobs) == 5 and said.splitlines()[-1] == f"cancel all: scancel {' '.join(map(str, jobs))}"
    outputs = lambda: "\n".join(path.read_text()[-2000:] for path in sorted(out.glob("*.out")))  # noqa: E731
    for job in jobs:
        assert cluster.wait(job, 240) == "COMPLETED", outputs()
    results = json.loads((out / "eval/results.json").read_text())
    assert results["scores"]["heldout"]["problems"] == 256
    assert (out / "model/model.safetensors").is_file() and (out / "model/tokenizer.json").is_file()
    rollouts = [json.loads(line)["teacher_rollouts"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rollouts[0] > 0 and rollouts[3] == 0

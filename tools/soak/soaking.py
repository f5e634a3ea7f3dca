"""A job on a real Slurm that is disturbed many times, and must end as one that was not."""

from __future__ import annotations

import functools
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_sgopd.checkpoint.completeness import newest_step
from megatron_sgopd.monitor.attempts import Attempt, read_attempts
from megatron_sgopd.monitor.heartbeat import read_beats

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))
from tests.commands import same_students, set_words  # noqa: E402
from tests.slurm.cluster import Cluster, running, wait_until  # noqa: E402

RECIPE = REPOSITORY / "examples/arithmetic_cpu/recipe.yaml"
STAGES = ("sync", "generate", "verify", "teacher", "reference", "train", "record", "save")
_TIMES = {"seconds", "stage_seconds", "unexplained_share", "tokens_per_second", "memory_mib", "phase_memory_mib"}
"""Of metrics that depend on when, not on what."""
_COUNTS = {"teacher_forwards", "reference_forwards", "weight_version"}
"""Of the attempt, not of the run."""
_ATTEMPT_SECONDS = 120


@dataclass
class Soak:
    """A job and its disturbances."""

    cluster: Cluster
    folder: Path
    steps: int
    random: random.Random
    settings: Mapping[str, Any]
    """Of the recipe, besides those that all soaks change."""
    job: int = 0

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def submit(self, run_dir: Path) -> int:
        settings = {
            "run_dir": str(run_dir),
            "rollout.prompts_per_step": 8,
            "rollout.cache_gib": 0.1,
            "train.steps": self.steps,
            "train.rows_per_microbatch": 2,
            "data.heldout": None,
            "checkpoint.every": 2,
            "checkpoint.keep_last": 3,
            "logging.samples_every": 0,
            "logging.tensorboard": False,
            "evaluate.teacher": False,
            **self.settings,
        }
        run_dir.mkdir(parents=True)
        words = [f"--output={run_dir}/job.out", "slurm/train.sbatch", str(RECIPE), *set_words(settings)]
        environment = {"SGOPD_VENV": sys.prefix, "OMP_NUM_THREADS": "1", "SGOPD_MAX_ATTEMPTS": "1000"}
        self.cluster.environment |= environment | {"PYTHONPATH": str(REPOSITORY)}
        return self.cluster.submit(*words, cwd=REPOSITORY)

    def ranks(self) -> list[psutil.Process]:
        """The processes of the attempt that is going on, by rank."""
        return self.cluster.ranks(self.job)

    def _attempted(self, times: int) -> bool:
        return len(read_attempts(self.run_dir)) == times

    def disturb(self, times: int, disturbance: Callable[[Soak, int], None]) -> list[float]:
        """Disturb so many attempts; seconds that each then took to end."""
        took = []
        for number in range(times):
            wait_until(functools.partial(self._attempted, number + 1), _ATTEMPT_SECONDS)
            disturbance(self, number)
            disturbed = time.monotonic()
            wait_until(lambda: not self.ranks(), 60)
            took.append(time.monotonic() - disturbed)
            wait_until(lambda: self.cluster.state(self.job) == "PENDING", 120)
            step = newest_step(self.run_dir / "checkpoints")
            print(f"{number + 1} of {times}: {took[-1]:.1f} s, {step} of {self.steps} steps saved", flush=True)
        return took

    def wait_for(self, stage: str, step: int = 0) -> None:
        """Until the first rank enters a stage, in which it may be for milliseconds, after `step` steps or more."""
        since = time.time()
        while not any(
            b.stage == stage and b.rank == 0 and b.time >= since and b.step >= step for b in read_beats(self.run_dir)
        ):
            if time.time() > since + _ATTEMPT_SECONDS:
                raise TimeoutError(f"no rank was in {stage} after {step} steps for {_ATTEMPT_SECONDS} s")

    def received(self) -> Counter[str]:
        """Stages in which signals were received, and how many."""
        reasons = [attempt.reason.partition("received in ")[2] for attempt in read_attempts(self.run_dir)]
        return Counter(stage for reason in reasons if (stage := reason.partition(",")[0]))

    def faults(self) -> list[str]:
        """In what the run differs from the one that was not disturbed."""
        runs = self.run_dir, self.folder / "undisturbed"
        lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
        kept = [[{k: v for k, v in line.items() if k not in _TIMES | _COUNTS} for line in each] for each in lines]
        faults = ["metrics"] * (kept[0] != kept[1])
        return faults + ["weights"] * (not same_students(*runs, self.folder))


def soak(
    steps: int, times: int, seed: int, disturbance: Callable[[Soak, int], None], **settings: Any
) -> dict[str, Any]:
    """Run a job undisturbed and one disturbed, and compare them: the report that the tools print."""
    with tempfile.TemporaryDirectory(prefix="soak") as folder, running(Path(folder) / "slurm", 2) as cluster:
        one = Soak(cluster, Path(folder), steps, random.Random(seed), settings)
        undisturbed = one.submit(one.folder / "undisturbed")
        assert cluster.wait(undisturbed, 60 * steps) == "COMPLETED", "the undisturbed job failed"
        one.job = one.submit(one.run_dir)
        took = one.disturb(times, disturbance)
        state = cluster.wait(one.job, 60 * steps)
        attempts: list[Attempt] = read_attempts(one.run_dir)
        faults = one.faults() if state == "COMPLETED" else [f"the job ended as {state}"]
        report = {
            "disturbances": times,
            "attempts": len(attempts),
            "outcomes": dict(Counter(attempt.outcome for attempt in attempts)),
            "received in": dict(one.received()),
            "broken checkpoints": (one.run_dir / "job.out").read_text().count("kept as iter_"),
            "longest end s": round(max(took), 1),
            "differs in": faults,
        }
        if faults:
            kept = Path(tempfile.mkdtemp(prefix="soak_failed"))
            one.run_dir.rename(kept / "run")
            report["kept"] = str(kept)
    return report

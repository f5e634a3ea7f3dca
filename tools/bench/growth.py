""".venv/bin/python tools/bench/growth.py [--run STEPS] [--json]

Costs that might grow with a run's past or with its data: starts, status and report at 100,000 steps, a million prompts,
banks of long responses, answers on their way to verifiers. Each is measured in a process of its own, whose memory is
counted from after its imports.

--run trains so many steps on four recorded batches instead, and compares the last thousand with the first.
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from reporting import Figure, parser, report

RECIPE = Path(__file__).parents[2] / "examples/arithmetic_cpu/recipe.yaml"
STUDENT = RECIPE.parent / "models/student"
STEPS, PROMPTS = 100_000, 1_000_000
MIB = 1 << 20


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--run", type=int, metavar="STEPS", help="train so many steps instead")
    arguments.add_argument("--measure", choices=MEASURES, help="one of them, in this process")
    arguments.add_argument("--folder", type=Path, help="of what is measured")
    options = arguments.parse_args()
    if options.measure:
        print(json.dumps(MEASURES[options.measure](options.folder)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = long_run(folder, options.run) if options.run else table(folder)
    return report("growth", figures, options.json)


# ---- The table ------------------------------------------------------------------------------------------


def table(folder: Path) -> list[Figure]:
    """All figures, with the limits that they are held to."""
    write_past(folder / "run")
    write_prompts(folder / "prompts.jsonl")
    os.environ["SGOPD_CACHE"] = str(folder / "cache")
    command("status", folder / "run")  # whose first start reads the libraries from the disk
    status_seconds, status_mib = command("status", folder / "run")
    report_seconds, report_mib = command("report", folder / "run")
    measured("prompts", folder)
    found = {name: measured(name, folder) for name in MEASURES}
    return [
        Figure("start with 178 MiB of samples", found["samples"]["seconds"], "s", at_most=0.2),
        Figure("  its memory", found["samples"]["mib"], "MiB", at_most=20),
        Figure(f"status at {STEPS} steps", status_seconds, "s", at_most=0.5),
        Figure("  its memory, libraries included", status_mib, "MiB", at_most=100),
        Figure(f"resume at {STEPS} steps", found["resume"]["seconds"], "s", at_most=1),
        Figure("  its memory", found["resume"]["mib"], "MiB", at_most=20),
        Figure(f"report at {STEPS} steps", report_seconds, "s", at_most=5),
        Figure("  its memory, libraries included", report_mib, "MiB", at_most=300),
        Figure("  live, for one step more", found["live"]["seconds"], "s", at_most=2),
        Figure(f"{PROMPTS} prompts, from the second start on", found["prompts"]["seconds"], "s", at_most=2),
        Figure("  a rank's memory, what is mapped included", found["prompts"]["mib"], "MiB", at_most=100),
        Figure("bank: written and looked up, 10^6 tokens", found["bank"]["seconds"], "s", at_most=0.36),
        Figure("  its memory", found["bank"]["mib"], "MiB", at_most=13.7),
        Figure("answers to verifiers, over their text", found["answers"]["ratio"], "", at_most=2),
    ]


def write_past(run: Path) -> None:
    """A run folder with as many numbers as a real one's."""
    run.mkdir()
    random.seed(0)
    names = [f"number_{i}" for i in range(55)]
    stages = ("sync", "generate", "pack", "verify", "teacher", "reference", "train", "record")
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, STEPS + 1):
            line: dict[str, Any] = {name: random.gauss(0, 1) for name in names}
            line |= {"step": step, "seconds": 8.0, "pass_rate": random.random(), "verifier_timeout": 0}
            file.write(json.dumps(line | {"stage_seconds": {stage: random.random() for stage in stages}}) + "\n")
    tokens = {"text": ["word"] * 1000, "delta": [0.1234] * 1000, "student": [-1.2345] * 1000, "gate": "a" * 1000}
    with (run / "samples.jsonl").open("w") as file:
        step = 1
        while file.tell() < 178 * MIB:
            file.write(json.dumps({"step": step, "prompt": "p", "outcome": 1, "tokens": tokens}) + "\n")
            step += 1
    scores = {"avg@8": {"mean": 0.5, "low": 0.4, "high": 0.6}}
    with (run / "evaluations.jsonl").open("w") as file:
        for step in range(0, STEPS + 1, 500):
            line = {"name": "step", "step": step, "pass_rate": 0.5, "samples": 8, "scores": scores}
            file.write(json.dumps(line | {"by_problem": [0.125] * 500}) + "\n")


def write_prompts(path: Path) -> None:
    with path.open("w") as file:
        for number in range(PROMPTS):
            prompt = (
                f"What is {number} + {7 * number % 1000} - {number % 13}? Think about it, then give the number alone."
            )
            file.write(json.dumps({"prompt": prompt, "answer": str(number)}) + "\n")


def command(*words: object) -> tuple[float, float]:
    """Wall-clock seconds and MiB of a command of ours."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_sgopd.cli", *map(str, words)], stdout=subprocess.DEVNULL
    )
    _, code, used = os.wait4(process.pid, 0)
    assert code == 0, f"{words}: {code}"
    return time.monotonic() - began, used.ru_maxrss / 1024


def measured(name: str, folder: Path) -> dict[str, float]:
    """What a process of its own finds."""
    words = [sys.executable, __file__, "--measure", name, "--folder", str(folder)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def taken(work: Callable[[], object]) -> dict[str, float]:
    """Seconds, and MiB at most beyond what there was before."""
    # Beyond what the imports took at most, which is more than what they kept.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    now = psutil.Process().memory_info().rss / MIB
    ballast = bytearray(max(0, int((before - now) * MIB)))
    ballast[::4096] = b"x" * len(ballast[::4096])
    began = time.monotonic()
    work()
    seconds = time.monotonic() - began
    return {"seconds": seconds, "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before}


def samples(folder: Path) -> dict[str, float]:
    from megatron_sgopd.monitor.lines import drop_later_steps

    path = folder / "run/samples.jsonl"
    return taken(lambda: drop_later_steps(path, 10_000))


def resume(folder: Path) -> dict[str, float]:
    from megatron_sgopd.monitor.attempts import read_attempts
    from megatron_sgopd.monitor.lines import drop_later_steps, last_json_lines

    def start() -> None:
        read_attempts(folder / "run")
        for name in ("metrics", "evaluations"):
            drop_later_steps(folder / f"run/{name}.jsonl", STEPS - 10, folder / f"{name}.superseded")
        next(last_json_lines(folder / "run/metrics.jsonl"))

    return taken(start)


def live(folder: Path) -> dict[str, float]:
    from megatron_sgopd.report.contents import Contents
    from megatron_sgopd.report.page import packed

    contents, path = Contents([folder / "run"]), folder / "run/metrics.jsonl"
    packed(contents())
    with path.open("rb") as file:
        file.seek(-4000, os.SEEK_END)
        line = file.read().splitlines()[-1]
    with path.open("ab") as file:
        file.write(line + b"\n")
    return taken(lambda: packed(contents()))


def prompts(folder: Path) -> dict[str, float]:
    from megatron_sgopd.config import PromptSettings
    from megatron_sgopd.rollout.prompt_cache import load_prompts
    from megatron_sgopd.rollout.prompts import PromptStream

    settings = PromptSettings(source=str(folder / "prompts.jsonl"), chat_template=False)

    def start() -> None:
        [found] = load_prompts([settings], str(STUDENT))
        assert len(PromptStream(found, 1234).next(64)) == 64

    return taken(start)


def bank(folder: Path) -> dict[str, float]:
    from megatron_sgopd.rollout.bank import BankIdentity, RolloutBank, StoredRollout, writing

    identity = BankIdentity("m", "t", "p", 4, 1.0, 1.0, 0, "[]", 32768, 0, "math")
    tokens = array("i", range(32_768))
    rollouts = [
        StoredRollout(f"problem {number}", sample, tokens[:], "text " * 100, False, 1, "1", "right")
        for number in range(64)
        for sample in range(4)
    ]
    count = len(rollouts) * len(tokens) / 1e6

    def work(name: str, count: int) -> None:
        with writing(folder / name, identity, "train-0") as writer:
            writer.write(rollouts[: 4 * count])
        found = RolloutBank(folder / name)
        for number in range(count):
            assert len(found.of(f"problem {number}")) == 4

    work("first_bank", 1)  # libraries load at the first
    used = taken(lambda: work("bank", 64))
    return {name: value / count for name, value in used.items()}


def answers(folder: Path) -> dict[str, float]:
    from megatron_sgopd.config import VerifySettings
    from megatron_sgopd.platform import select
    from megatron_sgopd.processes import joined_ranks
    from megatron_sgopd.rollout.prompts import Prompt
    from megatron_sgopd.rollout.trajectory import Trajectory
    from megatron_sgopd.verify.stage import Verification

    class Decodes:
        def batch_decode(self, token_ids: list[list[int]], skip_special_tokens: bool) -> list[str]:
            return ["x" * 65_000 + f" {number}" for number in range(len(token_ids))]

    prompt = Prompt("problem 0", "1 + 1", (1,), "2", "", {})
    trajectories = [Trajectory(prompt, sample, (1,), (0.0,), truncated=False) for sample in range(2000)]
    select("cpu")
    with joined_ranks():
        verification = Verification(VerifySettings(verifier="exact"), Decodes())
        verification.start(trajectories[:8])()

        def work() -> None:
            verification.start(trajectories)()
            assert len(verification.all_texts()) == len(verification.all_results()) == len(trajectories)

        used = taken(work)
        verification.close()
    return used | {"ratio": used["mib"] * MIB / (65_005 * len(trajectories))}


MEASURES = {
    "samples": samples,
    "resume": resume,
    "live": live,
    "prompts": prompts,
    "bank": bank,
    "answers": answers,
}


# ---- A long run -----------------------------------------------------------------------------------------


def long_run(folder: Path, steps: int) -> list[Figure]:
    """Steps of the arithmetic example on four recorded batches of four responses, one rank."""
    settings: dict[str, Any] = {
        "rollout.prompts_per_step": 2,
        "rollout.group_size": 2,
        "rollout.max_new_tokens": 64,
        "rollout.cache_gib": 0.1,
        "train.row_tokens": 128,
        "train.rows_per_microbatch": 2,
        "train.warmup_steps": 0,
        "train.learning_rate": 1e-9,
        "train.min_learning_rate": 0.0,
        "parallel.ranks": 1,
        "parallel.tensor": 1,
        "data.train.size": 200,
        "data.heldout.size": 8,
        "evaluate.samples": 1,
        "evaluate.teacher": False,
        "checkpoint.every": 1000,
        "checkpoint.keep_last": 2,
    }
    train(settings | {"train.steps": 4, "run_dir": str(folder / "first"), "logging.record": str(folder / "recorded")})
    train(settings | {"train.steps": steps, "run_dir": str(folder / "run"), "logging.replay": str(folder / "recorded")})
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == steps
    share = min(1000, steps // 4)
    figures = []
    for name, unit, limit in (("seconds", "s", 1.1), ("memory_mib", "MiB", 1.05)):
        # The first steps build what all later ones use.
        first, last = (
            statistics.median(line[name] for line in part) for part in (lines[100 : 100 + share], lines[-share:])
        )
        figures += [
            Figure(f"{name}, median of the last {share} of {steps}", last, unit, floor=first),
            Figure("  over that of the first", last / first, "", at_most=limit),
        ]
    return figures


def train(settings: dict[str, Any]) -> None:
    words = [sys.executable, "-m", "megatron_sgopd.cli", "train", str(RECIPE)]
    for name, value in settings.items():
        words += ["--set", f"{name}={json.dumps(value)}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=environment, cwd=RECIPE.parents[2])


if __name__ == "__main__":
    sys.exit(main())

"""`megatron-sgopd status`: how runs are, while they run and after."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sgopd.common.console import Terminal, styled
from megatron_sgopd.monitor.attempts import read_attempts
from megatron_sgopd.monitor.heartbeat import read_beats
from megatron_sgopd.monitor.output import is_claimed

if TYPE_CHECKING:
    from megatron_sgopd.report.runs import RunFolder

_LONGEST_REASON = 120
_SHOWN = ("loss", "pass_rate", "agree", "reverse_kl", "logprob_gap", "grad_norm", "tokens_per_second")


def add_command(commands: Any) -> None:
    """Add the command to the command line."""
    command = commands.add_parser(
        "status",
        help="say how runs are: step, time left, attempts and what ended them",
        description="Read run folders, of runs that go on or have ended, and say for each its state, step, time left, "
        "last measures, attempts with their reasons, and, where squeue is found, the state of its Slurm job.",
        epilog="Example: megatron-sgopd status runs/demo",
    )
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    command.add_argument("--json", action="store_true", help="one JSON object for each run, one a line")
    command.set_defaults(run=_status)


def _status(arguments: argparse.Namespace) -> int:
    from megatron_sgopd.report.runs import read_run

    found = [status(read_run(path)) for path in arguments.runs]
    for one in found:
        if arguments.json:
            print(json.dumps(one))
        else:
            _show(one)
    return 0


def status(run: RunFolder) -> dict[str, Any]:
    """What there is to say of a run, as plain values; seconds where a name ends so."""
    attempts = read_attempts(run.path)
    running = is_claimed(run.path)
    last = attempts[-1] if attempts else None
    over = last.outcome if last else "finished" if run.ended else "not begun"
    state = "running" if running else over
    last_step = run.recent[-1] if run.recent else {}
    recent = [line["seconds"] for line in run.recent]
    steps = run.recipe["train"]["steps"] if run.recipe else None
    left = (steps - run.step) * sum(recent) / len(recent) if recent and steps is not None else None
    beats = read_beats(run.path)
    return {
        "run": str(run.path),
        "state": state,
        "step": run.step,
        "steps": steps,
        "left_seconds": left,
        "stages": [asdict(beat) | {"age_seconds": time.time() - beat.time} for beat in beats] if running else [],
        "metrics": {name: last_step[name] for name in _SHOWN if _can_be_shown(last_step.get(name))},
        "evaluations": [{name: line[name] for name in ("name", "step", "pass_rate")} for line in run.evaluations()],
        "attempts": [asdict(attempt) for attempt in attempts],
        "alarms": run.alarms,
        "job": _job(last.job) if last and last.job else None,
    }


def _can_be_shown(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 53)


def _job(number: str) -> dict[str, str] | None:
    """What squeue says of a job; None where there is no squeue, or the job is over."""
    if not shutil.which("squeue"):
        return None
    command = ["squeue", "--noheader", f"--jobs={number}", "--format=%T|%r|%S"]
    words = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip().split("|")
    return dict(zip(("state", "reason", "start"), words, strict=True)) if len(words) == 3 else None


def _show(one: dict[str, Any]) -> None:
    console = Terminal()
    of = f" of {one['steps']}" if one["steps"] else ""
    left = f", left {timedelta(seconds=round(one['left_seconds']))}" if one["left_seconds"] else ""
    console.print(styled(f"{one['run']}: {one['state']}, step {one['step']}{of}{left}", "bold"))
    for beat in sorted(one["stages"], key=lambda beat: beat["time"])[:1]:
        longest = f"rank {beat['rank']} on {beat['host']}"
        console.print(f"  in {beat['stage']} of step {beat['step'] + 1} for {beat['age_seconds']:.0f} s ({longest})")
    if one["metrics"]:
        known = {name: value for name, value in one["metrics"].items() if value is not None}
        console.print("  " + "  ".join(f"{name} {value:.4g}" for name, value in known.items()))
    if one["evaluations"]:
        last = one["evaluations"][-1]
        console.print(f"  held-out pass rate {last['pass_rate']:.1%} ({last['name']}, step {last['step']})")
    if one["job"]:
        console.print(f"  Slurm: {one['job']['state']}, {one['job']['reason']}, start {one['job']['start']}")
    for text in one["alarms"]:
        console.print(f"  {text}")
    for attempt in one["attempts"]:
        to = "" if attempt["reached"] is None else f" to {attempt['reached']}"
        job = f", job {attempt['job']}" if attempt["job"] else ""
        outcome = attempt["outcome"] if one["state"] != "running" or attempt["ended"] else "going on"
        reason = attempt["reason"].partition("\n")[0][:_LONGEST_REASON]
        said = reason if outcome == "stopped" else f"{outcome}, {reason}" if reason else outcome
        words = f"{attempt['began']} on {attempt['host']}{job}, from step {attempt['step']}{to}: {said}"
        console.print(f"  attempt {attempt['number']}  {words}")

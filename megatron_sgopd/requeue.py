"""`megatron-sgopd requeue`: whether a batch job that has ended should be started again."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_sgopd.arguments import add_set
from megatron_sgopd.checkpoint.completeness import newest_step
from megatron_sgopd.monitor.attempts import Attempt, begin_attempt, end_attempt, read_attempts
from megatron_sgopd.monitor.diagnosis import diagnosis
from megatron_sgopd.monitor.output import is_claimed, run_folder

_USELESS = {"refused": "its input is bad", "alarm": "an alarm stopped it, and the same numbers would again"}
_LONGEST_WAIT = 60


def add_command(commands: Any) -> None:
    """Add the command to the command line."""
    command = commands.add_parser(
        "requeue",
        help="say whether a batch job whose attempt at training has ended should be queued again",
        description="For batch scripts (slurm/train.sbatch). Prints `again`, after some seconds where what failed may "
        "need them to come back, or `stop`; the reason goes to stderr.",
    )
    command.add_argument("recipe", metavar="RECIPE", help="as given to train")
    add_set(command)
    command.add_argument("--code", type=int, required=True, help="exit code of the attempt")
    command.add_argument(
        "--since", type=float, default=0.0, metavar="SECONDS", help="when it was started, in seconds since 1970"
    )
    command.add_argument(
        "--max-attempts", type=int, default=4, metavar="N", help="attempts in a row without a new checkpoint (4)"
    )
    command.set_defaults(run=_requeue)


def _requeue(arguments: argparse.Namespace) -> int:
    from megatron_sgopd.recipe import load_recipe

    run_dir = run_folder(load_recipe(arguments.recipe, arguments.set))
    if is_claimed(run_dir):  # the job's own ranks have ended
        print(f"requeue: no, another process trains in {run_dir}", file=sys.stderr)
        print("stop")
        return 0
    step = newest_step(run_dir / "checkpoints")
    _note_if_never_begun(run_dir, step, arguments.code, arguments.since)
    attempts = read_attempts(run_dir)
    again, reason = decide(attempts, step, arguments.max_attempts)
    orderly = attempts[-1].outcome in ("finished", "stopped")
    if not orderly and (said := diagnosis(run_dir)):
        print(f"attempt {len(attempts)}: {said}", file=sys.stderr)
    print(f"requeue: {'yes' if again else 'no'}, {reason}", file=sys.stderr, flush=True)
    if again and not orderly:  # what failed may need a moment to come back
        time.sleep(min(_LONGEST_WAIT, 5 * 2 ** idle_attempts(attempts, step)))
    print("again" if again else "stop")
    return 0


def _note_if_never_begun(run_dir: Path, step: int, code: int, since: float) -> None:
    """Record an attempt that ended before it could do so itself, so that it is counted."""
    attempts = read_attempts(run_dir)
    if not attempts or datetime.fromisoformat(attempts[-1].began).timestamp() < int(since):
        begin_attempt(run_dir, step)
        end_attempt(run_dir, step, code, f"it ended with code {code} before it could begin: see the job's output")


def decide(attempts: Sequence[Attempt], step: int, most: int) -> tuple[bool, str]:
    """Whether to start a run again, and why.

    Args:
        attempts: all so far, one at least.
        step: steps in the newest checkpoint.
        most: attempts in a row that may end without a new checkpoint.
    """
    last = attempts[-1]
    if last.outcome == "finished":
        return False, "the run is finished"
    if last.outcome in _USELESS:
        return False, f"{_USELESS[last.outcome]}: {last.reason}"
    idle = idle_attempts(attempts, step)
    said = (
        last.reason
        if last.outcome == "stopped"
        else f"the last one was {last.outcome}: {last.reason or 'no word of it'}"
    )
    if idle >= most:
        return False, f"{idle} attempts in a row made no new checkpoint after step {step}; {said}"
    return True, f"from step {step}; {said}"


def idle_attempts(attempts: Sequence[Attempt], step: int) -> int:
    """How many of the last attempts began with the newest checkpoint that there is."""
    return len(list(itertools.takewhile(lambda attempt: attempt.step == step, reversed(attempts))))

"""RUN_DIR/attempts.jsonl: when each attempt at a run began, from which checkpoint, and how it ended."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_sgopd.checkpoint.files import write_atomically
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.monitor.heartbeat import HEARTBEATS
from megatron_sgopd.monitor.lines import append_json_line, is_cut, read_json_lines
from megatron_sgopd.monitor.output import EXIT_STOPPED, error_files
from megatron_sgopd.processes import node_name

ATTEMPTS = "attempts.jsonl"
OUTCOMES = {0: "finished", 1: "failed", 2: "refused", 3: "alarm", EXIT_STOPPED: "stopped"}
"""By exit code: refused for bad input; stopped because it was asked to, and saved."""


@dataclass(frozen=True)
class Attempt:
    """From a start to an end."""

    number: int
    """From 1 on."""
    began: str
    """ISO 8601, UTC."""
    step: int
    """Steps in the newest checkpoint when it began."""
    job: str | None
    """Slurm's number of the job."""
    host: str
    """Of the first rank."""
    ended: str | None = None
    reached: int | None = None
    """Steps in the newest checkpoint when it ended."""
    outcome: str = "killed"
    """One of OUTCOMES; killed if the attempt wrote no end, or is going on."""
    reason: str = ""
    """In words."""


_ATTEMPTS = TypeAdapter(list[Attempt])


def begin_attempt(run_dir: Path, step: int) -> None:
    """Note that an attempt begins, by the first rank, before others have heartbeats: it removes the last attempt's.

    Each rank removes its own error of then; those of ranks that there are no more go here.
    """
    path = run_dir / ATTEMPTS
    shutil.rmtree(run_dir / HEARTBEATS, ignore_errors=True)
    for rank, error in error_files(run_dir).items():
        if rank >= int(os.environ.get("WORLD_SIZE", "1")):
            error.unlink(missing_ok=True)
    if is_cut(path):
        write_atomically(path, path.read_bytes().rpartition(b"\n")[0] + b"\n")
    job = os.environ.get("SLURM_JOB_ID")
    append_json_line(path, {"event": "begin", "time": _now(), "step": step, "job": job, "host": node_name()})


def end_attempt(run_dir: Path, step: int, code: int, reason: str) -> None:
    """Note how the attempt that began last has ended."""
    outcome = OUTCOMES.get(code, OUTCOMES[1])
    line = {"event": "end", "time": _now(), "step": step, "outcome": outcome, "reason": reason}
    append_json_line(run_dir / ATTEMPTS, line)


def read_attempts(run_dir: Path) -> list[Attempt]:
    """All attempts, the oldest first; the last one may be going on.

    Raises:
        ConfigError: the file is not as a run writes it.
    """
    attempts: list[dict[str, Any]] = []
    try:
        for line in read_json_lines(run_dir / ATTEMPTS):
            if line["event"] == "begin":
                begun = {name: line[name] for name in ("step", "job", "host")}
                attempts.append({"number": len(attempts) + 1, "began": line["time"], **begun})
            else:
                attempts[-1] |= {"ended": line["time"], "reached": line["step"]}
                attempts[-1] |= {name: line[name] for name in ("outcome", "reason")}
        return _ATTEMPTS.validate_python(attempts)
    except (KeyError, IndexError, ValidationError) as error:
        reason = " ".join(repr(error).split())
        raise ConfigError(f"{run_dir / ATTEMPTS} is not as a run writes it ({reason}): move it away") from None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

"""Where a rank's output goes: progress to the terminal, third-party noise to a file, errors to both."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sgopd.checkpoint.files import locked
from megatron_sgopd.common.console import Terminal
from megatron_sgopd.common.ownership import check_ours, keep_private
from megatron_sgopd.errors import Alarm, ConfigError, Stopped
from megatron_sgopd.processes import is_first_rank

if TYPE_CHECKING:
    from megatron_sgopd.config import Settings

LOGS, METRICS, SAMPLES, EVALUATIONS = "logs", "metrics.jsonl", "samples.jsonl", "evaluations.jsonl"
SUMMARY = "summary.json"
RESOLVED = "recipe.yaml"
"""The recipe with all its defaults."""
EXIT_STOPPED = os.EX_TEMPFAIL
"""A run was asked to stop and has saved: whoever gets this exit code starts it again."""
_EXIT_CODES: dict[type[BaseException], int] = {ConfigError: 2, Alarm: 3}
_LOCK = "run.lock"
_LONGEST_LOOK = 3
"""Seconds for which somebody who only looks may keep the lock."""
_LONGEST_LEASE = 120
"""Seconds for which a lost node may."""
_terminal: int | None = None


def console() -> Terminal:
    """The user's terminal, also where this process's own stdout goes to a file."""
    return Terminal(None if _terminal is None else os.fdopen(os.dup(_terminal), "w"))


def _redirect(log: Path) -> None:
    """Send what this process writes from now on to a file; `console` still reaches the terminal."""
    global _terminal
    _terminal = os.dup(1)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


@contextlib.contextmanager
def libraries_write_to(log: Path) -> Iterator[Terminal]:
    """Keep the terminal for what the console is given; everything else goes to a file."""
    global _terminal
    saved = os.dup(1), os.dup(2)
    _redirect(log)
    try:
        yield console()
    finally:
        for number, descriptor in enumerate(saved, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        _terminal = None


def run_folder(settings: Settings) -> Path:
    """The folder of a run, which is made if it is not there yet.

    Raises:
        ConfigError: it cannot be made, nothing can be written there, or others can have written there.
    """
    folder = Path(settings.run_dir)
    if settings.private:
        keep_private()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir={folder} cannot be made ({error.strerror}): choose another one") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"run_dir={folder} cannot be written to: mend its permissions, or those of the file system that it is on, "
            "or choose another one"
        )
    if is_first_rank():
        check_ours(folder, settings.private)
    return folder


@contextlib.contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Be the only one to train in a run folder.

    Raises:
        ConfigError: another process does, and goes on for some seconds; minutes in a batch job that was started
            again, since a network file system takes so long to notice that a node is lost.
    """
    patience = _LONGEST_LEASE if "SLURM_RESTART_COUNT" in os.environ else _LONGEST_LOOK
    deadline = time.monotonic() + patience
    with (run_dir / _LOCK).open("a") as file:
        while not locked(file):
            if time.monotonic() < deadline:
                time.sleep(0.5)
                continue
            raise ConfigError(f"{run_dir} is being trained in by another process: wait for it, or set another run_dir")
        yield


def is_claimed(run_dir: Path) -> bool:
    """Whether somebody trains in a run folder now."""
    if not (run_dir / _LOCK).is_file():
        return False
    with (run_dir / _LOCK).open() as file:
        return not locked(file, shared=True)


def error_files(run_dir: Path) -> dict[int, Path]:
    """The last words of ranks that have left some, by rank."""
    paths = {path.stem.removeprefix("rank-"): path for path in (run_dir / LOGS).glob("rank-*.error")}
    return {int(rank): path for rank, path in paths.items() if rank.isdecimal() and path.is_file()}


@dataclass
class Result:
    """How a rank ended."""

    code: int = 0
    reason: str = ""


@contextlib.contextmanager
def reporting_errors(run_dir: str | Path, quiet: bool) -> Iterator[Result]:
    """Run a rank's work with its output in RUN_DIR/logs/rank-N.log if `quiet`.

    What goes wrong is also written to rank-N.error, for the launcher: an error of the user's input or an alarm as its
    message alone, anything else with its traceback. Where that cannot be written, it goes to the terminal.
    """
    rank = os.environ.get("RANK", "0")
    logs = Path(run_dir) / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    error_file = logs / f"rank-{rank}.error"
    error_file.unlink(missing_ok=True)  # an earlier attempt's
    if quiet:
        _redirect(logs / f"rank-{rank}.log")
    result = Result()
    try:
        yield result
    except Stopped as stopped:
        result.code, result.reason = EXIT_STOPPED, str(stopped)
    except SystemExit as exit_:  # Megatron leaves this way over a flag that it does not know
        result.code = exit_.code if isinstance(exit_.code, int) else 1
        result.reason = f"Megatron ended it with exit code {result.code}"
        if result.code:
            _leave_word(error_file, result.reason)
    except BaseException as error:  # torch's CheckpointException is no Exception
        result.code = _EXIT_CODES.get(type(error), 1)
        result.reason = str(error) or type(error).__name__
        _leave_word(error_file, traceback.format_exc() if result.code == 1 else str(error))
        with contextlib.suppress(OSError):  # the disk of the log may be full
            traceback.print_exc()


def _leave_word(error_file: Path, text: str) -> None:
    try:
        error_file.write_text(text)
    except OSError as failure:
        console().print(f"{error_file} cannot be written ({failure.strerror}). What it would say:\n{text}")
        error_file.unlink(missing_ok=True)

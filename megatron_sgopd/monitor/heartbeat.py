"""Which stage of which step each rank is in, for whoever looks, and an end to a stage that hangs."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pydantic import TypeAdapter, ValidationError

from megatron_sgopd.config import AlarmSettings
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.monitor.output import LOGS
from megatron_sgopd.processes import node_name

HEARTBEATS = "heartbeats"
START, BETWEEN = "start", "between stages"
_GRACE = 15.0
"""Seconds between a rank's stack and its end."""
_RECORD_BYTES = 256
"""A record is overwritten in one write of always the same length, so that a reader sees a whole one."""


@dataclass(frozen=True)
class Beat:
    """Where a rank was when it last entered a stage."""

    rank: int
    host: str
    stage: str
    step: int
    """Steps done before this one."""
    time: float
    """Seconds since the epoch."""
    limit: float
    """Seconds after which the rank ends itself if it is still there."""


_BEAT = TypeAdapter(Beat)


class Heartbeat:
    """This rank's record in RUN_DIR/heartbeats.

    A stage may take `alarms.first_hang_seconds` the first time, then `alarms.hang_seconds` or ten times its longest so
    far, whichever is more, from its beginning or from the last sign that it gets on. After that, every thread's Python
    stack is written to RUN_DIR/logs/rank-N.stack, by a thread of faulthandler's own that needs no lock of the
    interpreter's. The process is ended by the kernel's alarm some seconds later, so that the other ranks, whose limits
    are a little different, write theirs too.
    """

    def __init__(self, run_dir: Path, rank: int, settings: AlarmSettings) -> None:
        self._rank, self._settings = rank, settings
        self._host = node_name()
        self._longest: dict[str, float] = {}
        self.stage, self.step = START, 0
        self._entered, self._quiet = time.monotonic(), 0.0  # and the longest time without a sign of life since
        for name in (HEARTBEATS, LOGS):
            (run_dir / name).mkdir(exist_ok=True)
        self._record = os.open(_record(run_dir, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._stack: IO[str] = stack_file(run_dir, rank).open("w")
        self._watch()

    def enter(self, stage: str) -> None:
        """The stage before has ended, and this one begins."""
        now = time.monotonic()
        self._longest[self.stage] = max(self._longest.get(self.stage, 0.0), self._quiet, now - self._entered)
        self.stage, self._entered, self._quiet = stage, now, 0.0
        self._watch()

    def alive(self) -> None:
        """The stage has got on, however long it takes in all: its limit counts from here."""
        self._quiet, self._entered = max(self._quiet, time.monotonic() - self._entered), time.monotonic()
        self._watch()

    def longest_stage(self) -> tuple[str, float]:
        """Of a step's that have ended so far, a save not counted; and its seconds."""
        others = (START, BETWEEN, "save")
        return max((item for item in self._longest.items() if item[0] not in others), key=lambda item: item[1])

    def _watch(self) -> None:
        limit = self._settings.first_hang_seconds
        if self.stage in self._longest:
            limit = max(self._settings.hang_seconds, 10 * self._longest[self.stage])
        faulthandler.dump_traceback_later(limit, file=self._stack)
        signal.setitimer(signal.ITIMER_REAL, limit + _GRACE)
        beat = Beat(self._rank, self._host, self.stage, self.step, time.time(), limit)
        os.pwrite(self._record, json.dumps(vars(beat)).ljust(_RECORD_BYTES).encode(), 0)

    def stop(self) -> None:
        """No more stages: nothing is watched any longer."""
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)


def stack_file(run_dir: Path, rank: int) -> Path:
    """Where a rank that hangs writes its stack."""
    return run_dir / LOGS / f"rank-{rank}.stack"


def read_beats(run_dir: Path) -> list[Beat]:
    """Every rank's last one, by rank.

    Raises:
        ConfigError: a record is not as a run writes it.
    """
    texts = {path: path.read_bytes() for path in (run_dir / HEARTBEATS).glob("rank-*")}
    try:
        beats = [_BEAT.validate_json(text) for text in texts.values() if text]
    except ValidationError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{run_dir / HEARTBEATS} is not as a run writes it ({reason}): move it away") from None
    return sorted(beats, key=lambda beat: beat.rank)


def _record(run_dir: Path, rank: int) -> Path:
    return run_dir / HEARTBEATS / f"rank-{rank}"

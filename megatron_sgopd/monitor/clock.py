"""Seconds of each stage of a step, and what they leave unexplained."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

from megatron_sgopd.monitor.heartbeat import BETWEEN, Heartbeat


class Clock:
    """Adds up the wall-clock seconds of named stages between two laps, and says which one it is."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self.heartbeat = heartbeat
        self._stages: dict[str, float] = defaultdict(float)
        self._lap = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the body's time for `stage`."""
        start = time.perf_counter()
        self.heartbeat.enter(stage)
        yield  # an error leaves the stage as it is, for the diagnosis
        self.heartbeat.enter(BETWEEN)
        self._stages[stage] += time.perf_counter() - start

    def since_lap(self) -> float:
        """Seconds since the last lap."""
        return time.perf_counter() - self._lap

    def lap(self) -> tuple[dict[str, float], float]:
        """Stages and total seconds since the last lap; starts the next one."""
        now = time.perf_counter()
        stages, total = dict(self._stages), now - self._lap
        self._stages.clear()
        self._lap = now
        return stages, total

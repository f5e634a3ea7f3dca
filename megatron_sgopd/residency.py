"""Who has the device's memory in which phase of a step, as data: read `TIMELINE`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from megatron_sgopd.platform import current


@dataclass(frozen=True)
class Phase:
    """A phase of a step and what must be on the device meanwhile, besides what always is."""

    name: str
    needs: frozenset[str] = frozenset()
    """Parts, as TENANT.PART."""
    prefetches: str | None = None
    """The phase whose parts are fetched when this one ends, beside what the host does until that one begins."""


TIMELINE = (
    Phase("sync", frozenset({"engine.weights"})),
    Phase("generate", frozenset({"engine.weights", "engine.kv_cache"}), prefetches="teacher"),
    Phase("teacher", frozenset({"teacher.weights"})),
    Phase("reference", frozenset({"reference.weights"})),
    Phase("train"),
)
_PHASES = {phase.name: phase for phase in TIMELINE}


class Tenant(Protocol):
    """Something that can leave the device's memory and come back. All ranks call it together."""

    def fetch(self, part: str) -> None:
        """Begin to bring a part to the device."""

    def ready(self) -> None:
        """Wait until what was fetched is there."""

    def release(self) -> None:
        """Give the memory of all parts back."""


class Residency:
    """Moves tenants in and out as the timeline says, and records the most memory that each phase took."""

    def __init__(self, tenants: Mapping[str, Tenant]) -> None:
        """Args: tenants: those that can leave the device; what is not among them is there always."""
        self._tenants = dict(tenants)
        self._held: set[str] = set()
        self._peaks: dict[str, int] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """The body has what the phase needs."""
        needed = self._move(phase)
        current().reset_peak_memory()
        for tenant in needed:
            self._tenants[tenant].ready()
        yield
        self._peaks[phase] = max(self._peaks.get(phase, 0), current().peak_memory())
        if (following := _PHASES[phase].prefetches) is not None:
            self._move(following)

    def _move(self, phase: str) -> set[str]:
        """Release all else, and begin to fetch what the phase needs; the tenants that it needs."""
        needs = {part for part in _PHASES[phase].needs if _tenant(part) in self._tenants}
        for tenant in {_tenant(part) for part in self._held - needs}:
            self._tenants[tenant].release()
            self._held -= {part for part in self._held if _tenant(part) == tenant}
        for part in sorted(needs - self._held, reverse=True):  # the engine's weights before its cache
            self._tenants[_tenant(part)].fetch(part.partition(".")[2])
        self._held |= needs
        return {_tenant(part) for part in needs}

    def lap(self) -> dict[str, int]:
        """Bytes of the device at most in each phase since the last lap; starts the next one."""
        peaks = dict(self._peaks)
        self._peaks.clear()
        return peaks


def _tenant(part: str) -> str:
    return part.partition(".")[0]

"""What a planner knows of devices: numbers of data sheets, and assumptions that a run can replace by measurements."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sgopd.errors import ConfigError

_TABLE = Path(__file__).with_name("hardware.json")
GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """One GPU with its share of a node. Rates are of one device, and of one direction."""

    name: str
    gpu: bool
    """Else Megatron's local layers run on it, and the rollout engine does not sleep."""
    memory: int
    """Bytes."""
    bf16_flops: float
    """A second, dense."""
    fp8_flops: float | None
    """None where there is no FP8."""
    memory_bandwidth: float
    """Bytes a second, as are the next three."""
    link_bandwidth: float
    """To the other devices of the node."""
    network_bandwidth: float
    """To other nodes."""
    host_bandwidth: float
    """To the host's memory."""
    host_memory: int
    """Bytes."""
    per_node: int


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(_TABLE.read_text())


def device_names() -> list[str]:
    """Those in the table."""
    return list(_table()["devices"])


def device(name: str) -> Device:
    """A device of the table.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in _table()["devices"]:
        raise ConfigError(f"--gpu {name!r} is not in the table of devices: use one of {', '.join(device_names())}")
    row = _table()["devices"][name]
    return Device(
        name,
        gpu=row.get("gpu", True),
        memory=round(row["memory_gib"] * GIB),
        bf16_flops=row["bf16_tflops"] * 1e12,
        fp8_flops=row["fp8_tflops"] and row["fp8_tflops"] * 1e12,
        memory_bandwidth=row["memory_gb_per_s"] * 1e9,
        link_bandwidth=row["link_gb_per_s"] * 1e9,
        network_bandwidth=row["network_gb_per_s"] * 1e9,
        host_bandwidth=row["host_gb_per_s"] * 1e9,
        host_memory=round(row["host_memory_gib"] * GIB),
        per_node=row["per_node"],
    )


def efficiency(name: str) -> float:
    """A share of a peak that is assumed to be reached."""
    return _table()["efficiencies"][name]["value"]


def allowance(name: str) -> float:
    """An assumption in the unit that its name says."""
    return _table()["allowances"][name]["value"]


def assumptions() -> list[tuple[str, float, str]]:
    """All of both: name, value, and of or for what."""
    rows = [*_table()["efficiencies"].items(), *_table()["allowances"].items()]
    return [(name, row["value"], row.get("of") or row["for"]) for name, row in rows]

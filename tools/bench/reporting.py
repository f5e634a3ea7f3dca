"""What a bench prints: a line for each figure with its floor and its limit, or one JSON object for compare.py."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Figure:
    """One measured number."""

    name: str
    value: float
    unit: str
    floor: float | None = None
    """The best that this machine could do, measured in the same process; in the same unit."""
    at_most: float | None = None
    at_least: float | None = None

    @property
    def holds(self) -> bool:
        """Whether it is within its limits."""
        low = self.at_least is None or self.value >= self.at_least
        return low and (self.at_most is None or self.value <= self.at_most)


def parser(description: str | None) -> argparse.ArgumentParser:
    """One that knows --json."""
    made = argparse.ArgumentParser(description=(description or "").partition("\n\n")[2])
    made.add_argument("--json", action="store_true", help="one JSON object, for tools/bench/compare.py")
    return made


def report(bench: str, figures: list[Figure], as_json: bool) -> int:
    """Print them; 1 if one is outside its limits."""
    if as_json:
        print(json.dumps({"bench": bench, "figures": [asdict(figure) for figure in figures]}))
    for figure in figures if not as_json else []:
        floor = "" if figure.floor is None else f"   floor {figure.floor:.4g}"
        limit = "" if figure.at_most is None else f"   at most {figure.at_most:g}"
        limit += "" if figure.at_least is None else f"   at least {figure.at_least:g}"
        print(
            f"{bench:12} {figure.name:44} {figure.value:10.4g} {figure.unit:12}{floor}{limit}"
            f"{'' if figure.holds else '   MISSED'}"
        )
    return 0 if all(figure.holds for figure in figures) else 1

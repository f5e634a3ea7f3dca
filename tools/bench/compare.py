""".venv/bin/python tools/bench/compare.py BEFORE AFTER       (files of JSON lines: make bench JSON=--json >BEFORE)

Two runs of the benches side by side: each figure before, after, and after over before.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__)
        return 2
    before, after = (_figures(Path(name)) for name in sys.argv[1:])
    for name in before.keys() | after.keys():
        if name not in before or name not in after:
            print(f"{name:60} only in {'the first' if name in before else 'the second'}")
    print(f"{'':60} {'before':>12} {'after':>12} {'ratio':>8}")
    for name in (name for name in before if name in after):
        old, new = before[name], after[name]
        print(f"{name:60} {old:12.4g} {new:12.4g} {new / old if old else float('nan'):8.3f}")
    return 0


def _figures(path: Path) -> dict[str, float]:
    """Bench and figure -> value, of the lines that benches print with --json; others are passed over."""
    found: dict[str, float] = {}
    for line in path.read_text().splitlines():
        if line.startswith('{"bench"'):
            one = json.loads(line)
            found |= {f"{one['bench']}: {figure['name']}": figure["value"] for figure in one["figures"]}
    return found


if __name__ == "__main__":
    sys.exit(main())

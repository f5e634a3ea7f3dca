""".venv/bin/python tools/soak/kill.py [--times 50]       (needs a Slurm: make slurm-deps)

Kill a random rank of a job at a random moment so many times, and compare the weights and metrics that come of it, bit
for bit, with those of a job that was left alone. Each attempt must end within a minute of the kill.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from soaking import Soak, soak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[2])
    parser.add_argument("--times", type=int, default=50, help="kills (50)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    report = soak(4 * arguments.times, arguments.times, arguments.seed, _kill_a_rank)
    print(json.dumps(report))
    return 1 if report["differs in"] or report["broken checkpoints"] else 0


def _kill_a_rank(one: Soak, number: int) -> None:
    """One time in five while the models load, else while it trains."""
    if one.random.random() < 0.2:
        time.sleep(5 * one.random.random())
    else:
        one.wait_for("train")
        time.sleep(12 * one.random.random())
    one.random.choice(one.ranks()).kill()


if __name__ == "__main__":
    sys.exit(main())

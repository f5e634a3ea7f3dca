""".venv/bin/python tools/soak/kill.py [--times 50]       (needs a Slurm: make slurm-deps)

Kill a random rank of a job in a random stage so many times, and compare the weights and metrics that come of it, bit
for bit, with those of a job that was left alone. Each attempt must end within a minute of the kill.
"""

from __future__ import annotations

import argparse
import json
import sys

from soaking import STAGES, Soak, soak, wait_until

_STEPS_A_KILL = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[2])
    parser.add_argument("--times", type=int, default=50, help="kills (50)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    report = soak(_STEPS_A_KILL * arguments.times, arguments.times, arguments.seed, _kill_a_rank)
    print(json.dumps(report))
    return 1 if report["differs in"] or report["broken checkpoints"] else 0


def _kill_a_rank(one: Soak, number: int) -> None:
    """One time in five while the models load, else in a stage of one of the steps that are this kill's own."""
    wait_until(lambda: len(one.ranks()) == 2, 60)
    rank = one.random.choice(one.ranks())
    if one.random.random() > 0.2:
        # Two of its steps are left for the kill to arrive in; a checkpoint is saved after every second one.
        one.wait_for(one.random.choice(STAGES), _STEPS_A_KILL * number + one.random.randrange(2))
    rank.kill()


if __name__ == "__main__":
    sys.exit(main())

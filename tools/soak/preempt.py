""".venv/bin/python tools/soak/preempt.py [--times 20]       (needs a Slurm: make slurm-deps)

Ask a job to stop so many times, in every stage of a step, by scancel and by signals to its ranks in turn, and compare
the weights and metrics that come of it, bit for bit, with those of a job that was left alone.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time

from soaking import STAGES, Soak, soak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[2])
    parser.add_argument("--times", type=int, default=20, help="signals (20)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    slow = {"verify.verifier": "tests.slow:exact_but_slow"}  # else that stage is over before a signal can arrive
    report = soak(3 * arguments.times, arguments.times, arguments.seed, _ask_to_stop, **slow)
    missed = sorted(set(STAGES) - set(report["received in"])) if arguments.times >= 2 * len(STAGES) else []
    print(json.dumps(report | {"stages missed": missed}))
    return 1 if report["differs in"] or missed else 0


def _ask_to_stop(one: Soak, number: int) -> None:
    """In turn by a signal to the ranks, in a stage that was not hit yet, and at a random moment as Slurm does."""
    one.wait_for("train")
    time.sleep(2 * one.random.random())
    if number % 2:
        one.cluster.run(["scancel", "--signal=USR1", "--batch", str(one.job)])
        return
    ranks = one.ranks()
    hit = one.received()
    left = [stage for stage in STAGES if stage not in hit] or STAGES
    one.wait_for(left[number // 2 % len(left)])
    for process in ranks:
        process.send_signal(signal.SIGUSR1)


if __name__ == "__main__":
    sys.exit(main())

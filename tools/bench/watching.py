""".venv/bin/python tools/bench/watching.py RUN       (a run folder; make demo makes runs/demo)

What watching a run costs: the records and timers of its stages, and the ranks' agreement on whether they were asked to
stop, both on two ranks of this machine and by the run's own count of stages, as a share of the run's median step. Exits
with 1 if that is more than half a percent.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.launch import run_ranks

SAFE_POINTS = 4
"""Of a step: see step.py."""
LIMIT = 0.005
_REPETITIONS = 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[2])
    parser.add_argument("run", type=Path, metavar="RUN")
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in (arguments.run / "metrics.jsonl").read_text().splitlines()]
    step = statistics.median(line["seconds"] for line in lines)
    stages = max(len(line["stage_seconds"]) for line in lines) + 1  # verification is entered twice
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(2, measure, folder)
        [change, agreement] = json.loads((Path(folder) / "seconds.json").read_text())
    watching = 2 * stages * change + SAFE_POINTS * agreement
    report = {
        "stage change us": round(1e6 * change, 1),
        "agreement us": round(1e6 * agreement, 1),
        "stages of a step": stages,
        "step s": round(step, 3),
        "share of a step": round(watching / step, 6),
    }
    print(json.dumps(report))
    return 1 if watching / step > LIMIT else 0


def measure(folder: str) -> None:
    """Median seconds of a change of stage and of an agreement, written by the first of the ranks that do both."""
    from megatron_sgopd.platform import select

    select("cpu")
    import torch.distributed as dist

    from megatron_sgopd.config import AlarmSettings
    from megatron_sgopd.monitor.heartbeat import Heartbeat
    from megatron_sgopd.stopping import StopRequest

    dist.init_process_group("gloo")
    heartbeat, request = Heartbeat(Path(folder), dist.get_rank(), AlarmSettings()), StopRequest()
    medians = []
    for what in (lambda: heartbeat.enter("train"), request.asked):
        seconds = []
        for _ in range(_REPETITIONS):
            began = time.perf_counter()
            what()
            seconds.append(time.perf_counter() - began)
        medians.append(statistics.median(seconds))
    heartbeat.stop()
    if os.environ["RANK"] == "0":
        (Path(folder) / "seconds.json").write_text(json.dumps(medians))
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())

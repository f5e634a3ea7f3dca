""".venv/bin/python tools/bench/end_to_end.py [--steps 12] [--json]

The arithmetic example's run on this machine: responses a second, and the share of a step that no stage explains.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import example
from reporting import Figure, parser, report


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=12)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = {"train.steps": options.steps, "train.warmup_steps": 0}
        lines = example.train(Path(folder) / "run", settings, {})[1:]
    responses = [line["response_tokens"] / line["response_length"] / line["seconds"] for line in lines]
    stages = {name for line in lines for name in line["stage_seconds"]}
    figures = [
        Figure("responses", statistics.median(responses), "1/s"),
        Figure("unexplained", statistics.median(line["unexplained_share"] for line in lines), "", 0.0, at_most=0.03),
    ]
    for stage in sorted(stages):
        seconds = statistics.median(line["stage_seconds"].get(stage, 0.0) for line in lines)
        figures.append(Figure(f"stage {stage}", seconds, "s"))
    return report("end_to_end", figures, options.json)


if __name__ == "__main__":
    sys.exit(main())

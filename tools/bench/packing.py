""".venv/bin/python tools/bench/packing.py [--responses 4096] [--json]

Packing of responses of long-tailed lengths: how full the rows are, and the time for a token.
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np
from reporting import Figure, parser, report

from megatron_sgopd.rollout.packing import pack
from megatron_sgopd.rollout.prompts import Prompt
from megatron_sgopd.rollout.trajectory import Trajectory

ROW_TOKENS, LONGEST = 4096, 3584


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--responses", type=int, default=4096)
    options = arguments.parse_args()
    generator = np.random.default_rng(0)
    # Exponential with a mean of a third of the longest, cut there: what sampling until an end of sequence gives.
    lengths = np.minimum(generator.exponential(LONGEST / 3, options.responses).astype(int) + 1, LONGEST)
    prompt = Prompt("p", "", tuple(range(200)), "", "", {})
    trajectories = [Trajectory(prompt, i, tuple(range(n)), (0.0,) * n, False) for i, n in enumerate(lengths.tolist())]
    tokens = int(lengths.sum()) + len(prompt.token_ids) * options.responses
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        rows = pack(trajectories, ROW_TOKENS, 1, 1, share_prompts=False)
        seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    np.concatenate([np.asarray(t.token_ids) for t in trajectories])  # the tokens must be read once
    floor = time.perf_counter() - began
    figures = [
        Figure("share of rows that is no padding", tokens / rows.tokens_RS.numel(), "", 1.0, at_least=0.97),
        Figure("time", 1e6 * statistics.median(seconds) / tokens, "us a token", 1e6 * floor / tokens, at_most=2.0),
    ]
    return report("packing", figures, options.json)


if __name__ == "__main__":
    sys.exit(main())

""".venv/bin/python tools/bench/verify.py [--answers 20000] [--json]

Plain answers that one verifier process checks in a second, through the pool and its pipes.
"""

from __future__ import annotations

import random
import sys
import time

from reporting import Figure, parser, report

from megatron_sgopd.verify.base import VerifyRequest, resolve_verifier
from megatron_sgopd.verify.pool import VerifierPool


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--answers", type=int, default=20_000)
    options = arguments.parse_args()
    generator = random.Random(0)
    requests = []
    for _ in range(options.answers):
        right = generator.randrange(1000)
        said = right if generator.random() < 0.5 else generator.randrange(1000)
        requests.append(VerifyRequest("", f"So we get \\boxed{{{said}}}.", str(right), "", {}))
    verifier = resolve_verifier("math")
    verifier(requests[0])  # imports its libraries
    began = time.perf_counter()
    for request in requests[:1000]:
        verifier(request)
    alone = 1000 / (time.perf_counter() - began)
    with VerifierPool("math", workers=1) as pool:
        pool.submit(requests[:100]).result()  # libraries load at the first
        began = time.perf_counter()
        results = pool.submit(requests).result()
        rate = options.answers / (time.perf_counter() - began)
    right = sum(result.outcome for result in results)
    assert 0.4 < right / options.answers < 0.6
    figures = [Figure("plain answers of one process", rate, "1/s", alone, at_least=2000)]
    return report("verify", figures, options.json)


if __name__ == "__main__":
    sys.exit(main())

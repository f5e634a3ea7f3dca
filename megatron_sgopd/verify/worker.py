"""python -m megatron_sgopd.verify.worker VERIFIER MEMORY_LIMIT    (started by pool.py)

Judges answers, one JSON line in and one out, in a process that can be killed without loss. It imports neither
torch nor the training script.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import resource
import signal
import sys
from pathlib import Path
from typing import IO

from megatron_sgopd.verify.base import Verifier, VerifierResult, VerifyRequest, resolve_verifier

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Answer requests until the input ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    verifier_name, memory_limit = sys.argv[1], int(sys.argv[2])
    logging.disable(logging.WARNING)  # math-verify warns at every answer that it has no time limit of its own
    requests, replies = _private_pipes()
    verifier = resolve_verifier(verifier_name)
    _limit_resources(memory_limit)
    replies.write("ready\n")
    replies.flush()
    for line in requests:
        result = _judge(verifier, VerifyRequest(**json.loads(line)))
        replies.write(json.dumps([result.outcome, result.extracted, result.reason]) + "\n")
        replies.flush()


def _private_pipes() -> tuple[IO[str], IO[str]]:
    """Move the protocol away from stdin and stdout, which a verifier may use as it likes."""
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)  # not stderr, which may be a file: the limit on file sizes would make print() fail
    return requests, replies


def _limit_resources(memory_limit: int) -> None:
    """Bound what an answer can take: memory beyond that of the libraries, open files, and no file contents."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    total = pages * resource.getpagesize() + memory_limit
    resource.setrlimit(resource.RLIMIT_AS, (total, total))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _judge(verifier: Verifier, request: VerifyRequest) -> VerifierResult:
    try:
        return verifier(request)
    except MemoryError:
        return VerifierResult(0, None, "memory")
    except Exception as error:  # whatever a parser does on hostile text, the answer is wrong and the worker lives
        return VerifierResult(0, None, f"unreadable ({type(error).__name__})")


if __name__ == "__main__":
    main()

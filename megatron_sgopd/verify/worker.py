"""python -m megatron_sgopd.verify.worker VERIFIER MEMORY_LIMIT    (started by pool.py)

Judges answers, one JSON line in and one out, in a process that can be killed without loss. It imports neither
torch nor the training script. What a verifier prints is lost, and it can write no files.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from pathlib import Path
from typing import IO, Any

from megatron_sgopd.processes import die_with_parent
from megatron_sgopd.verify.base import (
    BUILT_IN,
    MAX_ANSWER,
    Verifier,
    VerifierResult,
    VerifyRequest,
    resolve_verifier,
)

_FIRST = VerifyRequest("", "\\boxed{(x+1)^2}", "x^2+2x+1", "", {})
"""Judged before any other, since the libraries import and build much at their first answer."""


def main() -> None:
    """Answer requests until the input ends."""
    die_with_parent()
    # A batch system warns every process of a job, and the answers are still wanted while the run saves itself.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    name, memory_limit = sys.argv[1], int(sys.argv[2])
    logging.disable(logging.WARNING)  # math-verify warns at every answer that it has no time limit of its own
    requests, replies = _private_pipes()
    verifier = resolve_verifier(name)
    if name in BUILT_IN:
        _judge(verifier, _FIRST)
        sys.addaudithook(refuse_generated_code)
    _limit_resources(memory_limit)
    _send(replies, "ready")
    for line in requests:
        _send(replies, _judge(verifier, VerifyRequest(**json.loads(line))))


def refuse_generated_code(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: sympy may not compile expressions, whose names are spelled as the response spelled them.

    It does so for the numerical value of infinite sums.

    Raises:
        PermissionError: in place of the compilation.
    """
    if event == "compile" and str(arguments[1]).startswith("<lambdifygenerated"):
        raise PermissionError("an answer must not be compiled")


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


def _judge(verifier: Verifier, request: VerifyRequest) -> list[Any] | str:
    """The result's fields, or what is wrong with a verifier that gives no proper result."""
    try:
        result = verifier(request)
    except MemoryError:
        result = VerifierResult(0, None, "memory")
    except Exception as error:  # whatever a parser does on hostile text, the answer is wrong and the worker lives
        result = VerifierResult(0, None, f"unreadable ({type(error).__name__})")
    if not _is_proper(result):
        return (
            f"returned {str(result)[:200]}, not a VerifierResult with outcome 0 or 1, the answer as text or None, and "
            "the reason as text"
        )
    extracted = None if result.extracted is None else result.extracted[:MAX_ANSWER]
    vote = None if result.vote is None else result.vote[:MAX_ANSWER]
    return [int(result.outcome), extracted, result.reason, vote]


def _is_proper(result: Any) -> bool:
    return (
        isinstance(result, VerifierResult)
        and isinstance(result.outcome, int)
        and result.outcome in (0, 1)
        and (result.extracted is None or isinstance(result.extracted, str))
        and isinstance(result.reason, str)
        and (result.vote is None or isinstance(result.vote, str))
    )


def _send(replies: IO[str], message: list[Any] | str) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()

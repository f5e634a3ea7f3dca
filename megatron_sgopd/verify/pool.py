"""Verifier processes with a time and a memory limit for every answer."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, replace

from megatron_sgopd.verify.base import VerifierResult, VerifyRequest

MAX_RESPONSE = 100_000
"""Characters of a response that a verifier sees, counted from its end, where answers stand."""
_IN_FLIGHT = 30_000
"""Bytes sent ahead to a worker: less than a pipe holds, so that writing never waits for a worker that hangs."""
_START_LIMIT = 120.0
"""Seconds for a worker to import its libraries."""
FAULTS = ("timeout", "memory", "crashed", "unreadable")


class PendingOutcomes:
    """Results that are being worked out."""

    def __init__(self, count: int, threads: Sequence[threading.Thread]) -> None:
        self._threads = threads
        self._results: list[VerifierResult | None] = [None] * count
        self._left = count
        self._changed = threading.Condition()

    def put(self, index: int, result: VerifierResult) -> None:
        """Set one result."""
        with self._changed:
            self._results[index] = result
            self._left -= 1
            self._changed.notify_all()

    def result(self) -> list[VerifierResult]:
        """Wait for all results, in the order of the requests."""
        with self._changed:
            while not self._changed.wait_for(lambda: self._left == 0, timeout=1.0):
                if not all(thread.is_alive() for thread in self._threads):
                    raise RuntimeError("a thread that watches a verifier process died; its traceback is above")
        return [result for result in self._results if result is not None]


_Job = tuple[PendingOutcomes, int, bytes]


class VerifierPool:
    """Worker processes of one verifier, each watched by a thread of this process.

    A worker that hangs or dies is killed and replaced; the answer it was at counts as wrong, the others that it
    had been sent go to its successor. Start-up of a worker does not count against anyone's limit.
    """

    def __init__(self, verifier: str, workers: int = 1, time_limit: float = 5.0, memory_limit: int = 2**30) -> None:
        """`time_limit` in seconds an answer, `memory_limit` in bytes beyond what the libraries take."""
        self._command = [sys.executable, "-m", "megatron_sgopd.verify.worker", verifier, str(memory_limit)]
        self._time_limit = time_limit
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._faults: Counter[str] = Counter()
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, requests: Sequence[VerifyRequest]) -> PendingOutcomes:
        """Begin judging; returns at once."""
        pending = PendingOutcomes(len(requests), self._threads)
        for index, request in enumerate(requests):
            request = replace(request, response=request.response[-MAX_RESPONSE:])
            self._jobs.put((pending, index, json.dumps(asdict(request)).encode() + b"\n"))
        return pending

    @property
    def counters(self) -> dict[str, int]:
        """How many answers so far ended in timeout, memory, crashed or unreadable."""
        return {name: self._faults[name] for name in FAULTS}

    def close(self) -> None:
        """End the workers once all that was submitted is done."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _serve(self) -> None:
        """Keep one worker busy until the pool closes."""
        worker, sent = _Worker(self._command), deque[_Job]()
        jobs = _Lookahead(self._jobs)
        while sent or jobs.wait():
            while (job := jobs.peek()) and (not sent or sum(len(j[2]) for j in (*sent, job)) <= _IN_FLIGHT):
                worker.write(job[2])
                sent.append(jobs.take())
            reply = worker.read(self._time_limit)
            pending, index, _ = sent.popleft()
            if isinstance(reply, bytes):
                result = VerifierResult(*json.loads(reply))
            else:
                result = VerifierResult(0, None, reply)
                worker.kill()
                worker = _Worker(self._command)
                for _, _, line in sent:
                    worker.write(line)
            self._faults[result.reason.partition(" ")[0]] += 1
            pending.put(index, result)
        worker.kill()


class _Lookahead:
    """A queue whose next job can be looked at; None in the queue ends it."""

    def __init__(self, jobs: queue.SimpleQueue[_Job | None]) -> None:
        self._jobs = jobs
        self._next: _Job | None = None
        self._ended = False

    def wait(self) -> bool:
        """Wait for a job; False at the end."""
        if self._next is None and not self._ended:
            self._next = self._jobs.get()
            self._ended = self._next is None
        return not self._ended

    def peek(self) -> _Job | None:
        """The next job if it is there already."""
        if self._next is None and not self._ended and not self._jobs.empty():
            self.wait()
        return self._next

    def take(self) -> _Job:
        """Remove the job that was looked at."""
        assert self._next is not None
        job, self._next = self._next, None
        return job


class _Worker:
    """One process, and what it has written so far."""

    def __init__(self, command: Sequence[str]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
        )
        self._buffer = b""
        self._ready = False

    def write(self, line: bytes) -> None:
        """Send a request; to a worker that died it is lost, which the next read reports."""
        assert self._process.stdin is not None
        self._start()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line)

    def read(self, limit: float) -> bytes | str:
        """The next line, or the reason why there is none: timeout or crashed."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + limit
        while b"\n" not in self._buffer:
            readable, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                return "timeout"
            received = os.read(self._process.stdout.fileno(), 1 << 16)
            if not received:
                return "crashed"
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _start(self) -> None:
        if not self._ready:
            self.read(_START_LIMIT)
            self._ready = True

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

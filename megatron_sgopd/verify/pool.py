"""Verifier processes with a time and a memory limit for every answer.

The processes are started afresh (no fork: the training process has threads and devices; no multiprocessing: it
would import the training script again) and speak JSON lines, so that model output is never unpickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_sgopd.verify.base import VerifierResult, VerifyRequest

MAX_RESPONSE = 100_000
"""Characters of a response that a verifier sees, counted from its end, where answers stand."""
FAULTS = ("timeout", "memory", "crashed", "unreadable")
_AHEAD = 8
"""Answers given to a worker at a time: it need not wait for this process, and little waits behind one that hangs."""
_LIFETIME = 50_000
"""Answers after which an idle worker is replaced: sympy's memory grows by about a kilobyte an answer."""
_START_LIMIT = 300.0
"""Seconds for a worker to import its libraries, from a slow shared file system too."""


class PendingOutcomes:
    """Results that are being worked out."""

    def __init__(self, futures: Sequence[Future[VerifierResult]]) -> None:
        self._futures = futures

    def wait(self, limit: float) -> int:
        """Wait for all results, for `limit` seconds at most; returns how many are still worked at."""
        return len(wait(self._futures, limit).not_done)

    def result(self) -> list[VerifierResult]:
        """Wait for all results, in the order of the requests.

        Raises:
            RuntimeError: the pool was closed, or its verifier does not start or returns no VerifierResult.
        """
        return [future.result() for future in self._futures]


@dataclass(frozen=True)
class _Job:
    request: VerifyRequest
    future: Future[VerifierResult]


class VerifierPool:
    """Worker processes of one verifier, each watched by a thread of this process.

    A worker that hangs, dies or runs out of memory is killed and replaced; the answer it was at counts as wrong,
    the others that it had been given go to its successor. Starting does not count against anyone's limit.
    """

    def __init__(self, verifier: str, workers: int = 1, time_limit: float = 5.0, memory_limit: int = 2**30) -> None:
        """`time_limit` in seconds an answer, `memory_limit` in bytes beyond what the libraries take."""
        self._verifier, self._time_limit = verifier, time_limit
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._faults: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._ended: Exception | None = None
        self._workers = [_Worker(verifier, memory_limit) for _ in range(workers)]
        self._threads = [threading.Thread(target=self._serve, args=(w,), daemon=True) for w in self._workers]
        for thread in self._threads:
            thread.start()

    def submit(self, requests: Sequence[VerifyRequest]) -> PendingOutcomes:
        """Begin judging; returns at once."""
        jobs = [_Job(replace(r, response=r.response[-MAX_RESPONSE:]), Future()) for r in requests]
        with self._lock:
            if self._ended is not None:
                raise self._ended
            for job in jobs:
                self._jobs.put(job)
        return PendingOutcomes([job.future for job in jobs])

    @property
    def counters(self) -> dict[str, int]:
        """How many answers so far ended in timeout, memory, crashed or unreadable."""
        return {name: self._faults[name] for name in FAULTS}

    def close(self) -> None:
        """End the workers at once; answers that are not judged yet never will be."""
        self._end(RuntimeError("the verifier pool was closed"))
        for worker in self._workers:
            worker.stop()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _end(self, error: Exception) -> None:
        """Take no more jobs and let those that wait fail; the first error stands."""
        with self._lock:
            self._ended = self._ended or error
            with contextlib.suppress(queue.Empty):
                while True:
                    if (job := self._jobs.get_nowait()) is not None:
                        job.future.set_exception(self._ended)
            for _ in self._threads:
                self._jobs.put(None)

    def _serve(self, worker: _Worker) -> None:
        """Keep one worker busy until the pool ends."""
        given: deque[_Job] = deque()
        try:
            worker.start()
            while self._ended is None:
                if not given and worker.judged >= _LIFETIME:
                    worker.restart()
                self._give(worker, given)
                if given:
                    self._settle(worker, given)
        except Exception as error:  # whatever it is, those who wait for results must hear of it
            self._end(error)
        finally:
            worker.kill()
            for job in given:
                job.future.set_exception(self._ended)

    def _give(self, worker: _Worker, given: deque[_Job]) -> None:
        """Hand over jobs: wait for the first, take more only where they are there already."""
        while len(given) < _AHEAD:
            try:
                job = self._jobs.get(block=not given)
            except queue.Empty:
                return
            if job is None:  # the pool ended
                return
            given.append(job)
            worker.send(job.request)

    def _settle(self, worker: _Worker, given: deque[_Job]) -> None:
        """Wait for the answer to the first job, and replace a worker that gave none."""
        reply = worker.receive(self._time_limit)
        if self._ended is not None:
            return
        result = self._read(reply) if isinstance(reply, bytes) else VerifierResult(0, None, reply)
        with self._lock:
            self._faults[result.reason.partition(" ")[0]] += 1
        given.popleft().future.set_result(result)
        worker.judged += 1
        if result.reason in ("timeout", "memory", "crashed"):
            worker.restart()
            for job in given:
                worker.send(job.request)

    def _read(self, line: bytes) -> VerifierResult:
        reply = json.loads(line)
        if isinstance(reply, str):
            raise RuntimeError(f"verify.verifier {self._verifier!r} {reply}")
        return VerifierResult(*reply)


class _Worker:
    """One process, and the bytes on their way to and from it."""

    def __init__(self, verifier: str, memory_limit: int) -> None:
        self._command = [sys.executable, "-P", "-m", "megatron_sgopd.verify.worker", verifier, str(memory_limit)]
        # What this process can import, a verifier beside the training script for instance, the worker can.
        path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
        self._environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process: subprocess.Popen[bytes] | None = None
        self._outgoing, self._incoming = bytearray(), bytearray()
        self.judged = 0

    def start(self) -> None:
        """Start the process and wait until it is ready.

        Raises:
            RuntimeError: it ended or hung before.
        """
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self._environment, start_new_session=True
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        self._outgoing, self._incoming = bytearray(), bytearray()
        self.judged = 0
        message = self.receive(_START_LIMIT)
        if message != b'"ready"':
            raise RuntimeError(f"a verifier process did not start ({message!r}): {' '.join(self._command)}")

    def restart(self) -> None:
        """Replace the process by a new one."""
        self.kill()
        self.start()

    def send(self, request: VerifyRequest) -> None:
        """Put a request in line; `receive` writes it as the pipe takes it."""
        self._outgoing += json.dumps(asdict(request)).encode() + b"\n"

    def receive(self, limit: float) -> bytes | str:
        """The next line, or the reason why there is none after `limit` seconds: timeout or crashed."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        deadline = time.monotonic() + limit
        while b"\n" not in self._incoming:
            poll = select.poll()
            poll.register(process.stdout, select.POLLIN)
            if self._outgoing:
                poll.register(process.stdin, select.POLLOUT)
            ready = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
            if not ready:
                return "timeout"
            if process.stdin.fileno() in ready:
                self._write(process.stdin.fileno())
            if process.stdout.fileno() in ready:
                received = os.read(process.stdout.fileno(), 1 << 16)
                if not received:
                    return "crashed"
                self._incoming += received
        line, _, self._incoming = self._incoming.partition(b"\n")
        return bytes(line)

    def _write(self, pipe: int) -> None:
        try:
            del self._outgoing[: os.write(pipe, self._outgoing[: 1 << 16])]
        except BrokenPipeError:  # it died, which shows where its answers are read
            self._outgoing.clear()

    def stop(self) -> None:
        """End the process from another thread; its own thread then notices."""
        if self._process is not None:
            self._process.kill()

    def kill(self) -> None:
        """End the process, and all that a verifier started in it, at once."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

"""A run that is asked to stop: before its time limit or when preempted by a batch system, or by Ctrl-C."""

from __future__ import annotations

import multiprocessing.util
import os
import signal
import threading

import torch
import torch.distributed as dist

from megatron_sgopd.monitor.heartbeat import START, Heartbeat
from megatron_sgopd.platform import current
from megatron_sgopd.processes import STOP_SIGNALS, hold_stop_signals


class StopRequest:
    """The signals of STOP_SIGNALS that this process has had since it began to listen."""

    def __init__(self) -> None:
        self._received = 0
        self.heartbeat: Heartbeat | None = None
        """Of the run, once it has begun."""
        self.stage = START
        """In which this rank was when it was signalled."""

    def listen(self) -> None:
        """Note the signals instead of dying of them; a second Ctrl-C ends the process at once.

        Processes started from here on hold them back: a batch system signals every process of a job, and those that
        write a checkpoint are still needed.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, _: self._note(number))  # for threads that are there already
        hold_stop_signals()
        multiprocessing.util.Finalize(None, _end_daemons, exitpriority=0)
        threading.Thread(target=self._wait, name="stop-request", daemon=True).start()

    def _wait(self) -> None:
        while True:
            self._note(signal.sigwait(STOP_SIGNALS))

    def _note(self, number: int) -> None:
        if number == self._received == signal.SIGINT:
            os._exit(128 + number)
        self._received = number
        if self.heartbeat is not None:
            self.stage = self.heartbeat.stage

    def asked(self) -> str | None:
        """The name of a signal that some rank has had, the same on every rank; None if none has.

        A collective: every rank calls it at the same points.
        """
        received = torch.tensor([self._received], device=current().device)
        dist.all_reduce(received, dist.ReduceOp.MAX)
        number = int(received)
        return signal.Signals(number).name if number else None


def _end_daemons() -> None:
    """Before Python itself would end them by a signal that they hold back, and wait."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()

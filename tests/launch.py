"""Run a test's function on several ranks, each a fresh Python process."""

import os
import socket
import time
import unittest.mock
from collections.abc import Callable
from typing import Any

import torch.multiprocessing


def run_ranks(world_size: int, function: Callable[..., None], *args: Any, timeout: float = 300.0) -> None:
    """Call `function(*args)` in `world_size` processes with the environment that torchrun would give them.

    `function` and `args` are pickled, so `function` must be at the top of its module.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank failed; carries that rank's traceback.
        TimeoutError: the ranks did not end in `timeout` seconds; they are killed.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    # A child reads this when it imports torch, before any code of ours runs there.
    with unittest.mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        context = torch.multiprocessing.start_processes(
            _run_rank, (world_size, port, function, args), world_size, join=False, start_method="spawn"
        )
    assert context is not None
    deadline = time.monotonic() + timeout
    try:
        while not context.join(max(0.0, deadline - time.monotonic())):  # returns at each rank's end
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{function.__name__} on {world_size} ranks did not end in {timeout} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _run_rank(rank: int, world_size: int, port: int, function: Callable[..., None], args: Any) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
    )
    function(*args)

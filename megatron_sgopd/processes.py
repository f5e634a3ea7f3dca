"""Processes and those that they belong to."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
from collections.abc import Iterator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""They ask a run to save and stop: preemption, a batch system's warning before the time limit, Ctrl-C."""
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however that ends (Linux).

    torchrun gives each rank a session of its own, which a killed job would leave behind.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def joined_ranks() -> Iterator[int]:
    """Connect the ranks that torchrun or srun started together, this process alone if none did; gives its rank."""
    import torch.distributed as dist

    adopt_slurm_ranks()
    if "RANK" in os.environ:
        die_with_parent()
        dist.init_process_group()
    else:
        # vLLM looks for a launcher's variables too, and connects to nothing where there is one rank.
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def is_first_rank() -> bool:
    """Whether torchrun's, srun's or a lone process is the one that speaks and writes for all."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def node_name() -> str:
    """Slurm's name of this node where there is one: several of them may share a host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def adopt_slurm_ranks() -> None:
    """Name srun's ranks as torchrun does."""
    for name, slurm in (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS"), ("LOCAL_RANK", "SLURM_LOCALID")):
        if slurm in os.environ:
            os.environ.setdefault(name, os.environ[slurm])

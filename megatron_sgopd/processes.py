"""Processes and those that they belong to."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import ipaddress
import multiprocessing
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from megatron_sgopd.errors import ConfigError, Unavailable

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""They ask a run to save and stop: preemption, a batch system's warning before the time limit, Ctrl-C."""
SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""Environment of processes that are started: they import nothing from the folder that the user happens to be in."""
PORT_PATIENCE = 60.0
"""Seconds for which a port may be in use: that of a job's last attempt is for a while."""
RUN_HELD = "SGOPD_RUN_HELD"
"""Environment variable by which a launcher tells ranks that it has claimed their run folder."""
NO_HUB = {"HF_HUB_OFFLINE": "1"}
"""Default environment of our commands: models and data sets are folders, and nobody is asked for others."""
_PR_SET_PDEATHSIG = 1
_RANK_PID = "SGOPD_RANK_PID"
_FIRST_PARENT = os.getppid()
"""As this process begins, seconds before its libraries are loaded."""
_LONGEST_START = timedelta(minutes=30)
"""From the first rank's start to the last one's, and that they may wait for each other while they load."""


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however that ends (Linux).

    torchrun gives each rank a session of its own, which a killed job would leave behind.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def hold_stop_signals() -> None:
    """Have them wait until somebody asks for them, in this process and in those that it starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def begin_rank() -> None:
    """In a rank: end with the launcher, also where that was killed while this one loaded its libraries."""
    die_with_parent()
    if os.getppid() != _FIRST_PARENT:  # killed since, of which the kernel says nothing any more
        os._exit(1)
    os.environ[_RANK_PID] = str(os.getpid())


def end_with_rank() -> None:
    """In a process that a rank has started by `multiprocessing`, as Megatron does to save: end when the rank does.

    Such a process imports the rank's main module first: call it there. `die_with_parent` would not do, since the
    kernel takes the end of the *thread* that started a process for the end of its parent.
    """
    if multiprocessing.current_process().name == "MainProcess" or _RANK_PID not in os.environ:
        return
    try:
        rank = os.pidfd_open(int(os.environ[_RANK_PID]))
    except ProcessLookupError:  # killed since
        os._exit(1)
    threading.Thread(target=_end_with, args=(rank,), name="end-with-rank", daemon=True).start()


def _end_with(process: int) -> None:
    ended = select.poll()
    ended.register(process, select.POLLIN)
    ended.poll()
    os._exit(1)


@contextlib.contextmanager
def joined_ranks() -> Iterator[int]:
    """Connect the ranks that torchrun or srun started together, this process alone if none did; gives its rank."""
    import torch.distributed as dist

    adopt_slurm_ranks()
    if "RANK" in os.environ:
        begin_rank()
        dist.init_process_group(
            store=rendezvous(),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=_LONGEST_START,
        )
    else:
        # vLLM looks for a launcher's variables too, and connects to nothing where there is one rank.
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def rendezvous() -> Any:
    """The store in which the ranks find each other: torch's TCPStore, but listening on MASTER_ADDR alone.

    torch's own way to it listens on every interface, and whoever reaches it can write there. None where the user's
    torchrun has made one already.

    Raises:
        ConfigError: MASTER_ADDR is not the first rank's.
        Unavailable: the port is in use for long, or the first rank does not answer.
    """
    import torch.distributed as dist

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ConfigError(
            f"several ranks were started without {' and '.join(missing)}: name the first one's node and port"
        )
    host, port, rank = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["RANK"])
    listener = _listen_patiently(host, port).detach() if rank == 0 else None
    try:
        return dist.TCPStore(
            host, port, int(os.environ["WORLD_SIZE"]), rank == 0, _LONGEST_START, master_listen_fd=listener
        )
    except dist.DistError as error:
        raise Unavailable(
            f"rank {rank} waited for the others at MASTER_ADDR={host}, MASTER_PORT={port} in vain ({error}): see what "
            "became of them, and start again"
        ) from None


def listen(host: str, port: int) -> socket.socket:
    """A socket for the ranks' store, at the address of `host` alone.

    Raises:
        ConfigError: this machine cannot listen there.
        Unavailable: the port is in use, or the name cannot be looked up at the moment.
    """
    try:
        family, *_, (address, *_) = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # Some distributions give a machine's own name a loopback address, which no other machine can reach.
        only_here = ipaddress.ip_address(address).is_loopback and host not in (address, "localhost")
        return socket.create_server(("" if only_here else address, port), family=family)
    except OSError as error:
        passes = error.errno in (errno.EADDRINUSE, socket.EAI_AGAIN)
        raise (Unavailable if passes else ConfigError)(
            f"the first rank cannot listen on MASTER_ADDR={host}, MASTER_PORT={port} ({error.strerror}): let them be "
            "an address of the node that it runs on, and a port that is free there"
        ) from None


def _listen_patiently(host: str, port: int) -> socket.socket:
    """As `listen`, and again where something was in the way that may pass."""
    deadline = time.monotonic() + PORT_PATIENCE
    while True:
        try:
            return listen(host, port)
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def local_rank() -> int:
    """Number of this rank on its node, as torchrun or srun says; 0 without them."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def launched_ranks() -> int:
    """Ranks that torchrun or srun started together; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))


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

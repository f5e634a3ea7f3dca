"""A real Slurm on this machine, whose daemons, keys and state all live in one folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
MISSING = [
    name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path="/usr/sbin:/usr/bin")
]
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE"}

_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# The credential's life is also how long a job that was queued again waits: 5 s is the least that Slurm takes.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=1
KillWait=5
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
# A node that a test has set down stays down.
ReturnToService=1
JobRequeue=1
MailProg=/bin/true
FirstJobId={first_job}
MinJobAge=3600
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """Nodes n1, n2, … of four pretended CPUs each."""

    def __init__(self, folder: Path, nodes: int) -> None:
        """Start it; `folder` has at most 70 characters, for the sockets in it."""
        self.folder, self.nodes = folder, [f"n{i + 1}" for i in range(nodes)]
        for name in ("state", "log"):
            (folder / name).mkdir(parents=True)
        # A test that runs inside a job of another cluster starts with nothing of it.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.environment = {
            **inherited,
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        ports = _free_ports(nodes + 1)
        host = socket.gethostname().split(".")[0]
        text = _CONFIGURATION.format(
            host=host,
            port=ports[0],
            user=psutil.Process().username(),
            folder=folder,
            first_job=1 + secrets.randbelow(10_000),  # jobs of two clusters derive different ports
        )
        for node, port in zip(self.nodes, ports[1:], strict=True):
            text += f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=8000\n"
        (folder / "slurm.conf").write_text(text)
        (folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o600)
        munge = ["munged", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.sock"]
        munge += [f"--pid-file={folder}/munged.pid", f"--log-file={folder}/log/munged.log"]
        self.run([*munge, f"--seed-file={folder}/munged.seed"])
        self._daemon("slurmctld")
        for node in self.nodes:
            self.boot(node)
        wait_until(lambda: self.run(["sinfo", "-h", "-N", "-t", "idle"]).count("\n") == nodes, 30)

    def run(self, command: Sequence[str], cwd: Path | None = None) -> str:
        """What a command prints, run with this cluster's settings."""
        result = subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, check=False, timeout=60
        )
        assert result.returncode == 0, f"{command}: {result.stderr}{result.stdout}"
        return result.stdout

    def _daemon(self, *command: str) -> None:
        # A daemon keeps what it inherits open: pipes of this process would never end.
        with (self.folder / "log" / f"{command[-1]}.out").open("a") as log:
            subprocess.run(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True, timeout=60
            )

    def submit(self, *arguments: str, cwd: Path) -> int:
        """`sbatch`; the job's number."""
        return int(self.run(["sbatch", "--parsable", *arguments], cwd))

    def state(self, job: int) -> str:
        """PENDING, RUNNING, COMPLETED, …"""
        return self.field(job, "JobState")

    def field(self, job: int, name: str) -> str:
        """A field of `scontrol show job`."""
        words = self.run(["scontrol", "show", "job", "--oneliner", str(job)]).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def wait(self, job: int, seconds: float) -> str:
        """The job's last state."""
        wait_until(lambda: self.state(job) in _ENDED, seconds)
        return self.state(job)

    def processes(self, **variables: str) -> list[psutil.Process]:
        """Processes of this cluster's jobs whose environment has these variables."""
        wanted = {"SLURM_CONF": self.environment["SLURM_CONF"], **variables}
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if all(environment.get(name) == value for name, value in wanted.items()):
                    found.append(process)
        return found

    def ranks(self, job: int) -> list[psutil.Process]:
        """The training processes of a job, by rank, without those that they have started or forked."""
        found = {}
        for process in self.processes(SLURM_JOB_ID=str(job)):
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                parent, rank = process.parent(), process.environ().get("SLURM_PROCID")
                if parent is not None and parent.name() == "slurmstepd" and "train" in process.cmdline() and rank:
                    found[int(rank)] = process
        return [found[rank] for rank in sorted(found)]

    def boot(self, node: str) -> None:
        """Start a node."""
        self._daemon("slurmd", "-N", node)

    def unplug(self, node: str) -> None:
        """End a node at once: its daemon, its step managers and every process of its tasks."""
        daemon = psutil.Process(int((self.folder / f"slurmd.{node}.pid").read_text()))
        tasks = self.processes(SLURMD_NODENAME=node)
        managers = [p for task in tasks if (p := task.parent()) is not None and p.name() == "slurmstepd"]
        for process in [daemon, *managers, *tasks]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def close(self) -> None:
        """Cancel its jobs and end its daemons."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            for job in set(self.run(["squeue", "-h", "-o", "%A"]).split()):
                self.run(["scancel", job])
            wait_until(lambda: not self.run(["squeue", "-h"]), 15)
        pids = [int(path.read_text()) for path in self.folder.glob("*.pid")]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        for process in self.processes(SLURM_CLUSTER_NAME="test"):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        wait_until(lambda: not any(_alive(pid) for pid in pids), 15)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Look again and again."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.2)


def _alive(pid: int) -> bool:
    # Whoever ended may stay a zombie where nothing reaps it.
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def running(folder: Path, nodes: int) -> Iterator[Cluster]:
    """A cluster, ended with the block."""
    cluster = Cluster(folder, nodes)
    try:
        yield cluster
    finally:
        cluster.close()

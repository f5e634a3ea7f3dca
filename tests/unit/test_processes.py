"""Where the first rank listens for the others, and what ends with a rank."""

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from megatron_sgopd import processes
from megatron_sgopd.errors import ConfigError, Unavailable
from megatron_sgopd.processes import rendezvous


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        number = free.getsockname()[1]
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(number)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return number


def test_the_store_serves_at_its_address_alone(port: int) -> None:
    store = rendezvous()
    store.set("key", "value")
    assert store.get("key") == b"value"
    with socket.create_connection(("127.0.0.1", port), timeout=1):
        pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=1)


def test_a_port_that_stays_taken_is_said_as_what_may_pass(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PORT_PATIENCE", 0.0)
    with socket.create_server(("127.0.0.1", port)), pytest.raises(Unavailable, match=f"MASTER_PORT={port} .Address"):
        rendezvous()


def test_a_port_that_is_taken_for_a_moment_is_waited_for(port: int) -> None:
    taken = socket.create_server(("127.0.0.1", port))
    threading.Timer(1.5, taken.close).start()
    store = rendezvous()
    store.set("key", "value")
    assert store.get("key") == b"value"


def test_an_address_of_another_machine_is_said(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    with pytest.raises(ConfigError, match=r"MASTER_ADDR=192\.0\.2\.1"):
        rendezvous()


def test_a_store_of_the_users_torchrun_is_left_to_it(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert rendezvous() is None


RANK = """\
import multiprocessing, os, sys, time

from megatron_sgopd.processes import begin_rank, end_with_rank

if __name__ != "__main__":  # in the child, which is still importing
    open(sys.argv[1], "w").write(str(os.getpid()))
    time.sleep(float(sys.argv[2]))
    end_with_rank()


def wait_for_ever():
    open(sys.argv[1] + ".done", "w").write("imported")
    time.sleep(60)


if __name__ == "__main__":
    begin_rank()
    multiprocessing.get_context("spawn").Process(target=wait_for_ever).start()
    time.sleep(60)
"""


@pytest.mark.parametrize("importing", [True, False])
def test_a_process_that_a_rank_started_ends_when_the_rank_is_killed(tmp_path: Path, importing: bool) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    started = tmp_path / "started"
    rank = subprocess.Popen([sys.executable, str(tmp_path / "rank.py"), str(started), "2" if importing else "0"])
    awaited = started if importing else tmp_path / "started.done"
    deadline = time.monotonic() + 30
    while not (awaited.is_file() and awaited.read_text()):
        assert time.monotonic() < deadline and rank.poll() is None
        time.sleep(0.05)
    child = psutil.Process(int(started.read_text()))
    rank.kill()
    rank.wait()
    psutil.wait_procs([child], timeout=20)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


LATE_RANK = """\
import sys, time

from megatron_sgopd.processes import begin_rank

open(sys.argv[1], "w").write("loading")
time.sleep(2)
begin_rank()
open(sys.argv[1], "w").write("begun")
time.sleep(60)
"""


def test_a_rank_whose_launcher_was_killed_while_it_loaded_its_libraries_ends(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(LATE_RANK)
    state = tmp_path / "state"
    command = [sys.executable, str(tmp_path / "rank.py"), str(state)]
    code = f"import subprocess, time; subprocess.Popen({command!r}); time.sleep(60)"
    launcher = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while not (state.is_file() and state.read_text() == "loading"):
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.05)
    (rank,) = psutil.Process(launcher.pid).children()
    launcher.kill()
    launcher.wait()
    psutil.wait_procs([rank], timeout=20)
    assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE
    assert state.read_text() == "loading"


HELD_BACK = """\
import multiprocessing, time

from megatron_sgopd.stopping import StopRequest

StopRequest().listen()
multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True).start()
"""


def test_a_daemon_that_holds_the_stop_signals_back_does_not_keep_its_rank(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(HELD_BACK)
    started = time.monotonic()
    subprocess.run([sys.executable, str(tmp_path / "rank.py")], check=True, timeout=100)
    assert time.monotonic() - started < 40  # libraries load for some seconds; without an end to it, the daemon's 60


SAVES = """\
import os, sys, time

from megatron_sgopd import register
from megatron_sgopd.processes import begin_rank, end_with_rank

if __name__ == "__main__":
    begin_rank()
    register()
    from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

    get_write_results_queue("fork")  # as Megatron does when it starts
    print("ready", flush=True)
    time.sleep(60)
end_with_rank()
"""


def test_what_saves_in_the_background_ends_with_a_rank_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(SAVES)
    words = [sys.executable, str(script), "--async-save", "--sgopd-platform=cpu", "--sgopd-model-path=x"]
    words += ["--sgopd-teacher-path=x", "--sgopd-data-train-source=x"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as rank:
        assert rank.stdout is not None and rank.stdout.readline() == "ready\n"
        children = psutil.Process(rank.pid).children()
        assert any("spawn" in " ".join(child.cmdline()) for child in children), "forked once CUDA has started"
        rank.kill()
    assert psutil.wait_procs(children, timeout=20)[1] == []

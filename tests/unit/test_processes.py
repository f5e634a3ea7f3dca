"""Where the first rank listens for the others, and what ends with a rank."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_sgopd.errors import ConfigError
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


def test_a_port_that_is_taken_is_said(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ConfigError, match=f"MASTER_PORT={port} .Address"):
        rendezvous()


def test_an_address_of_another_machine_is_said(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    with pytest.raises(ConfigError, match=r"MASTER_ADDR=192\.0\.2\.1"):
        rendezvous()


def test_a_store_of_the_users_torchrun_is_left_to_it(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert rendezvous() is None


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

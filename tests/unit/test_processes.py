"""Where the first rank listens for the others."""

import socket

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

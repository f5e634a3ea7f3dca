"""Nothing is sent anywhere that the user did not name."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_sgopd.platform.cpu import CpuPlatform
from megatron_sgopd.platform.cuda import CudaPlatform

from ..commands import REPOSITORY

ASK = """
import os, sys
from vllm.usage import usage_lib
print(usage_lib.is_usage_stats_enabled())
os.environ["VLLM_NO_USAGE_STATS"] = sys.argv[1]
usage_lib._USAGE_STATS_ENABLED = None
print(usage_lib.is_usage_stats_enabled())
"""


@pytest.mark.parametrize("platform", [CpuPlatform, CudaPlatform])
def test_engines_do_not_report_themselves(platform: type[CpuPlatform] | type[CudaPlatform]) -> None:
    assert platform.environment["VLLM_NO_USAGE_STATS"] == "1"


def test_vllm_heeds_that_variable() -> None:
    words = [sys.executable, "-c", ASK, CpuPlatform.environment["VLLM_NO_USAGE_STATS"]]
    alone = {"HOME": "/nonexistent"}  # without the user's own wishes
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True, env=alone)
    assert done.stdout.split()[-2:] == ["True", "False"]


LOOKS = """
import sys
reached = []
def note(event, arguments):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        reached.append((event, arguments))
sys.addaudithook(note)
from megatron_sgopd.cli import main
code = main(sys.argv[1:])
print(code, reached)
"""


@pytest.mark.parametrize(
    "words",
    [
        ["train", "examples/arithmetic_cpu/recipe.yaml", "--dry-run"],
        ["inspect", "examples/arithmetic_cpu/models/student"],
        ["plan", "examples/arithmetic_cpu/recipe.yaml", "--gpus", "1"],
    ],
)
def test_commands_open_no_connection(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOOKS, *words], capture_output=True, text=True, timeout=120, check=True, cwd=REPOSITORY
    )
    assert done.stdout.splitlines()[-1] in ("0 []", "1 []")


def test_the_reader_of_data_sets_cannot(tmp_path: Path) -> None:
    ask = (
        "import socket, sys, urllib.request\n"
        "from megatron_sgopd.rollout.prompt_reader import refuse_network\n"
        "sys.addaudithook(refuse_network)\n"
        "for attempt in (lambda: socket.create_connection(('127.0.0.1', 9)),\n"
        "                lambda: socket.getaddrinfo('localhost', 80),\n"
        "                lambda: urllib.request.urlopen('http://127.0.0.1:9/')):\n"
        "    try:\n"
        "        attempt()\n"
        "    except OSError as error:\n"
        "        print('refused' if 'must not reach for the network' in str(error) else error)\n"
    )
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["refused"] * 3


def test_conversions_by_several_ranks_meet_at_their_address_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own way to it listens on every interface."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ask = "from megatron_sgopd.checkpoint.convert import Ranks; Ranks.from_environment()"
    with subprocess.Popen([sys.executable, "-c", ask], env={**os.environ, **environment}) as process:
        try:
            for _ in range(300):
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except ConnectionRefusedError:
                    time.sleep(0.1)
            else:
                pytest.fail("nobody listens")
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.2", port), timeout=1)
        finally:
            process.kill()

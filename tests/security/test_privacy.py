"""What a private run makes is for its owner alone, and what is served is for whom the address was given."""

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from megatron_sgopd.cli import main
from megatron_sgopd.config import PromptSettings
from megatron_sgopd.monitor.output import run_folder
from megatron_sgopd.recipe import load_recipe
from megatron_sgopd.report import live
from megatron_sgopd.rollout.prompt_cache import load_prompts

from ..commands import REPOSITORY
from ..unit.test_report import write_run
from .conftest import RECIPE, STUDENT, as_nobody, python


@pytest.fixture(autouse=True)
def generous_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def for_others(folder: Path) -> list[str]:
    """Files and folders that others can read, write or enter."""
    paths = [folder, *folder.rglob("*")]
    return [str(path) for path in paths if path.lstat().st_mode & 0o077 and not path.is_symlink()]


@pytest.mark.parametrize("private", [True, False])
def test_a_run_folder_and_all_that_is_made_in_it(private: bool, tmp_path: Path) -> None:
    os.umask(0o022)
    recipe = load_recipe(RECIPE, [f"run_dir={tmp_path / 'a/run'}", f"private={str(private).lower()}"])
    folder = run_folder(recipe)
    (folder / "logs").mkdir()
    (folder / "logs/rank-0.log").write_text("a prompt")
    assert (for_others(tmp_path / "a") == []) == private


def test_a_report_of_a_private_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3)
    assert main(["report", str(run), "--out", str(tmp_path / "private.html")]) == 0
    assert for_others(tmp_path / "private.html") == []
    os.umask(0)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"private": False}))
    assert main(["report", str(run), "--out", str(tmp_path / "shared.html")]) == 0
    assert for_others(tmp_path / "shared.html") != []


def test_prompts_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("SGOPD_CACHE", str(cache))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "secret", "answer": "2"}\n')
    [prompts] = load_prompts([PromptSettings(source=str(tmp_path / "prompts.jsonl"))], str(STUDENT))
    assert len(prompts) == 1
    readable = [path for path in for_others(cache) if not path.endswith(".lock")]
    assert readable == [], "the locks hold nothing, in a folder that nobody else can enter"


@pytest.mark.long
@pytest.mark.parametrize("command", ["eval", "teacher-rollouts", "compare"])
def test_what_other_commands_leave(command: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = ["data.train.size=8", "data.heldout.size=2", "rollout.cache_gib=0.1", "teacher_rollouts.end_step=1"]
    small += [
        "train.rows_per_microbatch=2",
        "rollout.prompts_per_step=4",
        "rollout.group_size=2",
        "train.steps=1",
        "train.warmup_steps=0",
    ]
    small += ["evaluate.teacher=false", "evaluate.samples=1", "parallel.ranks=1", "parallel.tensor=1"]
    sets = [word for setting in small for word in ("--set", setting)]
    words = {
        "eval": [str(STUDENT), "--data", str(tmp_path / "p.jsonl"), "--samples", "1", "--out", str(out)],
        "teacher-rollouts": [str(RECIPE), "--bank", str(out), *sets],
        "compare": [str(RECIPE), "--methods", "opd,sgopd", "--seeds", "1", "--out", str(out), *sets],
    }
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    subprocess.run(
        python("-m", "megatron_sgopd.cli", command, *words[command]),
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=True,
    )
    assert for_others(out) == []


# ---- The page over a run --------------------------------------------------------------------------------


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a served page."""
    run = write_run(tmp_path / "run", 3)
    with subprocess.Popen(
        python("-m", "megatron_sgopd.cli", "report", "--live", "--port", "0", str(run)),
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        yield server.stdout.readline().split()[1]
        server.kill()


def test_another_user_without_the_address_sees_nothing(address: str) -> None:
    assert urllib.request.urlopen(address, timeout=10).status == 200
    assert urllib.request.urlopen(f"{address}data", timeout=10).headers["X-State"]
    root = "/".join(address.split("/")[:3])
    ask = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=10).status)"
    for path in ("/", "/data", "/data?seen=", "/guess/", "/guess/data", "//data"):
        done = as_nobody("/usr/bin/env", "python3", "-c", ask, f"{root}{path}")
        assert done.returncode != 0 and "404" in done.stderr, (path, done)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{root}{path}", timeout=10)


def test_addresses_are_not_the_same_twice() -> None:
    class Stopped(Exception):
        pass

    tokens = set()

    def stop(_: object, token: str) -> None:
        tokens.add(token)
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "_Newest", lambda _: lambda: None)
        patch.setattr(live, "_handler", stop)
        for _ in range(3):
            with pytest.raises(Stopped):
                live.serve([], 0)
    assert len(tokens) == 3 and all(len(token) >= 20 for token in tokens)


def test_connections_that_say_nothing_are_let_go(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host, port = address.split("/")[2].split(":")
    idle = [socket.create_connection((host, int(port)), timeout=30) for _ in range(20)]
    assert urllib.request.urlopen(address, timeout=10).status == 200
    began = time.monotonic()
    assert all(connection.recv(1) == b"" for connection in idle), "closed by the server"
    assert time.monotonic() - began < 25

"""The doctor finds faults that are planted, and names them with the mend."""

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_sgopd.checkpoint.completeness import FileRecord, step_folder, write_manifest
from megatron_sgopd.cli import main
from megatron_sgopd.cluster import doctor
from megatron_sgopd.cluster.doctor import Finding
from megatron_sgopd.config import Recipe
from megatron_sgopd.recipe import load_recipe

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "examples/arithmetic_cpu"


@pytest.fixture(autouse=True)
def repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def recipe(tmp_path: Path, *changes: str) -> Recipe:
    return load_recipe(EXAMPLE / "recipe.yaml", [f"run_dir={tmp_path / 'run'}", *changes])


def red(findings: Iterator[Finding]) -> str:
    return "\n".join(finding.said for finding in findings if finding.level == "red")


def test_a_torch_that_vllm_was_not_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.12.0" if name == "torch" else version(name))
    said = red(doctor.packages())
    assert re.search(r"vllm(-cpu)? 0\.32\.0 needs torch==2\.13\.0", said) and "torch 2.12.0 is there" in said
    assert "torch<2.14,>=2.13 is needed, and 2.12.0 is there" in said


def test_a_megatron_of_a_later_series(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.20.1" if name == "megatron-core" else version(name)
    )
    assert "megatron-core 0.20.1: the plugin needs 0.19's" in red(doctor.packages())


def test_tokenizers_that_differ(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(EXAMPLE / "models/teacher", teacher)
    file = teacher / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    file.write_text(json.dumps(tokenizer))
    said = red(doctor.models(recipe(tmp_path, f"teacher.path={teacher}")))
    assert "different tokenizers" in said and "take a teacher with the same tokenizer" in said


def test_a_model_with_a_file_that_was_cut_off(tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(EXAMPLE / "models/student", student)
    with (student / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    assert "cannot be read as safetensors" in red(doctor.models(recipe(tmp_path, f"model.path={student}")))


def test_a_model_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "is not a folder" in red(doctor.models(recipe(tmp_path, f"teacher.path={tmp_path / 'none'}")))


def test_a_run_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    one = recipe(tmp_path, f"run_dir={tmp_path / 'file' / 'run'}")
    assert "cannot be written to (Not a directory): choose another run_dir" in red(doctor.storage(one))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount: run as root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_full(tmp_path: Path, small_disk: Path) -> None:
    one = recipe(tmp_path, f"run_dir={small_disk / 'run'}")
    assert "cannot be written to (No space left on device)" in red(doctor.storage(one))
    assert "a checkpoint takes" in red(doctor.settings(one))


def test_a_rendezvous_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no-such-node.invalid")
    assert "MASTER_ADDR=no-such-node.invalid has no address" in red(doctor.rendezvous())


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        assert f"cannot listen on MASTER_ADDR=127.0.0.1, MASTER_PORT={port}" in red(doctor.rendezvous())


def test_a_checkpoint_with_a_file_that_is_gone(tmp_path: Path) -> None:
    checkpoint = step_folder(tmp_path / "run/checkpoints", 3)
    checkpoint.mkdir(parents=True)
    write_manifest(checkpoint, {"__0_0.distcp": FileRecord(8, None)})
    assert "iter_0000003/__0_0.distcp is missing" in red(doctor.checkpoints(recipe(tmp_path)))


def test_a_job_with_another_number_of_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "3")
    assert "SLURM_NTASKS=3, but parallel.ranks=2" in red(doctor.slurm(recipe(tmp_path)))


def test_a_locale_that_is_not_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locale.getpreferredencoding", lambda _: "ANSI_X3.4-1968")
    assert "set LC_ALL=C.UTF-8" in red(doctor.text_encoding())


def test_an_interface_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no_such_interface")
    assert "set GLOO_SOCKET_IFNAME" in red(doctor.collectives())


def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    assert "torch sees no GPU" in red(doctor.memory(recipe(tmp_path, "platform=cuda")))


def test_a_layout_that_training_would_refuse(tmp_path: Path) -> None:
    assert "does not divide" in red(doctor.settings(recipe(tmp_path, "parallel.tensor=3", "parallel.ranks=3")))


def test_a_machine_and_a_recipe_without_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["doctor", str(EXAMPLE / "recipe.yaml"), f"--set=run_dir={tmp_path / 'run'}", "--no-generate", "--json"]
    code = main(arguments)
    found = [Finding(**json.loads(line)) for line in capsys.readouterr().out.splitlines()]
    assert red(iter(found)) == "" and code == 0
    checks = {finding.check for finding in found}
    assert checks >= {"python", "packages", "gpus", "products", "collectives", "models", "recipe", "storage", "clock"}


def test_a_fault_gives_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(KeyError):
        del os.environ["MASTER_ADDR"]
    arguments = ["doctor", str(EXAMPLE / "recipe.yaml"), f"--set=teacher.path={tmp_path}", "--no-generate"]
    assert main(arguments) == 1
    assert "BAD  models" in capsys.readouterr().out


def test_data_whose_own_solutions_end_elsewhere_are_named(tmp_path: Path) -> None:
    rows = [{"problem": "3+4=", "solution": "So \\boxed{6}.", "answer": "7"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = [f"data.train={{source: {tmp_path}/rows.jsonl}}", "data.heldout=null", "verify.verifier=math"]
    [finding] = doctor.data(recipe(tmp_path, *changes))
    assert finding.level == "yellow" and "line 1: ends in '6', and the reference is '7'" in finding.said

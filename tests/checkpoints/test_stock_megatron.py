"""Stock `megatron.training.pretrain`, without the plugin, goes on from a converted checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .conftest import REPOSITORY, Conversion, environment, run_all

# What stock Megatron needs on a machine without GPUs: not the plugin, but the same platform.
_ON_CPU = """
from megatron_sgopd.platform import select
select("cpu")
import megatron.core.datasets.utils
megatron.core.datasets.utils.compile_helpers = lambda: None
"""


def _plain_script(folder: Path) -> Path:
    """The example's script as it was before the plugin's two lines."""
    lines = (REPOSITORY / "examples/own_pretrain_script/pretrain_gpt.py").read_text().splitlines()
    first, second = (next(i for i, line in enumerate(lines) if mark in line) for mark in ("# <- 1", "# <- 2"))
    lines[second - 1 : second + 1] = []  # with the guard above it
    lines[first] = _ON_CPU
    script = folder / "pretrain_gpt.py"
    script.write_text("\n".join(lines))
    assert "register" not in script.read_text()
    return script


def _train(script: Path, flags: list[str], load: Path, save: Path) -> str:
    from megatron_sgopd.platform.cpu import CpuPlatform

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    command += ["--tensor-model-parallel-size", "2", *CpuPlatform.megatron_flags, *flags]
    command += ["--load", str(load), "--save", str(save), "--save-interval", "1", "--ckpt-format", "torch_dist"]
    command += ["--tokenizer-type", "NullTokenizer", "--mock-data", "--seq-length", "64", "--micro-batch-size", "2"]
    command += ["--global-batch-size", "4", "--train-iters", "3", "--lr", "1e-3", "--lr-warmup-iters", "1"]
    command += ["--lr-decay-style", "constant", "--weight-decay", "0", "--eval-iters", "0", "--eval-interval", "9"]
    command += ["--log-interval", "1", "--calculate-per-token-loss"]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**environment(), **CpuPlatform.environment, "PYTHONPATH": os.pathsep.join([str(REPOSITORY)])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.long
def test_it_loads_saves_and_trains(conversions: dict[str, Conversion], tmp_path: Path) -> None:
    model = conversions["qwen2"]
    script, saved = _plain_script(tmp_path), tmp_path / "saved"
    flags = (model.megatron / "megatron_flags.txt").read_text().split()
    standing = _train(script, [*flags, "--exit-interval", "1"], model.megatron, saved)
    assert f"successfully loaded checkpoint from {model.megatron}" in standing
    moved = _train(script, flags, saved, saved)
    assert "at iteration 1" in moved
    assert "iteration        3/       3" in moved

    arguments = ["--like", model.source, "--allow-no-tokenizer"]
    run_all(
        [
            ["convert", "to-hf", saved, tmp_path / "stood", "--step", 1, *arguments],
            ["convert", "to-hf", saved, tmp_path / "moved", *arguments],
        ]
    )
    source, stood, after = (
        load_file(folder / "model.safetensors") for folder in (model.source, tmp_path / "stood", tmp_path / "moved")
    )
    for name, weight in source.items():
        assert torch.equal(stood[name], weight), name  # warm-up makes the first step one of size 0
    assert not torch.equal(after["model.norm.weight"], source["model.norm.weight"])

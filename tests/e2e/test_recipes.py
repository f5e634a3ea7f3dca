"""The recipes for GPUs: whole ones pass the planner and --dry-run, shrunk ones train on CPU by the same code path."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_sgopd.cli import main

from ..commands import REPOSITORY, set_words
from .conftest import STUDENT, Finished

RECIPES = {
    "llama31_70b_to_8b": {"parallel.tensor": 2, "teacher.tensor_parallel": 1, "teacher.pipeline_parallel": 2},
    "qwen3_32b_to_4b": {"parallel.tensor": 2, "teacher.tensor_parallel": 2},
    "qwen3_30b_a3b_to_1p7b": {"parallel.tensor": 1, "teacher.tensor_parallel": 1, "teacher.expert_parallel": 2},
}
"""By name, the layout of a shrunk one on two ranks: of the same kinds of parallelism."""
SHRUNK = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "max_window_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
ON_CPU: dict[str, Any] = {
    "platform": "cpu",
    "parallel.ranks": 2,
    "parallel.sequence": False,
    "train.precision": "float32",
    "rollout.tensor_parallel": 1,
}
SMALL: dict[str, Any] = {
    "train.steps": 3,
    "train.warmup_steps": 0,
    "train.row_tokens": 64,
    "rollout.prompts_per_step": 4,
    "rollout.group_size": 2,
    "rollout.max_new_tokens": 16,
    "rollout.cache_gib": 0.1,
    "data.heldout": None,
    "verify.verifier": "exact",
    "alarms.truncated_steps": 10,  # random weights know no end
    "alarms.teacher_floor": 2.0,
}


def model_folder(config: Path, out: Path, sizes: dict[str, Any] | None) -> Path:
    """A folder of a model of the recipe's kind, with the arithmetic example's tokenizer; with weights if shrunk."""
    shutil.copytree(STUDENT, out, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    with (out / "chat_template.jinja").open("a") as template:
        template.write("{% if enable_thinking is defined and enable_thinking %}{% endif %}")  # as Qwen3's reads it
    fields = json.loads((config / "config.json").read_text())
    if sizes is None:
        (out / "config.json").write_text(json.dumps(fields))
        (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
        return out
    tokens = json.loads((STUDENT / "config.json").read_text())
    known = {name: value for name, value in sizes.items() if name in fields}
    special = {name: tokens[name] for name in ("vocab_size", "eos_token_id", "pad_token_id", "bos_token_id")}
    (out / "config.json").write_text(json.dumps(fields | known | special | {"torch_dtype": "float32"}))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out)).save_pretrained(out)
    return out


def prompts(path: Path) -> Path:
    lines = [json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) for a in range(20) for b in range(20)]
    path.write_text("\n".join(lines))
    return path


def command(name: str, settings: dict[str, Any], *more: str) -> Finished:
    recipe = REPOSITORY / "examples" / name / "recipe.yaml"
    words = [sys.executable, "-m", "megatron_sgopd.cli", "train", str(recipe), *set_words(settings), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    return Finished(Path(settings["run_dir"]), done.returncode, done.stdout, done.stderr)


def train_shrunk(name: str, changes: dict[str, Any], sizes: dict[str, Any], gap: float, folder: Path) -> None:
    """Three steps of a recipe with `changes`, its models of `sizes`; trainer and engine agree to `gap` nats."""
    configs = REPOSITORY / "examples" / name / "configs"
    settings = SMALL | changes | {"run_dir": str(folder / "run")}
    settings["data.train.source"] = str(prompts(folder / "prompts.jsonl"))
    for part, setting in (("student", "model.path"), ("teacher", "teacher.path")):
        settings[setting] = str(model_folder(configs / part, folder / part, sizes))
    finished = command(name, settings)
    assert finished.code == 0, finished.errors + finished.output
    assert [line["step"] for line in finished.metrics] == [1, 2, 3]
    assert all(line["logprob_gap"] < gap and line["teacher_forwards"] == line["step"] for line in finished.metrics)


@pytest.mark.long
@pytest.mark.parametrize("name", RECIPES)
def test_a_shrunk_recipe_trains(name: str, tmp_path: Path) -> None:
    train_shrunk(name, ON_CPU | RECIPES[name], SHRUNK, 1e-3, tmp_path)


@pytest.fixture
def large_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that says that it has room for the checkpoints of an 8B model; nothing is written there."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=500g", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount: run as root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "qwen3_32b_to_4b" else [pytest.mark.long]) for n in RECIPES]
)
def test_a_whole_recipe_passes_the_planner_and_a_dry_run(
    name: str, tmp_path: Path, large_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = REPOSITORY / "examples" / name / "configs"
    settings: dict[str, Any] = {"run_dir": str(large_disk / "run"), "data.heldout": None}
    many = prompts(tmp_path / "prompts.jsonl")
    many.write_text(
        "\n".join(line.replace("+", f"+{i}+", 1) for i in range(3) for line in many.read_text().splitlines())
    )
    settings["data.train.source"] = str(many)
    for part, folder in (("student", "model.path"), ("teacher", "teacher.path")):
        settings[folder] = str(model_folder(configs / part, tmp_path / part, None))
    dry = command(name, settings, "--dry-run")
    assert dry.code == 0, dry.errors
    assert "# first prompt, " in dry.output
    assert "--use-distributed-optimizer" in dry.output and "--bf16" in dry.output
    assert main(["plan", str(REPOSITORY / "examples" / name / "recipe.yaml"), *set_words(settings)]) == 0
    assert "The recipe's own layout fits." in capsys.readouterr().out

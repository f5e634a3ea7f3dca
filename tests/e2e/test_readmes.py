"""The command lines in the READMEs of the recipes for GPUs, run as they stand by bash: sbatch and srun are stubs.

What the stubs cannot know is left to the real programs: `megatron-sgopd` itself gets each command of a rank.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from megatron_sgopd.cli import _parser
from megatron_sgopd.recipe import load_recipe

from ..commands import REPOSITORY, VLLM_FOR_CPUS
from .conftest import STUDENT
from .test_recipes import RECIPES, SHRUNK, model_folder, prompts

SBATCH = """\
#!{python}
import argparse, os, re, subprocess, sys

known = argparse.ArgumentParser(allow_abbrev=False)
for name in ("nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "array", "dependency", "output",
             "kill-on-invalid-dep", "job-name", "time", "time-min", "signal", "open-mode"):
    known.add_argument("--" + name)
for name in ("exclusive", "parsable", "requeue"):
    known.add_argument("--" + name, action="store_true")
words = sys.argv[1:]
script = next(i for i, word in enumerate(words) if not word.startswith("-"))
own = re.findall(r"^#SBATCH (--\\S+)", open(words[script]).read(), re.M)
options = known.parse_args([*own, *words[:script]])
assert os.access(words[script], os.X_OK)
nodes, tasks = int(options.nodes or 1), int(options.ntasks_per_node or 1)
job = {{
    "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": os.getcwd(), "SLURM_JOB_NODELIST": "n1",
    "SLURM_NTASKS": str(nodes * tasks), "SLURM_NTASKS_PER_NODE": str(tasks),
    "GIVEN_GPUS": options.gpus_per_node or "", "GIVEN_MEM": options.mem or "",
    "GIVEN_EXCLUSIVE": str(options.exclusive), "SCRIPT": words[script],
}}
if options.cpus_per_task:
    job["SLURM_CPUS_PER_TASK"] = options.cpus_per_task
if options.array:
    job |= {{"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MAX": options.array.split("-")[1]}}
done = subprocess.run(["bash", *words[script:]], env={{**os.environ, **job}}, stdout=subprocess.PIPE, text=True)
with open("job.out", "a") as file:
    file.write(done.stdout)
print("7" if options.parsable else "Submitted batch job 7")
sys.exit(done.returncode)
"""
SRUN = """\
#!{python}
import os, sys
words = sys.argv[1:]
command = next(i for i, word in enumerate(words) if not word.startswith("-"))
alone = "--ntasks=1" in words
os.environ.update(SLURM_PROCID="0", SLURM_LOCALID="0", **({{"SLURM_NTASKS": "1"}} if alone else {{}}))
os.execvp(words[command], words[command:])
"""
COMMAND = """\
#!{python}
import json, os, sys
names = [n for n in os.environ if n.startswith(("SLURM", "SRUN", "GIVEN")) or n in ("SCRIPT", "VIRTUAL_ENV")]
with open("calls.jsonl", "a") as file:
    environment = {{n: os.environ[n] for n in names}}
    file.write(json.dumps({{"words": sys.argv[1:], "taken": sys.argv[0], "environment": environment}}) + "\\n")
"""
SCONTROL = """\
#!/bin/sh
case "$*" in *hostnames*) echo n1 ;; *) echo "NodeName=n1 NodeAddr=127.0.0.1" ;; esac
"""
MAKE = f"""\
#!/bin/sh
exec /usr/bin/env -i PATH=/usr/bin:/bin make -n -C {REPOSITORY} "$@"
"""


@dataclass(frozen=True)
class Call:
    """A command of this program that a README's line came to."""

    words: list[str]
    taken: str
    environment: dict[str, str]


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.format(python=sys.executable) if text.startswith("#!{") else text)
    path.chmod(0o755)


def commands(readme: str) -> str:
    """All blocks of a README in bash, and what begins as a command in its sentences, in their order."""
    found = []
    for block, inline in re.findall(r"```bash\n(.*?)```|`([^`]+)`", readme, re.S):
        words = inline.split()
        if block or (len(words) > 2 and words[0] in ("sbatch", "megatron-sgopd", "slurm/pipeline.sh")):
            found.append(block or " ".join(words))
    return "\n".join(found)


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Call]]:
    """What the lines of an example's README come to, in a folder that has the repository's; each is run once."""

    @cache
    def run(name: str) -> list[Call]:
        folder = tmp_path_factory.mktemp(name)
        for part in ("examples", "slurm"):
            (folder / part).symlink_to(REPOSITORY / part)
        for stub, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "make": MAKE}.items():
            executable(folder / "stubs" / stub, text)
        executable(folder / ".venv-cuda/bin/megatron-sgopd", COMMAND)
        executable(folder / ".venv-cuda/bin/python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        venv = folder / ".venv-cuda"
        (venv / "bin/activate").write_text(f"export VIRTUAL_ENV={venv} PATH={venv}/bin:$PATH\n")
        executable(folder / ".venv/bin/megatron-sgopd", "#!/bin/sh\nexit 9\n")  # as `make demo` leaves one
        text = commands((REPOSITORY / "examples" / name / "README.md").read_text())
        own = ("VIRTUAL_ENV", "SLURM", "SBATCH", "SGOPD")
        environment = {n: v for n, v in os.environ.items() if not n.startswith(own)}
        environment["PATH"] = f"{folder}/stubs:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-euc", text],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
        assert f"software {venv}" in (folder / "job.out").read_text()
        return [Call(**json.loads(line)) for line in (folder / "calls.jsonl").read_text().splitlines()]

    return run


@pytest.mark.parametrize("name", RECIPES)
def test_each_command_is_taken_as_it_stands_by_the_environment_that_was_activated(
    name: str, calls: Callable[[str], list[Call]]
) -> None:
    made = calls(name)
    assert {call.words[0] for call in made} >= {"doctor", "plan", "train", "requeue"}
    for call in made:
        _parser().parse_args(call.words)  # exits otherwise
        assert call.taken.endswith("/.venv-cuda/bin/megatron-sgopd"), call


@pytest.mark.parametrize("name", RECIPES)
def test_jobs_ask_for_the_ranks_gpus_cores_and_memory_that_they_need(
    name: str, calls: Callable[[str], list[Call]]
) -> None:
    recipe = load_recipe(REPOSITORY / "examples" / name / "recipe.yaml")
    jobs = [
        call for call in calls(name) if "SCRIPT" in call.environment and call.words[0] not in ("requeue", "convert")
    ]
    assert "train" in {call.words[0] for call in jobs}
    for call in jobs:
        given = call.environment
        ranks = int(given["SLURM_NTASKS"])
        if call.words[0] == "train":
            assert ranks == recipe.parallel.ranks
        if call.words[0] == "teacher-rollouts":
            assert ranks % (recipe.teacher_rollouts.tensor_parallel or recipe.rollout.tensor_parallel) == 0
        assert given["GIVEN_GPUS"] == given["SLURM_NTASKS_PER_NODE"] == "8", (
            "a rank has a GPU, and sees those of its node"
        )
        assert int(given["SRUN_CPUS_PER_TASK"]) > recipe.verify.workers, "srun would bind a rank to one core"
        assert given["GIVEN_MEM"] == "0" and given["GIVEN_EXCLUSIVE"] == "True", (
            "what is pinned takes the node's memory"
        )


ENDS = {
    "doctor": (1, "torch sees no GPU: run this on a compute node"),
    **{
        f"plan examples/llama31_70b_to_8b/recipe.yaml --gpus {fewer} ": (1, "Best 1 of those that fit")
        for fewer in (8, 16)  # the recipe's own layout takes 32
    },
    "plan": (0, ""),
    "train examples/llama31_70b_to_8b/recipe.yaml --set run_dir": (2, "runs/llama31_70b_to_8b_chain/bank"),
    "train": (0, "--use-distributed-optimizer"),
    "requeue": (0, ""),
    "teacher-rollouts": (2, "platform 'cuda' was asked for, but torch sees no GPU"),
    "convert to-megatron": (0, ""),
    "export": (2, "is not a run folder"),
    "convert to-hf": (2, "runs/llama31_70b_to_8b"),
    "eval models/distilled": (0, "avg@32")
    if VLLM_FOR_CPUS
    else (2, "vLLM is installed for GPUs here, and none is seen"),
    "eval": (2, "runs/llama31_70b_to_8b_chain/model is no torch_dist checkpoint"),
}
"""How far each command goes on a CPU, by what it begins with: its exit code, and what it then says."""


@pytest.mark.long
@pytest.mark.parametrize("name", RECIPES)
def test_each_command_runs_as_far_as_a_cpu_goes(name: str, calls: Callable[[str], list[Call]], tmp_path: Path) -> None:
    recipe = load_recipe(REPOSITORY / "examples" / name / "recipe.yaml")
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    (tmp_path / "models").mkdir()
    (tmp_path / "data/math").mkdir(parents=True)
    sizes = SHRUNK | {"num_attention_heads": 8, "num_key_value_heads": 8, "num_experts": 8}
    for part, folder in (("student", recipe.model.path), ("teacher", recipe.teacher.path)):
        model_folder(REPOSITORY / "examples" / name / "configs" / part, tmp_path / folder, sizes)
    shutil.copytree(STUDENT, tmp_path / "models/distilled")
    prompts(tmp_path / "data/math/train.jsonl")
    (tmp_path / "data/math/heldout.jsonl").write_text('{"prompt": "2*3=", "answer": "6"}\n')
    (tmp_path / "aime24.jsonl").write_text('{"problem": "1+1=", "answer": "2"}\n')
    environment = {n: v for n, v in os.environ.items() if not n.startswith("SLURM")} | {"OMP_NUM_THREADS": "1"}
    for words, slurm in {tuple(call.words): call.environment for call in calls(name)}.items():
        code, said = next(ENDS[start] for start in ENDS if " ".join(words).startswith(start))
        more = ["--dry-run"] if words[0] == "train" else []
        waits = words[0] == "convert" or words[:2] == ("eval", "models/distilled")  # for the job's other ranks
        rank = {} if waits else slurm
        done = subprocess.run(
            [sys.executable, "-m", "megatron_sgopd.cli", *words, *more],
            cwd=tmp_path,
            env=environment | rank,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == code and said in done.stdout + done.stderr, (words, done.stdout, done.stderr)

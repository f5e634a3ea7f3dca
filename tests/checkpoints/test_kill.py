"""A conversion that is killed at any moment leaves nothing that passes for complete, and goes on when started again."""

import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import environment


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of some 30 MB, so that it is many files of 500 kB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("direction", ["to-megatron", pytest.param("to-hf", marks=pytest.mark.long)])
def test_twenty_kills(model: Path, tmp_path: Path, direction: str) -> None:
    script = Path(__file__).with_name("kill_conversions.py")
    done = subprocess.run(
        [sys.executable, str(script), str(model), str(tmp_path / "out"), direction, "20", "1"],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    words = done.stdout.splitlines()[-1].split()
    assert words[1] == "20"
    assert int(words[words.index("attempts") - 1]) >= 10  # most went on from what a killed one had left

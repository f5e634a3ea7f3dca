"""Every module can be imported, in whichever environment, and by itself."""

import importlib.util
import subprocess
import sys

import pytest

import megatron_sgopd

IMPORT_ALL = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
import megatron_sgopd
for module in pkgutil.walk_packages(megatron_sgopd.__path__, "megatron_sgopd."):
    importlib.import_module(module.name)
print("all", len([name for name in sys.modules if name.startswith("megatron_sgopd.")]))
"""
STACK = ("torch", "megatron.training.training", "vllm.entrypoints.llm", "transformers")


@pytest.mark.long
def test_everything_can_be_imported() -> None:
    assert megatron_sgopd.__version__
    compiled = importlib.util.find_spec("transformer_engine") is not None
    names = [*STACK, *(["transformer_engine.pytorch"] if compiled else [])]
    words = [sys.executable, "-c", IMPORT_ALL, *names]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 90

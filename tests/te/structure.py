"""Transformer Engine's own Python without its compiled module: everything is built as on a GPU, and nothing multiplies.

`install()` comes before the first import of Megatron. Layers have their real names, shapes, argument checks and recipe
objects; whatever would start a kernel raises `NotImplementedError`.
"""

from __future__ import annotations

import enum
import importlib
import itertools
import os
import sys
import types
import unittest.mock
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_CHECKED = {
    "DType": "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1",
    "NVTE_Fused_Attn_Backend": "NVTE_F16_arbitrary_seqlen NVTE_FP8 NVTE_No_Backend",
}
"""Enumerations of which Transformer Engine checks at import that its Python knows just these members."""


class _Numbered(type):
    """Members of an enumeration whose names only Transformer Engine knows: each gets a number when first asked for."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        number = next(cls._numbers)  # type: ignore[attr-defined]  # made in _Compiled
        setattr(cls, name, number)
        return number


class _Compiled(types.ModuleType):
    """`transformer_engine_torch`: classes by names with a capital, else functions that cannot run."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def kernel(*arguments: Any, **keywords: Any) -> None:
            raise NotImplementedError(f"{name} is a kernel of Transformer Engine, of which only the structure is here")

        found: Any = kernel
        if name[0].isupper():
            found = _Numbered(name, (), {"_numbers": itertools.count(), "__init__": lambda self, *a, **k: None})
        setattr(self, name, found)
        return found


def install() -> None:
    """Make `import transformer_engine.pytorch` work in this process."""
    compiled = _Compiled("transformer_engine_torch")
    for name, members in _CHECKED.items():
        setattr(compiled, name, enum.IntEnum(name, members, start=0))
    compiled.get_cudnn_version = lambda: 90000  # type: ignore[attr-defined]
    with unittest.mock.patch.dict(os.environ, NVTE_PROJECT_BUILDING="1"):  # it then looks for no CUDA library
        from transformer_engine import common

        common.load_framework_extension = lambda framework: sys.modules.setdefault(
            f"transformer_engine_{framework}", compiled
        )
        for name in [name for name in sys.modules if name.startswith("transformer_engine.pytorch")]:
            del sys.modules[name]  # what the package imported of it before there was a compiled module
        sys.modules["transformer_engine_torch"] = compiled
        sys.modules["transformer_engine"].pytorch = importlib.import_module("transformer_engine.pytorch")


@contextmanager
def building(device: str = "cpu") -> Iterator[None]:
    """Let layers be built, which ask for a GPU, and put them into the host's memory, or nowhere: `meta`."""
    with (
        unittest.mock.patch("torch.cuda.is_available", return_value=True),
        unittest.mock.patch("torch.cuda.current_device", return_value=torch.device(device)),
        torch.device(device),
        unittest.mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        unittest.mock.patch("torch.cuda.Stream"),
    ):
        yield

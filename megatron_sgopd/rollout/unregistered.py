"""Tensors of a vLLM model that are neither parameters nor buffers: sleep drops them, and nobody brings them back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

_DEPTH = 4
"""Objects within objects that are looked into: a layer's method, its kernel, that one's implementation for experts."""
_CACHE = "kv_cache"
"""vLLM's name of what it fills anew for each request."""


def unregistered_tensors(model: torch.nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
    """Tensors on `device`, by name, that hang on a module or on vLLM's objects in it, and are not registered there.

    Views of parameters and buffers share their memory and are left out, as is the cache of keys and values.
    """
    registered = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        for path, tensor in _tensors(vars(module), name, _DEPTH, seen):
            known = tensor.untyped_storage().data_ptr() in registered
            if tensor.device.type == device.type and tensor.numel() and not known:
                found[path] = tensor
    return found


def _tensors(value: Any, path: str, depth: int, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    if depth < 0 or id(value) in seen or isinstance(value, torch.nn.Module):
        return
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = dict(enumerate(value)).items()
    elif type(value).__module__.startswith("vllm.") and hasattr(value, "__dict__"):
        seen.add(id(value))
        parts = vars(value).items()
    else:
        return
    for name, part in list(parts):
        if name != _CACHE:
            yield from _tensors(part, f"{path}.{name}", depth - 1, seen)

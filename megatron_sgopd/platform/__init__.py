"""Which hardware a run is on, and everything that differs because of it.

`select()` is called once, before Megatron is imported; the rest of the package asks `current()` for
what it needs and never which platform it got.
"""

import logging
import os
from typing import Literal

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.platform.base import Platform

__all__ = ["Platform", "current", "gpu_memory", "select"]

_current: Platform | None = None


def select(name: Literal["auto", "cpu", "cuda"] = "auto") -> Platform:
    """Install the platform `name` in this process and return it; `auto` takes CUDA where a GPU is found.

    Raises:
        ConfigError: `cuda` was asked for and no GPU is visible, or another platform is installed already.
    """
    global _current
    if _current is not None:
        if name not in ("auto", _current.name):
            raise ConfigError(
                f"platform {name!r} was asked for, but this process already runs on {_current.name!r}: "
                "set one platform for the whole run"
            )
        return _current
    import torch

    gpus = torch.cuda.device_count()
    if name == "cuda" and gpus == 0:
        raise ConfigError("platform 'cuda' was asked for, but torch sees no GPU: use 'cpu' or 'auto'")
    if name == "cuda" or (name == "auto" and gpus > 0):
        from megatron_sgopd.platform.cuda import CudaPlatform

        _current = CudaPlatform()
    else:
        from megatron_sgopd.platform.cpu import CpuPlatform

        _current = CpuPlatform()
        if name == "auto":
            logging.getLogger(__name__).warning("no GPU found: running on the CPU platform")
    _current.install()
    return _current


def current() -> Platform:
    """The installed platform."""
    assert _current is not None, "megatron_sgopd.platform.select() has not been called"
    return _current


def gpu_memory(name: str) -> int | None:
    """Bytes of the first GPU of a run on platform `name`; None where it has none."""
    if name == "cpu" or (_current is not None and _current.name == "cpu"):  # whose torch.cuda tells of one
        return None
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # CUDA reads it when it starts, which is here
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.device_count() else None

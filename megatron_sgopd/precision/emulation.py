"""FP8 products without FP8 hardware: operands are cast to E4M3 and back, and multiplied as they then are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from megatron_sgopd.errors import ConfigError

E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(E4M3).max
BLOCK = 128
"""Width of a block: 1 x 128 of an input, 128 x 128 of a weight, as Transformer Engine's blockwise recipe has them."""


def cast_per_tensor(values: torch.Tensor) -> torch.Tensor:
    """E4M3(x * s) / s with s = 448 / max |x| of the whole tensor: the recipe `tensorwise`, current scaling."""
    return _cast(values, values.abs().amax())


def cast_per_block(values: torch.Tensor, rows: int) -> torch.Tensor:
    """The same with a scale for each block of `rows` x 128 numbers, the last two axes: the recipe `blockwise`.

    Args:
        values: [..., R, C].
        rows: of a block.
    """
    *lead, height, width = values.shape
    padded = F.pad(values, (0, -width % BLOCK, 0, -height % rows))
    blocks = padded.view(*lead, padded.shape[-2] // rows, rows, padded.shape[-1] // BLOCK, BLOCK)
    cast = _cast(blocks, blocks.abs().amax((-3, -1), keepdim=True))
    return cast.reshape(padded.shape)[..., :height, :width]


def _cast(values: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    scale = _LARGEST / largest.clamp_min(torch.finfo(torch.float32).tiny)
    return (values * scale).to(E4M3).to(values.dtype) / scale


@contextmanager
def emulated_fp8(model: torch.nn.Module, recipe: str, first_last_bf16: bool = False) -> Iterator[None]:
    """While it is entered, the linear layers of a transformers model's decoder multiply as in E4M3; the head does not.

    A weight is cast when its layer is used, and is itself again afterwards.

    Args:
        recipe: `tensorwise` or `blockwise`.
        first_last_bf16: the first and the last layer's operands are cast to BF16 instead.

    Raises:
        ConfigError: the model has experts, whose weights are in no linear layer.
    """
    layers: torch.nn.ModuleList = model.base_model.layers  # type: ignore[union-attr, assignment]  # transformers'
    if any(parameter.dim() > 2 for parameter in layers.parameters()):
        raise ConfigError("FP8 of a mixture of experts cannot be emulated: measure with a dense teacher of its kind")
    hooks = []
    for number, layer in enumerate(layers):
        in_bf16 = first_last_bf16 and number in (0, len(layers) - 1)
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                cast = _Cast(module.weight.data, recipe, in_bf16)
                hooks += [module.register_forward_pre_hook(cast.before), module.register_forward_hook(cast.after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Cast:
    """The operands of one linear layer."""

    def __init__(self, weight: torch.Tensor, recipe: str, in_bf16: bool) -> None:
        self._weight, self._recipe, self._in_bf16 = weight, recipe, in_bf16

    def before(self, module: torch.nn.Linear, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        module.weight.data = _operand(self._weight, self._recipe, self._in_bf16, rows=BLOCK)
        return (_operand(inputs[0], self._recipe, self._in_bf16, rows=1), *inputs[1:])

    def after(self, module: torch.nn.Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        module.weight.data = self._weight


def _operand(values: torch.Tensor, recipe: str, in_bf16: bool, rows: int) -> torch.Tensor:
    if in_bf16:
        return values.bfloat16().to(values.dtype)
    return cast_per_tensor(values) if recipe == "tensorwise" else cast_per_block(values, rows)

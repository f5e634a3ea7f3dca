"""FP8 of a run: the flags and fields that ask for it, what it needs, and the proof that it is on.

Megatron takes shapes and devices without a word that Transformer Engine then refuses at the first forward pass, or
leaves out of FP8. Here they are refused before anything is loaded.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from megatron_sgopd.errors import Alarm, ConfigError

if TYPE_CHECKING:
    from megatron_sgopd.cluster.plan import Setup
    from megatron_sgopd.config import Recipe
    from megatron_sgopd.models.architecture import Architecture

_MULTIPLE = {"tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""Sizes of a product's operands that Transformer Engine multiplies in FP8; of blockwise those of a whole block."""
_KINDS = {
    "tensorwise": "float8_current_scaling",
    "blockwise": "float8_block_scaling",
    "mxfp8": "mxfp8",
}
"""What Transformer Engine calls Megatron's recipes."""
_CAPABILITY = {"tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""Least compute capability of a GPU that has the arithmetic."""


def training_flags(recipe: Recipe) -> dict[str, tuple[Any, str]]:
    """Megatron flag -> its value and the setting that it comes from."""
    fp8 = recipe.fp8
    on = fp8.format is not None
    return {
        "fp8-format": (fp8.format, "fp8.format"),
        "fp8-recipe": (fp8.recipe if on else None, "fp8.recipe"),
        "first-last-layers-bf16": (on and fp8.first_last_layers_bf16, "fp8.first_last_layers_bf16"),
    }


def scorer_fields(recipe: str | None) -> dict[str, Any]:
    """Fields of `TransformerConfig` for a model that only scores; None: BF16."""
    return {
        "fp8": None if recipe is None else "e4m3",
        "fp8_recipe": recipe or "delayed",  # unused without fp8, where Megatron's default is as good as any
        "fp8_param": False,
        "fp8_output_proj": False,
        "first_last_layers_bf16": False,
    }


def check_fp8(recipe: Recipe, setup: Setup, student: Architecture, teacher: Architecture) -> None:
    """Check that what is asked for can run.

    Raises:
        ConfigError: naming the setting or size that does not fit.
    """
    if recipe.platform == "cpu" and (asked := _asked(recipe)):
        raise ConfigError(f"{asked} needs a GPU and Transformer Engine, but platform is 'cpu': leave it out")
    check_fp8_layout(recipe, setup, student, teacher)


def check_fp8_layout(recipe: Recipe, setup: Setup, student: Architecture, teacher: Architecture | None) -> None:
    """Check that sizes and tokens, as a setup splits them, can be multiplied in FP8.

    Raises:
        ConfigError: naming the one that cannot.
    """
    fp8, tokens = recipe.fp8, recipe.train.row_tokens
    if fp8.format:
        check_sizes("fp8.format", student, setup.tensor, fp8.recipe)
        check_tokens("fp8.format", tokens, setup.context * (setup.tensor if setup.sequence else 1), fp8.recipe)
    if fp8.teacher:
        if teacher is not None:
            check_sizes("fp8.teacher", teacher, setup.teacher_tensor, fp8.teacher)
        check_sizes("fp8.teacher", student, setup.tensor, fp8.teacher)
        sequence = math.lcm(setup.teacher_tensor, setup.tensor) if setup.sequence else 1
        check_tokens("fp8.teacher", tokens, setup.context * sequence, fp8.teacher)
    if fp8.rollouts == "per_block":  # vLLM pads the products of per_tensor
        check_sizes("fp8.rollouts", student, setup.rollout_tensor, "blockwise")


def _asked(recipe: Recipe) -> str | None:
    """The first setting that asks for FP8."""
    settings = {"format": recipe.fp8.format, "teacher": recipe.fp8.teacher, "rollouts": recipe.fp8.rollouts}
    return next((f"fp8.{name}={value}" for name, value in settings.items() if value), None)


def check_sizes(setting: str, architecture: Architecture, tensor: int, recipe: str) -> None:
    """Check that every weight, as tensor parallelism splits it, can be multiplied in FP8.

    Raises:
        ConfigError: naming the size that is no multiple of what the recipe needs.
    """
    a, multiple = architecture, _MULTIPLE[recipe]
    sizes = {
        "hidden_size": a.hidden_size,
        "intermediate size / TP": a.ffn_hidden_size // tensor,
        "attention heads x head_dim / TP": a.query_size // tensor,
        "(attention and key-value heads) x head_dim / TP": (a.query_size + 2 * a.key_size) // tensor,
    }
    for name, size in sizes.items():
        if size % multiple:
            raise ConfigError(
                f"{setting} with recipe {recipe} needs sizes that are multiples of {multiple}, but at tensor parallel "
                f"size {tensor} {name} of {a.folder} is {size}: lower that size, take another recipe, or leave FP8 out"
            )


def check_tokens(setting: str, tokens: int, ranks: int, recipe: str) -> None:
    """Check that a row, as sequence and context parallelism split it, has a number of tokens that FP8 can multiply.

    Rows are padded to train.row_tokens, and the padding is in no loss and no gate, so that nothing else need be padded.

    Raises:
        ConfigError: it has not.
    """
    multiple = _MULTIPLE[recipe] * ranks
    if tokens % multiple:
        mend = math.ceil(tokens / multiple) * multiple
        raise ConfigError(
            f"{setting} with recipe {recipe} needs rows of a multiple of {multiple} tokens, but train.row_tokens is "
            f"{tokens}: let it be {mend}"
        )


def check_device(recipe: str, capability: tuple[int, int]) -> None:
    """Check that a GPU of this compute capability has the recipe's arithmetic, and that Transformer Engine loads.

    Raises:
        ConfigError: it has not, or it does not.
    """
    if recipe not in _CAPABILITY:
        why = ", whose scales Transformer Engine refuses to load from a checkpoint" if recipe == "delayed" else ""
        raise ConfigError(f"--fp8-recipe {recipe}{why}, is not supported: use one of {', '.join(_CAPABILITY)}")
    if capability < _CAPABILITY[recipe]:
        raise ConfigError(
            f"FP8 recipe {recipe} needs compute capability {_CAPABILITY[recipe]}, and this GPU has {capability}: "
            "take another one, or leave FP8 out"
        )
    from megatron.core.fp8_utils import HAVE_TE

    if not HAVE_TE:  # Megatron would train in BF16, and say nothing
        raise ConfigError(
            "FP8 needs Transformer Engine, which Megatron could not import: `megatron-sgopd doctor` says why"
        )


def prove_fp8(model: Any) -> None:
    """After a first forward pass: check that the layers of a `GPTModel` really multiplied in FP8.

    Raises:
        Alarm: a layer that should have did not, or one that should not did.
    """
    import transformer_engine.pytorch as te
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    config, linears = model.config, (te.Linear, te.LayerNormLinear, te.GroupedLinear)
    for layer in model.decoder.layers:
        wanted = bool(config.fp8) and not is_first_last_bf16_layer(config, layer.layer_number - 1)
        found = {name: module for name, module in layer.named_modules() if isinstance(module, linears)}
        wrong = [name for name, module in found.items() if _multiplies_in_fp8(module, config.fp8_recipe) != wanted]
        if wrong or not found:
            what = wrong[0] if wrong else "no Transformer Engine layer"
            raise Alarm(
                f"layer {layer.layer_number} should {'' if wanted else 'not '}multiply in FP8 ({config.fp8_recipe}), "
                f"and {what} does {'not' if wanted else 'so'}: the run would not be what its recipe says. Check the "
                "versions of Megatron-Core and Transformer Engine."
            )


def drop_fp8_copies(model: Any) -> None:
    """Free the copies that Transformer Engine makes of weights; it makes them anew in the next first microbatch."""
    for module in model.modules():
        getattr(module, "_fp8_workspaces", {}).clear()


def _multiplies_in_fp8(module: Any, recipe: str) -> bool:
    if not (module.fp8 and module.fp8_initialized):
        return False
    kind = getattr(module.fp8_meta["recipe"], _KINDS[recipe])
    return bool(kind()) and bool(module._fp8_workspaces)

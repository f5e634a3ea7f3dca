"""`inspect` and `diff`: what is in a model folder, a checkpoint or a run folder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_sgopd.checkpoint.files import CONVERSION
from megatron_sgopd.checkpoint.locate import find_checkpoint, source_of
from megatron_sgopd.checkpoint.model_folder import DTYPE_NAMES
from megatron_sgopd.checkpoint.restricted import explaining_objects
from megatron_sgopd.checkpoint.torch_dist import CheckpointReader, compare_keys
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.models.architecture import Architecture, read_architecture
from megatron_sgopd.models.huggingface import HuggingFaceWeights
from megatron_sgopd.models.weight_map import Parameter, owned_parameters, parameter_count

LIMIT = 20
"""Tensors that `diff` lists by name."""


def _is_model_folder(path: Path) -> bool:
    return (path / "config.json").is_file()


# ---- inspect --------------------------------------------------------------------------------------------


def inspect(path: Path, step: int | None = None, like: Path | None = None) -> dict[str, Any]:
    """What is in `path`, as JSON-able values.

    Args:
        step: of a checkpoint; None: the newest.
        like: Hugging Face folder of a checkpoint's model, where the checkpoint does not say which.

    Raises:
        ConfigError: it is neither a model folder nor a checkpoint, or one that cannot be read.
    """
    if _is_model_folder(path):
        return _inspect_folder(path)
    return _inspect_checkpoint(path, step, like)


def _inspect_folder(path: Path) -> dict[str, Any]:
    architecture = read_architecture(path)
    with HuggingFaceWeights(architecture) as weights:
        dtypes = [weights.dtype(parameter.pieces[0]) for parameter in owned_parameters(architecture)]
    return {
        "path": str(path),
        "kind": "Hugging Face folder",
        **_describe(architecture),
        "dtypes": _names(dtypes),
        "bytes": sum(file.stat().st_size for file in path.glob("*.safetensors")),
        "files": len(list(path.glob("*.safetensors"))),
        "missing": [],  # a folder that lacks or has too many is refused when it is opened
        "superfluous": [],
        "conversion": (path / CONVERSION).is_file(),
    }


def _inspect_checkpoint(path: Path, step: int | None, like: Path | None) -> dict[str, Any]:
    from megatron.core.dist_checkpointing import load_common_state_dict

    reader = CheckpointReader(find_checkpoint(path, step))
    with explaining_objects(reader.folder):
        common = load_common_state_dict(str(reader.folder))
    arguments = vars(common["args"]) if "args" in common else {}
    weights = reader.weights()
    report = {
        "path": str(reader.folder),
        "kind": "Megatron torch_dist checkpoint",
        "step": common.get("iteration"),
        "tensor_parallel": arguments.get("tensor_model_parallel_size"),
        "pipeline_parallel": arguments.get("pipeline_model_parallel_size"),
        "expert_parallel": arguments.get("expert_model_parallel_size"),
        "padded_vocab_size": reader.padded_vocab_size(),
        "layers": reader.num_layers(),
        "tied_embeddings": "output_layer.weight" not in weights,
        "dtypes": _names([entry.properties.dtype for entry in weights.values()]),
        "stored_weights": sum(math.prod(entry.size) for entry in weights.values()),
        "bytes_of_weights": _nbytes(weights),
        "bytes_of_optimizer": _nbytes(
            {key: entry for key, entry in reader.tensors.items() if key.startswith("optimizer.")}
        ),
        "bytes": sum(file.stat().st_size for file in reader.folder.iterdir()),
        "conversion": (reader.folder.parent / CONVERSION).is_file(),
    }
    source = like or _model_of(reader.folder)
    if source is not None:
        architecture = read_architecture(source, with_weights=False)
        missing, superfluous = compare_keys(reader, architecture)
        report |= {**_describe(architecture), "model": str(source), "missing": missing, "superfluous": superfluous}
    return report


def _model_of(checkpoint: Path) -> Path | None:
    try:
        source = source_of(checkpoint)
    except ConfigError:
        return None
    return source if _is_model_folder(source) else None


def _describe(architecture: Architecture) -> dict[str, Any]:
    return {
        "architecture": architecture.model_type,
        "parameters": parameter_count(architecture),
        "parameters_by_part": _by_part(architecture),
        "layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "experts": architecture.num_experts,
        "vocab_size": architecture.vocab_size,
        "tied_embeddings": architecture.tied_embeddings,
        "rope_type": architecture.rope_type,
    }


def _by_part(architecture: Architecture) -> dict[str, int]:
    parts: dict[str, int] = {}
    for parameter in owned_parameters(architecture):
        name = parameter.entry.local
        part = next(
            label
            for mark, label in (
                ("embedding", "embedding"),
                ("output_layer", "output layer"),
                ("norm", "norms"),
                ("self_attention", "attention"),
                ("mlp", "MLP"),
            )
            if mark in name
        )
        parts[part] = parts.get(part, 0) + sum(math.prod(piece.shape) for piece in parameter.pieces)
    return parts


def _names(dtypes: list[torch.dtype]) -> dict[str, int]:
    """How many tensors have each dtype."""
    return {DTYPE_NAMES.get(dtype, str(dtype)): dtypes.count(dtype) for dtype in sorted(set(dtypes), key=str)}


def _nbytes(tensors: Mapping[str, Any]) -> int:
    return sum(math.prod(entry.size) * entry.properties.dtype.itemsize for entry in tensors.values())


def as_text(report: Mapping[str, Any]) -> str:
    """A report of `inspect` for the terminal."""
    lines = []
    for name, value in report.items():
        if name.startswith("bytes"):
            value = f"{value / 2**20:,.1f} MiB"
        elif isinstance(value, dict):
            value = ", ".join(f"{key} {number:,}" for key, number in value.items())
        elif isinstance(value, list):
            value = ", ".join(value) or "nothing"
        elif isinstance(value, bool) or value is None:
            value = {True: "yes", False: "no", None: "not said"}[value]
        elif isinstance(value, int):
            value = f"{value:,}"
        lines.append(f"{name.replace('_', ' '):<20} {value}")
    return "\n".join(lines)


# ---- diff -----------------------------------------------------------------------------------------------


class _Model:
    """A model in either format, read a parameter at a time under Hugging Face names."""

    def __init__(self, path: Path, architecture: Architecture) -> None:
        if _is_model_folder(path):
            self._weights: HuggingFaceWeights | None = HuggingFaceWeights(architecture)
        else:
            self._weights, self._reader = None, CheckpointReader(find_checkpoint(path))
            self._reader.check(architecture)

    def pieces(self, parameter: Parameter) -> Iterator[tuple[str, torch.Tensor]]:
        if self._weights is None:
            yield from self._reader.pieces(parameter)
            return
        for slab in parameter.slabs(0, 1, parameter.architecture.vocab_size):
            yield slab.piece.name, self._weights.read(slab)
        self._weights.release()


def diff(one: Path, other: Path, like: Path | None = None) -> dict[str, Any]:
    """Which tensors of two models differ: largest absolute and relative (Frobenius) difference of each.

    Values are compared, not dtypes: a tensor equals itself rounded only where rounding changes nothing.

    Raises:
        ConfigError: they are not the same architecture, or cannot be read.
    """
    like = like or next((path for path in (one, other) if _is_model_folder(path)), None)
    first, second = _architecture(one, like), _architecture(other, like)
    names_a, names_b = _names_of(first), _names_of(second)
    if not names_a & names_b:
        raise ConfigError(f"{one} and {other} have no tensor in common: compare models of one architecture")
    report: dict[str, Any] = {
        "a": str(one),
        "b": str(other),
        "only_in_a": sorted(names_a - names_b),
        "only_in_b": sorted(names_b - names_a),
        "equal": 0,
        "different": [],
    }
    model_a, model_b = _Model(one, first), _Model(other, second)
    counterparts = {parameter.pieces[0].name: parameter for parameter in owned_parameters(second)}
    for parameter in owned_parameters(first):
        counterpart = counterparts.get(parameter.pieces[0].name)
        if counterpart is None:
            continue
        for (name, a), (_, b) in zip(model_a.pieces(parameter), model_b.pieces(counterpart), strict=True):
            difference = _difference(name, a, b)
            if difference is None:
                report["equal"] += 1
            else:
                report["different"].append(difference)
    return report


def _architecture(path: Path, like: Path | None) -> Architecture:
    if _is_model_folder(path):
        return read_architecture(path)
    source = _model_of(find_checkpoint(path)) or like
    if source is None:
        raise ConfigError(f"{path} does not say what model it is of: give --like FOLDER")
    return read_architecture(source, with_weights=False)


def _names_of(architecture: Architecture) -> set[str]:
    return {piece.name for parameter in owned_parameters(architecture) for piece in parameter.pieces}


def _difference(name: str, a: torch.Tensor, b: torch.Tensor) -> dict[str, Any] | None:
    if a.shape != b.shape:
        return {"name": name, "shape_a": list(a.shape), "shape_b": list(b.shape)}
    a, b = a.float(), b.float()
    if torch.equal(a, b):
        return None
    gap = a - b
    return {"name": name, "max": float(gap.abs().max()), "relative": float(gap.norm() / a.norm())}


def diff_as_text(report: Mapping[str, Any]) -> str:
    """A report of `diff` for the terminal, largest differences first."""
    different = sorted(report["different"], key=lambda entry: -entry.get("relative", math.inf))
    lines = [f"{report['equal']} tensors are equal, {len(different)} differ"]
    for side in ("a", "b"):
        lines += [f"only in {report[side]}: {name}" for name in report[f"only_in_{side}"][:LIMIT]]
    for entry in different[:LIMIT]:
        if "max" in entry:
            lines.append(f"{entry['name']}: up to {entry['max']:.3g}, {entry['relative']:.2%} of its norm")
        else:
            lines.append(f"{entry['name']}: shape {entry['shape_a']} and {entry['shape_b']}")
    if len(different) > LIMIT:
        lines.append(f"and {len(different) - LIMIT} more (--json lists all)")
    return "\n".join(lines)

"""What a Hugging Face folder's config.json says about a model, and whether it is understood in full.

Every field of config.json is either used, known to change nothing, or allowed one value only; anything
else is refused by name, since a field that is silently ignored gives silently wrong log-probs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sgopd.common.data_files import check_inside, read_json
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.models.families import FAMILIES, REFUSED
from megatron_sgopd.models.families.base import QK_NORM, QKV_BIAS, Family

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class Architecture:
    """A decoder-only model's shape and arithmetic, as read from its folder. Sizes are counts of elements."""

    folder: Path
    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Of the MLP, or of each expert."""
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    tied_embeddings: bool
    rope_type: str
    rope_theta: float
    num_experts: int = 0
    """0: every layer is dense."""
    experts_per_token: int = 0
    renormalized_routing: bool = True
    """Whether the probabilities of a token's experts add up to 1."""

    @property
    def family(self) -> Family:
        """Its table of weights."""
        return FAMILIES[self.model_type]

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to q, k and v have biases."""
        return QKV_BIAS in self.family.layer

    @property
    def qk_norm(self) -> bool:
        """Whether the heads of q and k are normed."""
        return QK_NORM[0] in self.family.layer

    @property
    def query_size(self) -> int:
        """Rows of the query projection."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_query_groups * self.head_dim

    @property
    def untied_embeddings(self) -> bool:
        """Whether the output layer has a weight of its own."""
        return not self.tied_embeddings

    def check_parallel(self, tensor: int, pipeline: int, expert: int = 1) -> None:
        """Check that the model splits evenly over `tensor` x `pipeline` ranks, and its experts over `expert`.

        Raises:
            ConfigError: something does not divide; the message names it.
        """
        divided = [
            ("tensor", tensor, "num_attention_heads", self.num_attention_heads),
            ("tensor", tensor, "num_key_value_heads", self.num_query_groups),
            ("pipeline", pipeline, "num_hidden_layers", self.num_layers),
        ]
        if self.num_experts:
            divided.append(("tensor", tensor, "moe_intermediate_size", self.ffn_hidden_size))
            divided.append(("expert", expert, "num_experts", self.num_experts))
        else:
            divided.append(("tensor", tensor, "intermediate_size", self.ffn_hidden_size))
            if expert != 1:
                raise ConfigError(f"expert parallel size {expert}, but {self.folder} has no experts: make it 1")
        for kind, ranks, name, size in divided:
            if size % ranks:
                raise ConfigError(
                    f"{kind} parallel size {ranks} does not divide {name} = {size} of {self.folder}: "
                    f"use a divisor of {size}"
                )


_USED = frozenset(
    {
        "model_type",
        "architectures",
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "layer_types",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
    }
)
_EXPERT_FIELDS = frozenset(
    {"num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"}
)
_LARGEST_SIZE = 1 << 26
"""Beyond the largest models by far: a number without limit would take a table of weights as long."""
_LARGEST = {"num_hidden_layers": 1024, "num_experts": 4096, "num_attention_heads": 4096, "num_key_value_heads": 4096}
_FIXED: Mapping[str, Any] = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
_IGNORED = frozenset(
    {
        "_model_name_or_path",
        "_name_or_path",
        "_attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "unk_token_id",
        "use_cache",
        *("_commit_hash", "tokenizer_class", "task_specific_params", "finetuning_task", "model_name", "use_bfloat16"),
        *("unsloth_fixed", "unsloth_version", "torchscript", "gradient_checkpointing", "is_decoder", "prefix"),
        *("sep_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "pruned_heads"),
        # Of generation, which transformers once kept here.
        *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "top_k", "top_p"),
        *("diversity_penalty", "temperature", "typical_p", "repetition_penalty", "length_penalty", "bad_words_ids"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences", "output_scores"),
        *("return_dict_in_generate", "remove_invalid_values", "suppress_tokens", "begin_suppress_tokens"),
        *("tf_legacy_loss", "exponential_decay_length_penalty", "add_cross_attention", "tie_encoder_decoder"),
    }
)
"""Bookkeeping of transformers, trainers and unsloth, which changes no arithmetic of these models."""
_ROPE_FIELDS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}


def read_architecture(folder: str | Path, with_weights: bool = True) -> Architecture:
    """Read `folder`/config.json, without importing torch, transformers or Megatron.

    Args:
        with_weights: whether the folder must also hold safetensors.

    Raises:
        ConfigError: the folder, its config.json or its safetensors are missing, the model_type is not
            supported, or a field may change the computation in a way that is not understood.
    """
    folder = Path(folder)
    config = _read_config(folder)
    if with_weights:
        _check_weights_present(folder)

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        reason = f", since {REFUSED[str(model_type)]}" if str(model_type) in REFUSED else ""
        raise ConfigError(
            f"{folder}: model_type {model_type!r} is not supported{reason}: use one of {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[model_type]
    _check_fields(folder, family, config)
    rope_type, rope_theta = _read_rope(folder, config)

    def size(name: str, default: int | None = None) -> int:
        value = config.get(name)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value <= _LARGEST.get(name, _LARGEST_SIZE):
            raise ConfigError(
                f"{folder}/config.json: {name} = {value!r} must be a positive whole number, of at most "
                f"{_LARGEST.get(name, _LARGEST_SIZE)}"
            )
        return value

    num_layers, hidden_size, heads = (
        size(name) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    layer_types = config.get("layer_types")
    if layer_types is not None and layer_types != ["full_attention"] * num_layers:
        raise ConfigError(
            f"{folder}/config.json: layer_types = {layer_types!r} is not supported: "
            f"only full_attention in all {num_layers} layers is"
        )
    experts = _read_experts(config, size) if family.has_experts else {}
    architecture = Architecture(
        folder=folder,
        model_type=model_type,
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=size("moe_intermediate_size" if family.has_experts else "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=size("num_key_value_heads", heads if family.multi_head_by_default else None),
        head_dim=size("head_dim", family.default_head_dim or hidden_size // heads),
        vocab_size=size("vocab_size"),
        max_position_embeddings=size("max_position_embeddings"),
        norm_epsilon=_positive_number(folder, "rms_norm_eps", config.get("rms_norm_eps")),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        rope_type=rope_type,
        rope_theta=rope_theta,
        **experts,
    )
    if heads % architecture.num_query_groups:
        raise ConfigError(
            f"{folder}/config.json: num_key_value_heads = {architecture.num_query_groups} "
            f"does not divide num_attention_heads = {heads}"
        )
    return architecture


def _read_experts(config: Mapping[str, Any], size: Callable[..., int]) -> dict[str, Any]:
    return {
        # transformers 5 writes the second name
        "num_experts": size("num_experts", config.get("num_local_experts")),
        "experts_per_token": size("num_experts_per_tok"),
        "renormalized_routing": bool(config.get("norm_topk_prob", False)),
    }


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder: give a local Hugging Face model folder")
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} has no config.json, only {_contents(folder)}: give a model folder")
    check_inside(folder, (entry for entry in folder.iterdir() if entry.is_symlink()))
    return read_json(path)


def _check_weights_present(folder: Path) -> None:
    if (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file():
        return
    mend = "save the model as safetensors"
    if list(folder.glob("*.bin")) + list(folder.glob("*.pt")) + list(folder.glob("*.pth")):
        mend = "pickle files are never loaded; " + mend + " (transformers: save_pretrained)"
    if list(folder.glob("*.gguf")):
        mend = "turn the GGUF file into safetensors with tools/gguf_to_hf.py FILE.gguf OUT"
    raise ConfigError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}, only {_contents(folder)}: {mend}")


def _contents(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return shown or "nothing at all"


def _check_fields(folder: Path, family: Family, config: Mapping[str, Any]) -> None:
    model_type, classes = family.model_type, config.get("architectures")
    if classes != [family.causal_class]:
        raise ConfigError(
            f"{folder}/config.json: architectures = {classes!r} is not supported: "
            f"a {model_type} model must have [{family.causal_class!r}]"
        )
    for name, value in family.needed.items():
        if name not in config:
            raise ConfigError(
                f"{folder}/config.json: {name} is missing, and transformers would not take {value!r} for it, "
                f"the only value that is computed exactly for {model_type}: add it if it is right"
            )
    fixed = {**_FIXED, **family.needed, **family.fixed}
    known = _USED | _IGNORED | family.ignored | (_EXPERT_FIELDS if family.has_experts else frozenset())
    for name, value in config.items():
        if name in fixed:
            if value != fixed[name]:
                raise ConfigError(
                    f"{folder}/config.json: {name} = {value!r} is not supported for {model_type}: "
                    f"only {fixed[name]!r} is computed exactly"
                )
        elif value is not None and name not in known:
            raise ConfigError(
                f"{folder}/config.json: {name} = {value!r} is not a field that is understood for "
                f"{model_type}, and may change what the model computes: remove it if it does not"
            )


def _read_rope(folder: Path, config: Mapping[str, Any]) -> tuple[str, float]:
    """Type and base of the rotary embedding: `rope_parameters` (transformers 5) or `rope_scaling` and
    `rope_theta` (before)."""
    path = folder / "config.json"
    current, former = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if current and former and _rope_fields(current, config) != _rope_fields(former, config):
        raise ConfigError(f"{path}: rope_parameters = {current!r} contradicts rope_scaling = {former!r}")
    parameters = former or current
    if not isinstance(parameters, dict):
        raise ConfigError(f"{path}: rope_parameters = {parameters!r} must be an object")

    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in _ROPE_FIELDS:
        raise ConfigError(
            f"{path}: rope_type = {rope_type!r} is not supported: "
            f"only {', '.join(_ROPE_FIELDS)} can be computed exactly"
        )
    needed = _ROPE_FIELDS[rope_type]
    optional = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    for name, value in parameters.items():
        if name not in needed | optional or (name == "partial_rotary_factor" and value != 1.0):
            raise ConfigError(f"{path}: {name} = {value!r} is not supported with rope_type {rope_type!r}")
    for name in sorted(needed):
        _positive_number(folder, f"{name} of rope_type {rope_type!r}", parameters.get(name))
    theta = parameters.get("rope_theta", config.get("rope_theta", 10000.0))
    return rope_type, _positive_number(folder, "rope_theta", theta)


def _rope_fields(parameters: Any, config: Mapping[str, Any]) -> Any:
    """The fields of a rope under one name each, so that two spellings of the same one are equal."""
    if not isinstance(parameters, dict):
        return parameters
    known = {"rope_type": parameters.get("rope_type", parameters.get("type", "default"))}
    known |= {
        name: value for name, value in parameters.items() if name not in ("type", "rope_type") and value is not None
    }
    return {"rope_theta": config.get("rope_theta"), "partial_rotary_factor": 1.0} | known


def _positive_number(folder: Path, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ConfigError(f"{folder}/config.json: {name} = {value!r} must be a positive number")
    return float(value)

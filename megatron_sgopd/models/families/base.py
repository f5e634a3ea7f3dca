"""What describes an architecture: its table of weights, and the fields of config.json that belong to it.

The table has an entry for each Megatron parameter: the Hugging Face tensors ("pieces") it is made of, how
tensor parallelism splits it, and its name in Megatron's local layers, in Transformer Engine's and in
`torch_dist` checkpoints. Everything else that knows a weight's name has it from here.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class Layout(enum.Enum):
    """How a parameter is split over the ranks of tensor parallelism, and how its pieces lie in a shard."""

    REPLICATED = "each rank holds all of it"
    COLUMN = "axis 0 of each piece is split; in a shard the pieces follow each other (gate, up)"
    QUERY_GROUPS = "axis 0 of each piece is split; in a shard each query group has its rows of q, k, v"
    ROW = "axis 1 is split"
    VOCABULARY = "axis 0 is split, after rows of zeros that pad the vocabulary"

    @property
    def axis(self) -> int | None:
        """The split axis of a piece."""
        return {Layout.REPLICATED: None, Layout.ROW: 1}.get(self, 0)


@dataclass(frozen=True)
class Entry:
    """A Megatron parameter, or the same one of every `{layer}` and `{expert}` that its names have."""

    local: str
    """Its name in the local layer spec."""
    layout: Layout
    pieces: tuple[tuple[str, ...], ...]
    """Of each Hugging Face tensor the name, then its shape in names of `Architecture`'s sizes."""
    transformer_engine: str | None = None
    """Its name in the Transformer Engine layer spec, where that is another."""
    checkpoint: tuple[str, ...] = ()
    """Its keys in a `torch_dist` checkpoint, where that is not the Transformer Engine name without the layer. Layer
    specs that disagree on the key make it several: all are written, any is read."""
    only_if: str | None = None
    """The flag of `Architecture` without which the parameter does not exist."""
    duplicate: bool = False
    """A second holder of tensors that another entry owns: loaded, never exported, digested or counted."""

    @property
    def checkpoint_keys(self) -> tuple[str, ...]:
        """Its keys in a `torch_dist` checkpoint, where layers and experts are leading axes of one tensor."""
        return self.checkpoint or ((self.transformer_engine or self.local).replace(".{layer}", ""),)

    @property
    def per_expert(self) -> bool:
        """Whether every expert has one."""
        return "{expert}" in self.local


@dataclass(frozen=True)
class Family:
    """One model_type: its layers, and what else config.json may say of it."""

    model_type: str
    causal_class: str
    layer: tuple[Entry, ...]
    """The entries of a decoder layer, in the order of the forward pass."""
    default_head_dim: int | None = None
    """Where config.json names none; None: hidden_size / num_attention_heads."""
    multi_head_by_default: bool = False
    """Whether a config.json without num_key_value_heads means num_attention_heads."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields that change the computation, and the one value of each that is computed exactly."""
    needed: Mapping[str, Any] = field(default_factory=dict)
    """Likewise, where transformers takes another value for a missing field, so that it must be there."""
    ignored: frozenset[str] = frozenset()
    """Fields that change nothing while the fixed ones have their values."""

    @property
    def has_experts(self) -> bool:
        """Whether its MLPs are experts behind a router."""
        return any(entry.per_expert for entry in self.layer)


_MEGATRON = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."
_EXPERTS = _MEGATRON + "mlp.experts."
_HF_EXPERT = _HF + "mlp.experts.{expert}."
_EMBEDDING = ("model.embed_tokens.weight", "vocab_size", "hidden_size")

QKV_BIAS = Entry(
    _MEGATRON + "self_attention.linear_qkv.bias",
    Layout.QUERY_GROUPS,
    (
        (_HF + "self_attn.q_proj.bias", "query_size"),
        (_HF + "self_attn.k_proj.bias", "key_size"),
        (_HF + "self_attn.v_proj.bias", "key_size"),
    ),
)
QK_NORM = tuple(
    Entry(
        _MEGATRON + f"self_attention.{name}_layernorm.weight",
        Layout.REPLICATED,
        ((_HF + f"self_attn.{name}_norm.weight", "head_dim"),),
    )
    for name in "qk"
)
_INPUT_NORM = Entry(
    _MEGATRON + "input_layernorm.weight",
    Layout.REPLICATED,
    ((_HF + "input_layernorm.weight", "hidden_size"),),
    transformer_engine=_MEGATRON + "self_attention.linear_qkv.layer_norm_weight",
)
_QKV = Entry(
    _MEGATRON + "self_attention.linear_qkv.weight",
    Layout.QUERY_GROUPS,
    (
        (_HF + "self_attn.q_proj.weight", "query_size", "hidden_size"),
        (_HF + "self_attn.k_proj.weight", "key_size", "hidden_size"),
        (_HF + "self_attn.v_proj.weight", "key_size", "hidden_size"),
    ),
)
_PROJECTION = Entry(
    _MEGATRON + "self_attention.linear_proj.weight",
    Layout.ROW,
    ((_HF + "self_attn.o_proj.weight", "hidden_size", "query_size"),),
)


def attention(*extra: Entry) -> tuple[Entry, ...]:
    """Grouped-query attention with the norm before it; `extra`: `QKV_BIAS` or `QK_NORM`, if it has them."""
    return (_INPUT_NORM, _QKV, *extra, _PROJECTION)


DENSE_MLP = (
    Entry(
        _MEGATRON + "pre_mlp_layernorm.weight",
        Layout.REPLICATED,
        ((_HF + "post_attention_layernorm.weight", "hidden_size"),),
        transformer_engine=_MEGATRON + "mlp.linear_fc1.layer_norm_weight",
    ),
    Entry(
        _MEGATRON + "mlp.linear_fc1.weight",
        Layout.COLUMN,
        (
            (_HF + "mlp.gate_proj.weight", "ffn_hidden_size", "hidden_size"),
            (_HF + "mlp.up_proj.weight", "ffn_hidden_size", "hidden_size"),
        ),
    ),
    Entry(
        _MEGATRON + "mlp.linear_fc2.weight",
        Layout.ROW,
        ((_HF + "mlp.down_proj.weight", "hidden_size", "ffn_hidden_size"),),
    ),
)
"""SwiGLU with the norm before it."""

EXPERTS = (
    Entry(  # not fused into what follows, since the router reads it too
        _MEGATRON + "pre_mlp_layernorm.weight",
        Layout.REPLICATED,
        ((_HF + "post_attention_layernorm.weight", "hidden_size"),),
        # The local spec keeps it where a dense layer has it.
        checkpoint=("decoder.layers.pre_mlp_layernorm.weight", "decoder.layers.mlp.linear_fc1.layer_norm_weight"),
    ),
    Entry(
        _MEGATRON + "mlp.router.weight", Layout.REPLICATED, ((_HF + "mlp.gate.weight", "num_experts", "hidden_size"),)
    ),
    Entry(
        _EXPERTS + "local_experts.{expert}.linear_fc1.weight",
        Layout.COLUMN,
        (
            (_HF_EXPERT + "gate_proj.weight", "ffn_hidden_size", "hidden_size"),
            (_HF_EXPERT + "up_proj.weight", "ffn_hidden_size", "hidden_size"),
        ),
        transformer_engine=_EXPERTS + "linear_fc1.weight{expert}",
        checkpoint=("decoder.layers.mlp.experts.experts.linear_fc1.weight",),
    ),
    Entry(
        _EXPERTS + "local_experts.{expert}.linear_fc2.weight",
        Layout.ROW,
        ((_HF_EXPERT + "down_proj.weight", "hidden_size", "ffn_hidden_size"),),
        transformer_engine=_EXPERTS + "linear_fc2.weight{expert}",
        checkpoint=("decoder.layers.mlp.experts.experts.linear_fc2.weight",),
    ),
)
"""A router and SwiGLU experts with the norm before them; without shared experts."""

BEFORE_LAYERS = (Entry("embedding.word_embeddings.weight", Layout.VOCABULARY, (_EMBEDDING,)),)
AFTER_LAYERS = (
    Entry("decoder.final_layernorm.weight", Layout.REPLICATED, (("model.norm.weight", "hidden_size"),)),
    Entry(
        "output_layer.weight",
        Layout.VOCABULARY,
        (("lm_head.weight", "vocab_size", "hidden_size"),),
        only_if="untied_embeddings",
    ),
    # The last pipeline stage's copy of tied embeddings; a stage that has the embedding uses that one.
    Entry("output_layer.weight", Layout.VOCABULARY, (_EMBEDDING,), only_if="tied_embeddings", duplicate=True),
)

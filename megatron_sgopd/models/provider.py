"""Megatron `GPTModel`s that compute exactly what a Hugging Face folder's config.json describes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from megatron_sgopd import platform
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.fp8 import scorer_fields
from megatron_sgopd.models.architecture import Architecture

if TYPE_CHECKING:  # the command line makes flags here without the seconds that importing Megatron takes
    from megatron.core.models.gpt import GPTModel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig


@dataclass(frozen=True)
class _Setting:
    """A field of `TransformerConfig`, the value that the architecture gives it, and the flags for that."""

    field: str
    value: object
    flags: tuple[str, ...] = ()
    """Empty where Megatron's default is the value."""


def _settings(architecture: Architecture) -> tuple[_Setting, ...]:
    groups = str(architecture.num_query_groups)
    return (
        _Setting("num_layers", architecture.num_layers, ("--num-layers", str(architecture.num_layers))),
        _Setting("hidden_size", architecture.hidden_size, ("--hidden-size", str(architecture.hidden_size))),
        _Setting(
            "ffn_hidden_size",
            architecture.ffn_hidden_size,
            ("--ffn-hidden-size", str(architecture.ffn_hidden_size)),
        ),
        _Setting(
            "num_attention_heads",
            architecture.num_attention_heads,
            ("--num-attention-heads", str(architecture.num_attention_heads)),
        ),
        _Setting(
            "num_query_groups",
            architecture.num_query_groups,
            ("--group-query-attention", "--num-query-groups", groups),
        ),
        _Setting("kv_channels", architecture.head_dim, ("--kv-channels", str(architecture.head_dim))),
        _Setting("normalization", "RMSNorm", ("--normalization", "RMSNorm")),
        _Setting(
            "layernorm_epsilon",
            architecture.norm_epsilon,
            ("--norm-epsilon", repr(architecture.norm_epsilon)),
        ),
        _Setting("gated_linear_unit", True, ("--swiglu",)),
        _Setting("activation_func", F.silu),  # by --swiglu too
        _Setting("add_bias_linear", False, ("--disable-bias-linear",)),
        _Setting("add_qkv_bias", architecture.qkv_bias, ("--add-qkv-bias",) if architecture.qkv_bias else ()),
        _Setting("qk_layernorm", architecture.qk_norm, ("--qk-layernorm",) if architecture.qk_norm else ()),
        _Setting("hidden_dropout", 0.0, ("--hidden-dropout", "0")),
        _Setting("attention_dropout", 0.0, ("--attention-dropout", "0")),
        *_expert_settings(architecture),
        # Megatron's variants that none of these architectures has.
        _Setting("activation_func_clamp_value", None),
        _Setting("apply_residual_connection_post_layernorm", False),
        _Setting("attention_output_gate", False),
        _Setting("experimental_attention_variant", None),
        _Setting("glu_linear_offset", 0.0),
        _Setting("layernorm_zero_centered_gamma", False),
        _Setting("linear_attention_freq", None),
        _Setting("mtp_num_layers", None),
        _Setting("multi_latent_attention", False),
        _Setting("no_rope_freq", None),
        _Setting("qk_l2_norm", False),
        _Setting("rotary_interleaved", False),
        _Setting("softmax_scale", None),
        _Setting("softmax_type", "vanilla"),
        _Setting("use_mup", False),
        _Setting("window_size", None),
    )


def _expert_settings(architecture: Architecture) -> tuple[_Setting, ...]:
    if not architecture.num_experts:
        return (_Setting("num_moe_experts", None), _Setting("moe_ffn_hidden_size", None))
    experts, topk = str(architecture.num_experts), str(architecture.experts_per_token)
    width, pre_softmax = str(architecture.ffn_hidden_size), not architecture.renormalized_routing
    return (
        _Setting("num_moe_experts", architecture.num_experts, ("--num-experts", experts)),
        _Setting("moe_router_topk", architecture.experts_per_token, ("--moe-router-topk", topk)),
        _Setting("moe_ffn_hidden_size", architecture.ffn_hidden_size, ("--moe-ffn-hidden-size", width)),
        _Setting("moe_router_pre_softmax", pre_softmax, ("--moe-router-pre-softmax",) if pre_softmax else ()),
        _Setting("moe_router_dtype", "fp32", ("--moe-router-dtype", "fp32")),
        _Setting("moe_token_dispatcher_type", "alltoall", ("--moe-token-dispatcher-type", "alltoall")),
        # Megatron's variants that none of these architectures has.
        _Setting("moe_layer_freq", 1),
        _Setting("moe_router_score_function", "softmax"),
        _Setting("moe_router_topk_scaling_factor", None),
        _Setting("moe_router_num_groups", None),
        _Setting("moe_router_enable_expert_bias", False),
        _Setting("moe_shared_expert_intermediate_size", None),
        _Setting("moe_expert_capacity_factor", None),
        _Setting("moe_latent_size", None),
    )


def megatron_flags(architecture: Architecture) -> list[str]:
    """The command-line flags with which stock `megatron.training` describes this architecture.

    The padded vocabulary size is not among them, since it depends on the tensor parallel size: see
    `padded_vocab_size`. Neither is scaled rope, which Megatron's flags cannot express: `build_model` sets it.

    Raises:
        ConfigError: rope_theta is not a whole number, which `--rotary-base` demands.
    """
    if not architecture.rope_theta.is_integer():
        raise ConfigError(
            f"{architecture.folder}: rope_theta = {architecture.rope_theta} is not a whole number, "
            "and Megatron's --rotary-base takes no other"
        )
    flags = [flag for setting in _settings(architecture) for flag in setting.flags]
    flags += ["--position-embedding-type", "rope", "--rotary-base", str(int(architecture.rope_theta))]
    flags += ["--max-position-embeddings", str(architecture.max_position_embeddings)]
    flags += ["--vocab-size", str(architecture.vocab_size)]
    flags += ["--no-initialization"]  # every weight is loaded
    if architecture.untied_embeddings:
        flags += ["--untie-embeddings-and-output-weights"]
    if architecture.num_experts:
        flags += ["--moe-router-load-balancing-type", "none"]  # adds a loss, and changes nothing else
    return flags


def padded_vocab_size(architecture: Architecture, tensor: int, divisible_by: int = 128) -> int:
    """Rows of embedding and output layer: the vocabulary rounded up to a multiple of both arguments."""
    multiple = tensor * divisible_by
    return -(-architecture.vocab_size // multiple) * multiple


def transformer_config(
    architecture: Architecture,
    base: TransformerConfig,
    tensor: int,
    pipeline: int,
    expert: int = 1,
    fp8_recipe: str | None = None,
) -> TransformerConfig:
    """`base`, the configuration of the run's student, changed to `architecture` for forward-only use.

    Precision, kernels, context parallelism and platform choices are the run's; shape, arithmetic and other parallel
    sizes are the architecture's and the arguments'. What the training loop hung onto `base` is dropped, and so is its
    FP8, whose noise in log-probs is of the size of what the sign gate reads, unless `fp8_recipe` asks for it.

    Raises:
        ConfigError: the architecture does not split over `tensor` x `pipeline` ranks, or its experts over `expert`.
    """
    architecture.check_parallel(tensor, pipeline, expert)
    changes = {setting.field: setting.value for setting in _settings(architecture)}
    return dataclasses.replace(
        base,
        **changes,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        sequence_parallel=base.sequence_parallel and tensor > 1,
        pipeline_dtype=base.params_dtype,
        perform_initialization=False,  # every weight is loaded
        # Derived from the student's layout, or chosen for it.
        virtual_pipeline_model_parallel_size=None,
        microbatch_group_size_per_vp_stage=None,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=None,
        tensor_parallel_num_weight_shards=None,
        gtp_weight_remat_size=1,
        expert_tensor_parallel_num_weight_shards=None,
        expert_gtp_weight_remat_size=1,
        num_layers_in_first_pipeline_stage=None,
        num_layers_in_last_pipeline_stage=None,
        pipeline_model_parallel_layout=None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
        # Of the training loop.
        timers=None,
        grad_scale_func=None,
        no_sync_func=None,
        grad_sync_func=None,
        param_sync_func=None,
        finalize_model_grads_func=None,
        defer_embedding_wgrad_compute=False,
        recompute_granularity=None,
        moe_layer_recompute=False,
        moe_grouped_gemm=architecture.num_experts > 0 and platform.current().groups_experts,
        tp_comm_overlap=False,
        overlap_moe_expert_parallel_comm=False,
        delay_wgrad_compute=False,
        cpu_offloading=False,
        fine_grained_activation_offloading=False,
        # Packed rows differ in every microbatch.
        cuda_graph_impl="none",
        cuda_graph_modules=[],
        hybrid_context_parallel=False,
        # Of its precision.
        quant_recipe=None,
        fp4=None,
        fp4_param=False,
        moe_router_padding_for_quantization=fp8_recipe is not None and architecture.num_experts > 0,
        moe_router_padding_for_fp8=False,
        **scorer_fields(fp8_recipe),
    )


def build_model(
    architecture: Architecture,
    config: TransformerConfig,
    pg_collection: ProcessGroupCollection,
    pre_process: bool,
    post_process: bool,
    padded_vocab_size: int,
    vp_stage: int | None = None,
) -> GPTModel:
    """This rank's part of the model, its weights not set yet (see `weights.load_weights`).

    Args:
        pre_process: whether this pipeline stage holds the embedding.
        post_process: whether this pipeline stage holds the final norm and the output layer.
        padded_vocab_size: rows of embedding and output layer over all tensor-parallel ranks.
    """
    from megatron.core.models.gpt import GPTModel

    model = GPTModel(
        config,
        platform.current().layer_spec(config),
        vocab_size=padded_vocab_size,
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=architecture.rope_theta,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )
    set_rotary_frequencies(model, architecture)
    return model


def rotary_frequencies(architecture: Architecture) -> torch.Tensor:
    """The angle per position of each pair of channels, float32 [head_dim / 2], as transformers has it:
    theta^(-2i / head_dim) for pair i, rescaled as the rope type says."""
    if architecture.rope_type == "default":
        exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.float32) / architecture.head_dim
        return 1.0 / architecture.rope_theta**exponents
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.from_pretrained(architecture.folder, local_files_only=True)
    with torch.device("cpu"):  # also where the default is another, such as meta
        frequencies, attention_scaling = ROPE_INIT_FUNCTIONS[architecture.rope_type](config, torch.device("cpu"))
    assert attention_scaling == 1.0, architecture.rope_type
    return frequencies


def set_rotary_frequencies(model: GPTModel, architecture: Architecture) -> None:
    """Give `model` the exact rope of `architecture`, before its first forward.

    Megatron's own rope scaling has Llama 3's factors and context length built in.
    """
    rotary = model.rotary_pos_emb
    rotary.inv_freq = rotary_frequencies(architecture).to(rotary.inv_freq.device)


def check_model(model: GPTModel, architecture: Architecture) -> None:
    """Check that a model built by someone else's script computes what `architecture` describes.

    Raises:
        ConfigError: naming the first field that differs, both values, and the Megatron flag for it.
    """
    for setting in _settings(architecture):
        _check_same(setting.field, getattr(model.config, setting.field), setting.value, setting.flags)

    def check(name: str, value: object, flags: tuple[str, ...]) -> None:
        _check_same(name, getattr(model, name), value, flags)

    check("position_embedding_type", "rope", ("--position-embedding-type", "rope"))
    check("rotary_percent", 1.0, ("--rotary-percent", "1.0"))
    untie = "--untie-embeddings-and-output-weights"
    check(
        "share_embeddings_and_output_weights",
        architecture.tied_embeddings,
        (f"no {untie}",) if architecture.tied_embeddings else (untie,),
    )
    if model.vocab_size < architecture.vocab_size:
        raise ConfigError(
            f"the model's vocabulary of {model.vocab_size} rows is smaller than vocab_size = "
            f"{architecture.vocab_size} of {architecture.folder}: pass --padded-vocab-size"
        )
    frequencies = model.rotary_pos_emb.inv_freq.cpu()
    expected = rotary_frequencies(architecture)
    interpolated = model.rotary_pos_emb.seq_len_interpolation_factor is not None
    if interpolated or frequencies.shape != expected.shape or not torch.allclose(frequencies, expected, 1e-6):
        raise ConfigError(
            f"the model's rotary frequencies are not those of {architecture.folder} (rope_type "
            f"{architecture.rope_type!r}, rope_theta {architecture.rope_theta}): pass --rotary-base "
            f"{architecture.rope_theta:.0f} without scaling flags; where rope_type is not 'default', call "
            "megatron_sgopd.models.provider.set_rotary_frequencies(model, architecture)"
        )


def _check_same(name: str, value: object, expected: object, flags: tuple[str, ...]) -> None:
    if value != expected:
        mend = " ".join(flags) if flags else f"leave {name} at Megatron's default"
        raise ConfigError(f"the model has {name} = {value!r}, its config.json says {expected!r}: pass {mend}")

"""Proof that a Hugging Face folder and a Megatron checkpoint are the same model.

Equal tensors alone prove little: a table that is wrong in the same way in both directions makes them equal.
So both models also run, as transformers and as Megatron build them, on the same tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_sgopd.checkpoint.restricted import explaining_objects
from megatron_sgopd.checkpoint.torch_dist import CheckpointReader
from megatron_sgopd.models.architecture import Architecture
from megatron_sgopd.models.digests import tensor_digest
from megatron_sgopd.models.families.base import Layout
from megatron_sgopd.models.huggingface import HuggingFaceWeights
from megatron_sgopd.models.weight_map import Parameter, owned_parameters

LEVELS = ("full", "sample", "off")
LOGPROB_LIMIT = 1e-4
"""Largest difference of any log-prob, in nats. Both models compute in float32, whatever the weights' dtype."""
SAMPLE_LAYERS = 2
"""Of the model that `sample` runs."""
SEQUENCES, TOKENS = 64, 64
CONTINUATION = 64
"""Tokens of the greedy continuation."""


@dataclass(frozen=True)
class Proof:
    """What was compared, and what came of it."""

    level: str
    passed: bool
    fault: str | None = None
    """What differs, naming tensors."""
    digests: dict[str, str] = field(default_factory=dict)
    """Of each tensor of the Hugging Face folder (see `tensor_digest`), hexadecimal."""
    layers_run: int = 0
    sequences: int = 0
    max_logprob_gap: float | None = None
    greedy_tokens: int = 0


def prove(
    architecture: Architecture,
    weights: HuggingFaceWeights,
    reader: CheckpointReader,
    level: str,
    source_is_megatron: bool,
    dtype: torch.dtype | None,
    say: Callable[[str], None],
) -> Proof:
    """Compare folder and checkpoint.

    Args:
        architecture: of the Hugging Face folder.
        level: `full`: every tensor, then the whole model's log-probs and greedy continuation against
            transformers. `sample`: the same of a model cut to its first layers, for models that do not fit
            into memory twice in float32. `off`: nothing.
        source_is_megatron: which side the other was made from.
        dtype: what the weights were rounded to on the way; None: nothing.
        say: takes lines of progress.
    """
    if level == "off":
        return Proof(level, passed=True)
    _silence_libraries()
    say("proving that every tensor is the same")
    digests, different = _compare_tensors(architecture, weights, reader, source_is_megatron)
    if different:
        return Proof(level, False, f"{len(different)} tensors differ, first {different[0]}", digests)
    layers = architecture.num_layers if level == "full" else min(SAMPLE_LAYERS, architecture.num_layers)
    say(f"proving that transformers and Megatron compute the same from {layers} of {architecture.num_layers} layers")
    architecture = dataclasses.replace(architecture, num_layers=layers)
    with torch.no_grad(), _megatron_model(architecture, reader) as ours:
        theirs = _transformers_model(architecture)
        if dtype is not None:
            for parameter in (*ours.parameters(), *theirs.parameters()):
                parameter.copy_(parameter.to(dtype))  # one of the two is rounded already
        return _compare_models(architecture, ours, theirs, level, digests)


def _silence_libraries() -> None:
    """Their notices are about uses that a proof does not make of them."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("megatron").setLevel(logging.ERROR)


def _compare_tensors(
    architecture: Architecture, weights: HuggingFaceWeights, reader: CheckpointReader, source_is_megatron: bool
) -> tuple[dict[str, str], list[str]]:
    """Digests of the folder's tensors, and the names of those that are not the checkpoint's."""
    digests, different = {}, []
    for parameter in owned_parameters(architecture):
        whole = {slab.piece.name: slab for slab in parameter.slabs(0, 1, reader.padded_vocab_size())}
        for name, stored in reader.pieces(parameter):
            tensor = weights.read(whole[name])
            digests[name] = f"{tensor_digest(tensor):016x}"
            source, made = (stored, tensor) if source_is_megatron else (tensor, stored)
            if not _same_bits(source.to(made.dtype), made):
                different.append(name)
        if parameter.layout is Layout.VOCABULARY and not source_is_megatron:
            [chunk] = parameter.chunks(reader.key(parameter), 1, reader.padded_vocab_size())
            if reader.read(chunk)[architecture.vocab_size :].any():
                different.append(f"{parameter.pieces[0].name} (rows that pad the vocabulary are not zero)")
        weights.release()
        reader.release()
    return digests, different


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Unlike torch.equal, takes a NaN for itself, and tells 0 from -0."""
    integers = {2: torch.int16, 4: torch.int32}[one.dtype.itemsize]
    return one.shape == other.shape and torch.equal(one.view(integers), other.view(integers))


# ---- Both models on the same tokens ---------------------------------------------------------------------


def _compare_models(architecture: Architecture, ours: Any, theirs: Any, level: str, digests: dict[str, str]) -> Proof:
    from transformers import GenerationConfig

    tokens, prompt = _token_rows(architecture)
    gaps = [(_log_probs(ours, rows, architecture) - _reference(theirs, rows)).abs().max() for rows in tokens.split(4)]
    gap = float(torch.stack(gaps).max())  # torch's: Python's max would lose a NaN
    fault, greedy = None, 0
    if not gap <= LOGPROB_LIMIT:  # NaN is a fault too
        where = _first_difference(architecture, ours, theirs, tokens[:1])
        fault = f"log-probs differ by {gap:.3g}, more than {LOGPROB_LIMIT}, first {where}"
    else:
        # Not the folder's own generation settings, of which penalties and stop tokens would change the choice.
        settings = GenerationConfig(max_new_tokens=CONTINUATION, do_sample=False, pad_token_id=0)
        continued = theirs.generate(prompt, generation_config=settings)
        greedy = continued.shape[1] - prompt.shape[1]
        # The continuation is Megatron's own greedy one if each of its tokens is Megatron's choice after those before;
        # of two tokens that are equally likely up to the limit, either.
        logprobs = _log_probs(ours, continued, architecture)[:, prompt.shape[1] - 1 : -1]
        chosen = logprobs.gather(-1, continued[:, prompt.shape[1] :, None])[..., 0]
        behind = float((logprobs.amax(-1) - chosen).max())
        if not behind <= 2 * LOGPROB_LIMIT:
            fault = f"transformers continues a prompt by tokens that Megatron puts {behind:.3g} behind its own choice"
    return Proof(level, fault is None, fault, digests, architecture.num_layers, len(tokens), gap, greedy)


def _token_rows(architecture: Architecture) -> tuple[torch.Tensor, torch.Tensor]:
    """Half real text and half random tokens, int64 [SEQUENCES, TOKENS], and a prompt, [1, 16], of real text."""
    generator = torch.Generator().manual_seed(0)
    length = min(TOKENS, architecture.max_position_embeddings)
    rows = torch.randint(architecture.vocab_size, (SEQUENCES, length), generator=generator)
    real = _real_tokens(architecture.folder)
    if real is not None:
        real = real[real < architecture.vocab_size]
        starts = torch.linspace(0, len(real) - length, SEQUENCES // 2).long()
        rows[: SEQUENCES // 2] = torch.stack([real[start : start + length] for start in starts])
    return rows, rows[:1, : min(16, length - 1)]


def _real_tokens(folder: Path) -> torch.Tensor | None:
    """English prose and code, tokenized: this program's own source. None where there is no tokenizer."""
    from transformers import AutoTokenizer

    from megatron_sgopd.checkpoint.model_folder import TOKENIZER_FILES

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    text = "\n".join(path.read_text() for path in sorted(Path(__file__).parents[1].glob("*.py")))
    return torch.tensor(tokenizer(text).input_ids)


def _transformers_model(architecture: Architecture) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(architecture.folder, local_files_only=True)
    config.num_hidden_layers = architecture.num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: architecture.num_layers]
    return AutoModelForCausalLM.from_pretrained(
        architecture.folder, config=config, dtype=torch.float32, local_files_only=True
    ).eval()


@contextlib.contextmanager
def _megatron_model(architecture: Architecture, reader: CheckpointReader) -> Iterator[Any]:
    """The model as Megatron builds and loads it, in float32 on this process's CPUs."""
    from megatron_sgopd import platform

    platform.select("cpu")
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from megatron_sgopd.models.provider import build_model, transformer_config
    from megatron_sgopd.models.weights import fill_whole_model

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    base = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, use_cpu_initialization=True, params_dtype=torch.float32
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = transformer_config(architecture, base, tensor=1, pipeline=1)
    model = build_model(architecture, config, groups, True, True, reader.padded_vocab_size()).eval()
    if architecture.num_layers == reader.num_layers():
        # By Megatron's own loading, which knows nothing of our table.
        metadata = {"singleton_local_shards": False, "dp_cp_group": groups.dp_cp}
        with explaining_objects(reader.folder):
            state = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata)}, str(reader.folder))
        model.load_state_dict(state["model"])
    else:
        fill_whole_model(model, architecture, groups, reader.fill)
    yield model
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _log_probs(model: Any, tokens: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """Megatron's log-probs [rows, length, vocabulary]."""
    from megatron_sgopd import platform

    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    together = torch.zeros_like(tokens)
    attention = platform.current().packed_attention(together, together)
    return model(tokens, positions, **attention)[..., : architecture.vocab_size].log_softmax(-1)


def _reference(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits.log_softmax(-1)


# ---- Where they part ------------------------------------------------------------------------------------


def _first_difference(architecture: Architecture, ours: Any, theirs: Any, tokens: torch.Tensor) -> str:
    """Where the models part: the first module whose inputs differ, and the tensors since the last where they agree."""
    pairs = list(_module_pairs(architecture, ours, theirs))
    seen: dict[int, torch.Tensor] = {}

    def keep(key: int) -> Callable[..., None]:
        def hook(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            seen.setdefault(key, (*arguments, *keywords.values())[0].detach())

        return hook

    hooks = [
        module.register_forward_pre_hook(keep(2 * index + side), with_kwargs=True)
        for index, (_, *modules) in enumerate(pairs)
        for side, module in enumerate(modules)
    ]
    _log_probs(ours, tokens, architecture)
    _reference(theirs, tokens)
    for hook in hooks:
        hook.remove()
    suspects: list[Parameter] = []
    place = "in the log-probs"
    for index, (parameters, *_) in enumerate(pairs):
        mine, other = (seen[2 * index + side].flatten() for side in (0, 1))
        if mine.shape != other.shape or not torch.allclose(mine.float(), other.float(), rtol=1e-4, atol=1e-5):
            place = f"at the input of {parameters[0].pieces[0].name}"
            break
        suspects = parameters
    names = [piece.name for parameter in suspects for piece in parameter.pieces]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{place}, computed from {shown}"


def _module_pairs(architecture: Architecture, ours: Any, theirs: Any) -> Iterator[tuple[list[Parameter], Any, Any]]:
    """Modules that both models have, in the order of the forward pass, with all parameters up to the next such pair."""
    our_modules, their_modules = dict(ours.named_modules()), dict(theirs.named_modules())
    pair: tuple[list[Parameter], Any, Any] | None = None
    for parameter in owned_parameters(architecture):
        name = parameter.entry.local.format(layer=parameter.layer, expert=parameter.expert)
        mine = our_modules.get(name.rpartition(".")[0])
        other = their_modules.get(parameter.pieces[0].name.rpartition(".")[0])
        if mine is None or other is None or (pair is not None and other is pair[2]):
            assert pair is not None
            pair[0].append(parameter)
            continue
        if pair is not None:
            yield pair
        pair = [parameter], mine, other
    assert pair is not None
    yield pair

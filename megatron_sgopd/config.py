"""Every setting of a run: its meaning, unit, default and limits.

A recipe is these dataclasses written as YAML. The ones that the plugin itself reads (`Settings`) are also
`--sgopd-*` flags, for users with a Megatron script of their own: `rollout.group_size` is
`--sgopd-rollout-group-size`, and the fields of `sgopd` itself drop the section (`--sgopd-method`).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, JsonValue, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megatron_sgopd.errors import ConfigError

ALONE_MEMORY_FRACTION = 0.9
"""Share of a GPU's memory for an engine that has it to itself; vLLM's own default."""
_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True, config=_STRICT)
class ModelSettings:
    """The student."""

    path: str
    """Hugging Face folder (config.json, safetensors, tokenizer) that training starts from."""


@dataclass(frozen=True, config=_STRICT)
class TeacherSettings:
    """The model to learn from; it may have any size but needs the student's tokenizer."""

    path: str
    """Hugging Face folder of the teacher."""
    tensor_parallel: int | None = Field(default=None, ge=1)
    """Ranks that share each layer of the teacher; default: as the student."""
    pipeline_parallel: int | None = Field(default=None, ge=1)
    """Pipeline stages of the teacher; default: as the student."""
    expert_parallel: int = Field(default=1, ge=1)
    """Ranks that share the experts of each layer of the teacher, where it has any."""
    offload: bool = False
    """Keep the weights of teacher and reference in host memory and move them in only while they score."""


@dataclass(frozen=True, config=_STRICT)
class RolloutSettings:
    """What vLLM generates for a step."""

    prompts_per_step: int = Field(default=64, ge=1)
    """Prompts drawn for a step, over all ranks."""
    group_size: int = Field(default=8, ge=1)
    """Responses sampled for each prompt (G)."""
    temperature: float = Field(default=1.0, gt=0, le=10)
    """Sampling temperature; student, teacher and reference log-probs are taken at the same temperature."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """Tokens after which a response is cut off."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Ranks that share one vLLM replica; the other ranks form further replicas."""
    cache_gib: float = Field(default=1.0, gt=0)
    """KV cache of a rank in GiB (CPU)."""
    memory_fraction: float = Field(default=0.4, gt=0, lt=1)
    """Share of the GPU's memory that the engine may take, weights included (CUDA)."""
    sync_bucket_mib: int = Field(default=256, ge=1)
    """Memory for weights on their way from trainer to engine, in MiB; a weight that is larger travels alone."""


@dataclass(frozen=True, config=_STRICT)
class SgopdSettings:
    """The objective; what is left out comes from the method's preset."""

    method: str = "sgopd"
    """sgopd, sgopd_scaled, sgopd_additive, opd, exopd, opdvr, grpd, grpo, opd_grpo or rgopd."""
    agree_coefficient: float | None = None
    """lambda: strength where teacher and verifier agree (above 1: extrapolated)."""
    conflict_coefficient: float | None = None
    """beta: strength where they disagree (below 1: interpolated)."""
    agree_outcome_weight: float | None = None
    """eta on agreeing tokens: weight of the verifier's own advantage."""
    conflict_outcome_weight: float | None = None
    """eta on conflicting tokens."""
    reference: Literal["initial", "live"] | None = None
    """What extrapolation moves away from: the initial student, or the student itself (no extra model)."""
    outcome: Literal["none", "pm1", "group", "group_centered"] | None = None
    """How outcomes become advantages: none, +-1, or normalised or centred within the prompt's group."""
    uniform_groups: Literal["conflict", "skip"] | None = None
    """Groups whose responses all have one outcome: conflict tokens, or left out."""
    noise_floor: Annotated[float, Field(ge=0)] | Literal["auto"] | None = None
    """tau in nats: where teacher and student differ by less, the gate is neutral. auto: the last step's 95th
    percentile of |s - b|, below which a difference may be the precision's and no preference. Not with fp8.rollouts or
    fp8.teacher, whose noise that is not."""
    importance_clip: float | None = Field(default=None, ge=0)
    """C: weight tokens by min(exp(s - b), C); 0: no importance weights. Unset: 0 on CPUs; 2 on GPUs, where trainer and
    engine compute by other kernels, and where the rollouts are made in FP8."""
    advantage_clip: float | None = Field(default=None, gt=0)
    """Bound on |A_t|; how many tokens reach it is logged. Unset: none."""
    reference_kl_coef: float | None = Field(default=None, ge=0)
    """Weight of a reverse KL to the initial student, added to the loss; holds a student that drifts off."""
    updates_per_batch: int = Field(default=1, ge=1)
    """Optimizer steps on each batch of rollouts; from the second on by clipped importance ratios, as PPO does."""
    ratio_clip: float | None = Field(default=None, gt=0, lt=1)
    """epsilon: an update that would take a token's probability further than 1 +- epsilon times is left out (0.2)."""
    estimator: Literal["sampled", "full"] | None = None
    """full: the reverse KL to the teacher over the whole vocabulary in place of the sampled token's estimate of it.
    Less noise, for the work of a second output layer and a teacher laid out as the student. The gate still reads the
    sampled token."""
    objective: str | None = None
    """import.path:function that makes A_t in place of the preset's formula; see objective/loss.py."""
    trajectory_margin: float | None = None
    """m in nats: margin of rgopd's gate over whole responses."""
    logprob_chunk_tokens: int = Field(default=0, ge=0)
    """Response tokens whose logits are held at once; 0 chooses from the vocabulary."""


@dataclass(frozen=True, config=_STRICT)
class TeacherRolloutSettings:
    """The second level of SG-OPD: at cold start the student also learns from the teacher's own approved responses."""

    weight: float = Field(default=0.0, ge=0)
    """w0: amount at the beginning; 0: none ever."""
    hold_steps: int = Field(default=0, ge=0)
    """Steps at w0."""
    end_step: int = Field(default=0, ge=0)
    """First step without any."""
    shape: Literal["cosine", "linear", "step"] = "cosine"
    """How w falls from w0 to 0 between hold_steps and end_step."""
    mode: Literal["auxiliary", "mixture"] = "auxiliary"
    """auxiliary: w times the cross-entropy of the approved rollouts is added to the loss; mixture: they take the
    fraction w of each group's slots."""
    samples: int = Field(default=4, ge=1)
    """Teacher rollouts of each prompt, before verification."""
    tensor_parallel: int | None = Field(default=None, ge=1)
    """Ranks that share one vLLM replica of the teacher; default: as rollout.tensor_parallel."""
    memory_fraction: float = Field(default=ALONE_MEMORY_FRACTION, gt=0, lt=1)
    """Share of the GPU's memory that the teacher's engine may take, which is alone there (CUDA)."""
    temperature: float = Field(default=1.0, gt=0, le=10)
    """Sampling temperature of the teacher, at which the cross-entropy of its rollouts is taken too."""
    seed: int | None = None
    """Seed of the teacher's rollouts. Unset: the run's; of a bank that is named, 0, so that runs can share it."""
    bank: str | None = None
    """Folder filled by `megatron-sgopd teacher-rollouts`; a prompt that it lacks gets none. Unset: the run makes
    them itself, and keeps them in RUN_DIR/teacher_bank."""
    ahead_steps: int = Field(default=8, ge=1)
    """Steps for whose prompts the run makes rollouts at a time."""


@dataclass(frozen=True, config=_STRICT)
class FilterSettings:
    """Student responses that are left out of training, whatever their outcome."""

    max_response_tokens: int | None = Field(default=None, ge=1)
    """Longer responses are left out."""
    max_repetition: float | None = Field(default=None, gt=0, le=1)
    """Responses of whose 8-grams of tokens a larger share occurs more than once are left out."""


@dataclass(frozen=True, config=_STRICT)
class VerifySettings:
    """Who decides whether a response is right."""

    verifier: str = "math"
    """math, task (reasoning-gym's own scorer), exact, or import.path:function."""
    workers: int = Field(default=1, ge=1)
    """Verifier processes of each rank."""
    time_limit: float = Field(default=5.0, gt=0)
    """Seconds for one answer; one that takes longer is wrong."""
    memory_limit_mib: int = Field(default=1024, ge=64)
    """Memory of a verifier process in MiB; an answer that needs more is wrong."""
    truncated: Literal["wrong", "skip"] = "wrong"
    """Responses cut off at max_new_tokens: wrong, or left out of training."""


@dataclass(frozen=True, config=_STRICT)
class PromptSettings:
    """Where prompts and their reference answers come from."""

    source: str
    """A .jsonl or .parquet file, a Hugging Face dataset folder, or reasoning_gym:TASK (TASK+TASK: in turn)."""
    prompt_field: str | None = None
    """Column with the prompt: text, or a list of chat messages; a path such as extra_info.question leads into a column.
    Unset: known by the columns of public data sets (docs/data.md)."""
    answer_field: str | None = None
    """Column with the reference answer, or a path into one. Unset: known likewise."""
    answer_form: Literal["plain", "worked", "boxed", "list"] | None = None
    """How it stands there: by itself, after the last #### of a worked solution (GSM8K), in its last box, or as a list
    of one. Unset: as its column and the first row show."""
    unusable_rows: Literal["refuse", "skip"] = "refuse"
    """Rows that are too long, or without prompt or answer: refuse the data, naming the first of them, or leave them out
    and say how many."""
    size: int = Field(default=10_000, ge=1)
    """Problems to generate (reasoning-gym only)."""
    task_settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the reasoning-gym task, such as min_terms; of several tasks, each one's under its name."""
    seed: int = 0
    """Seed of the generated problems (reasoning-gym only)."""
    split: str = "train"
    """Split to read from a dataset folder that has several."""
    system_prompt: str | None = None
    """System message before each prompt that has none; needs a chat template."""
    prompt_suffix: str = ""
    """Added to each prompt, to the last message of a chat: how to answer, and in which form."""
    chat_template: bool = True
    """Put prompts through the tokenizer's chat template."""
    chat_template_arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """What the chat template reads besides the messages: `enable_thinking: false` for Qwen3."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt that is accepted, in tokens; default: what a row leaves beside max_new_tokens."""


@dataclass(frozen=True, config=_STRICT)
class DataSettings:
    """Prompts to train on and to evaluate on."""

    train: PromptSettings
    """Prompts of the training steps."""
    heldout: PromptSettings | None = None
    """Prompts of the evaluations; any that also occur in `train` are taken out of `train`."""


@dataclass(frozen=True, config=_STRICT)
class EvaluateSettings:
    """Pass rate on the held-out prompts."""

    every: int = Field(default=0, ge=0)
    """Steps between evaluations; 0: only before the first and after the last step."""
    samples: int = Field(default=8, ge=1)
    """Responses for each held-out prompt (avg@k)."""
    temperature: float = Field(default=1.0, gt=0, le=10)
    """Sampling temperature of evaluations."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Evaluations sample of the most likely tokens that together have this share of the probability."""
    top_k: int = Field(default=0, ge=0)
    """Evaluations sample of so many most likely tokens; 0: of all."""
    stop: tuple[str, ...] = ()
    """Texts after which a response of an evaluation is over, besides the end-of-sequence token."""
    teacher: bool = False
    """Evaluate the teacher too, before training (loads it into vLLM once)."""


@dataclass(frozen=True, config=_STRICT)
class AlarmSettings:
    """Limits beyond which a run stops with a diagnosis."""

    logprob_gap: float = Field(default=0.5, gt=0)
    """Largest mean |s - b| in nats between training and rollout log-probs."""
    teacher_floor: float = Field(default=0.9, gt=0)
    """Teacher log-probs whose mean is below -floor * ln(vocabulary) are those of a model without weights. A student
    that writes what the teacher never would needs more than 1."""
    truncated_steps: int = Field(default=3, ge=1)
    """Steps in a row in which every response is truncated."""
    skipped_steps: int = Field(default=3, ge=1)
    """Steps in a row that settings leave nothing to train on."""
    hang_seconds: float = Field(default=300.0, gt=0)
    """Seconds after which a stage hangs, or ten times its longest so far if that is more."""
    first_hang_seconds: float = Field(default=3600.0, gt=0)
    """Seconds after which a stage hangs the first time that it is entered, the start of the run included."""


@dataclass(frozen=True, config=_STRICT)
class LoggingSettings:
    """What a run writes besides its checkpoints."""

    quiet: bool = True
    """Send the output of Megatron and vLLM to RUN_DIR/logs instead of the terminal (ready script only)."""
    samples_every: int = Field(default=10, ge=0)
    """Steps between those of which some responses are printed and kept; 0: never."""
    samples: int = Field(default=8, ge=1)
    """Most responses kept of such a step, with the numbers behind each of their tokens; of the first rank's share."""
    samples_mib: int = Field(default=256, ge=1)
    """Size of samples.jsonl in MiB beyond which every second of its steps is dropped: the older, the fewer are kept."""
    tensorboard: bool = True
    """Write TensorBoard events to the run folder."""
    record: str | None = None
    """Folder that receives each step's batch (safetensors and JSON)."""
    replay: str | None = None
    """Folder of recorded batches to train on instead of generating; after the last one the first follows again."""


@dataclass(frozen=True, config=_STRICT)
class Fp8Settings:
    """FP8 outside of training (CUDA). It moves log-probs by more than teacher and student often differ: measure with
    `megatron-sgopd noise-floor` before."""

    teacher: Literal["tensorwise", "blockwise"] | None = None
    """Megatron's FP8 recipe for teacher and reference while they score; unset: BF16. Not `delayed`, whose scales, and
    so the log-probs, would depend on the batches before."""
    rollouts: Literal["per_tensor", "per_block"] | None = None
    """vLLM quantizes the student's weights at each sync; unset: BF16."""


@dataclass(frozen=True, config=_STRICT)
class CheckpointSettings:
    """Megatron checkpoints in RUN_DIR/checkpoints."""

    every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0: only after the last step. In a Megatron script of your own, --save-interval."""
    keep_last: int | None = Field(default=None, ge=1)
    """Whole checkpoints that are kept; older ones are removed when a new one is whole. Unset: all."""
    keep_every: int | None = Field(default=None, ge=1)
    """Those at multiples of so many steps are kept all the same."""
    verify: Literal["sizes", "digests"] = "sizes"
    """How a checkpoint is checked before it is loaded: digests reads the whole of it, and finds a flipped bit."""


@dataclass(frozen=True, config=_STRICT)
class Settings:
    """Everything that the plugin reads itself; the rest of a recipe becomes Megatron flags."""

    model: ModelSettings
    teacher: TeacherSettings
    data: DataSettings
    rollout: RolloutSettings = RolloutSettings()
    sgopd: SgopdSettings = SgopdSettings()
    teacher_rollouts: TeacherRolloutSettings = TeacherRolloutSettings()
    filters: FilterSettings = FilterSettings()
    verify: VerifySettings = VerifySettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    alarms: AlarmSettings = AlarmSettings()
    logging: LoggingSettings = LoggingSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    fp8: Fp8Settings = Fp8Settings()
    run_dir: str = "runs/default"
    """Folder of the run: metrics, samples, checkpoints, summary."""
    private: bool = True
    """A new run_dir can be entered by its owner alone; false: by whomever the umask lets in."""
    platform: Literal["auto", "cpu", "cuda"] = "auto"
    """Hardware to run on; auto takes CUDA where a GPU is found."""


@dataclass(frozen=True, config=_STRICT)
class ParallelSettings:
    """How the student is spread over ranks."""

    ranks: int = Field(default=1, ge=1)
    """Processes over all nodes, one a GPU (or a share of the CPU cores)."""
    tensor: int = Field(default=1, ge=1)
    """Ranks that share each layer (TP)."""
    pipeline: int = Field(default=1, ge=1)
    """Pipeline stages (PP)."""
    context: int = Field(default=1, ge=1)
    """Ranks that share the tokens of each packed row (CP), of the student as of the models that score; the remaining
    factor of `ranks` is data parallel."""
    expert: int = Field(default=1, ge=1)
    """Data-parallel ranks that share the experts of each layer of the student (EP), where it has any."""
    sequence: bool = False
    """Sequence parallelism within the tensor-parallel group."""


@dataclass(frozen=True, config=_STRICT)
class TrainSettings:
    """Megatron's optimizer and batches."""

    steps: int = Field(ge=1)
    """Optimizer steps; each uses one batch of rollouts."""
    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak learning rate."""
    min_learning_rate: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the schedule."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up; at most one fewer than steps."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW weight decay."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW first-moment decay."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW second-moment decay."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0: no clipping."""
    seed: int = Field(default=1234, ge=1)
    """Seed of prompt order, sampling and everything else that is random."""
    precision: Literal["float32", "bf16"] = "bf16"
    """Parameter and activation type of student, teacher and reference."""
    row_tokens: int = Field(default=4096, ge=8)
    """Length of a packed row in tokens; a prompt and its response must fit."""
    rows_per_microbatch: int = Field(default=1, ge=1)
    """Most packed rows that pass through the model at once: microbatches are as few as that allows, and of one size."""


@dataclass(frozen=True, config=_STRICT)
class Fp8RecipeSettings(Fp8Settings):
    """FP8 of all parts of a run. The names are Megatron's; output layer, log-probs and objective stay in higher
    precision."""

    format: Literal["hybrid", "e4m3"] | None = None
    """Of the student's matrix products in training; hybrid: gradients in E5M2. Unset: BF16."""
    recipe: Literal["tensorwise", "blockwise"] = "tensorwise"
    """Where the scales come from: the largest value of the tensor, or of each of its blocks. Not `delayed`: its history
    of largest values is pickled into checkpoints, which Transformer Engine then refuses to load."""
    first_last_layers_bf16: bool = False
    """The student's first and last layer stay in BF16 in training."""


@dataclass(frozen=True, config=_STRICT)
class Recipe(Settings):
    """A whole run."""

    train: TrainSettings = dataclasses.field(kw_only=True)
    parallel: ParallelSettings = ParallelSettings()
    fp8: Fp8RecipeSettings = Fp8RecipeSettings()
    megatron: dict[str, Any] = Field(default_factory=dict)
    """Further Megatron flags without the leading dashes: `{log-interval: 10, use-flash-attn: true}`."""


def build[T](cls: type[T], values: dict[str, Any], origin: str) -> T:
    """Check `values` against the dataclass `cls` and build it.

    Raises:
        ConfigError: naming every setting that is unknown (with the nearest known one), missing or out of
            its range; `origin` says where the values came from.
    """
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        problems = [_problem(cls, details) for details in error.errors()]
        raise ConfigError(f"{origin}: " + "; ".join(problems)) from None


def _problem(cls: type, details: Any) -> str:
    location = ".".join(str(part) for part in details["loc"])
    if details["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        section = _section(cls, details["loc"][:-1])
        near = difflib.get_close_matches(str(details["loc"][-1]), section, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(section)}"
        return f"unknown setting {location!r}: {hint}"
    if details["type"] in ("missing", "missing_argument"):
        return f"setting {location!r} is missing"
    return f"setting {location!r} is {details['input']!r}: {details['msg'][0].lower() + details['msg'][1:]}"


def _section(cls: type, path: Sequence[Any]) -> list[str]:
    for part in path:
        cls = _nested(cls)[part]
    return [field.name for field in dataclasses.fields(cls)]


def _nested(cls: Any) -> dict[str, Any]:
    """The fields of `cls` that are dataclasses themselves, optional ones included."""
    found = {}
    for name, annotation in typing.get_type_hints(cls).items():
        for candidate in (annotation, *typing.get_args(annotation)):
            if dataclasses.is_dataclass(candidate):
                found[name] = candidate
    return found


def _flags(cls: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Path and description of every setting in `cls` and below."""
    nested = _nested(cls)
    for name, field in cls.__pydantic_fields__.items():
        if name in nested:
            yield from _flags(nested[name], (*path, name))
        else:
            default = "" if field.is_required() else f" (default: {field.get_default(call_default_factory=True)})"
            yield (*path, name), (field.description or "") + default


def flag_name(path: Sequence[str]) -> str:
    """`("rollout", "group_size")` -> `--sgopd-rollout-group-size`."""
    parts = path[1:] if path[0] == "sgopd" else path
    return "--sgopd-" + "-".join(parts).replace("_", "-")


def argument_parser() -> argparse.ArgumentParser:
    """The `--sgopd-*` flags with their help; it leaves all others alone."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    for path, description in _flags(Settings):
        parser.add_argument(
            flag_name(path),
            dest=".".join(path),
            type=yaml.safe_load,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=description.replace("%", "%%"),
        )
    return parser


def parse_flags(argv: Sequence[str]) -> tuple[Settings, list[str]]:
    """Take the `--sgopd-*` flags out of `argv`; return the settings and the flags that are left.

    Raises:
        ConfigError: an unknown `--sgopd-*` flag, or a value out of its range.
    """
    known, rest = argument_parser().parse_known_args(argv)
    names = [flag_name(path) for path, _ in _flags(Settings)]
    for argument in rest:
        if argument.startswith("--sgopd-"):
            near = difflib.get_close_matches(argument.split("=")[0], names, n=1)
            raise ConfigError(f"unknown flag {argument!r}" + (f": did you mean {near[0]}?" if near else ""))
    values: dict[str, Any] = {}
    for name, value in vars(known).items():
        *sections, last = name.split(".")
        level = values
        for section in sections:
            level = level.setdefault(section, {})
        level[last] = value
    return build(Settings, values, "--sgopd-* flags"), rest


def settings_flags(settings: Settings) -> list[str]:
    """The flags that `parse_flags` turns back into `settings`."""
    flags = []
    for path, _ in _flags(Settings):
        value: Any = settings
        for part in path:
            value = getattr(value, part, None)
        if value is not None and value != {}:
            flags.append(f"{flag_name(path)}={json.dumps(value)}")
    return flags


def as_dict(settings: Settings) -> dict[str, Any]:
    """Nested plain values, as they would stand in YAML."""
    return dataclasses.asdict(settings)

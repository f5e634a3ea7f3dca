"""Start-up checks: everything that can be found wrong before a model is loaded."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sgopd.checkpoint.files import check_conversion
from megatron_sgopd.cluster.plan import check_context, check_divides, check_full_estimator, setup_of
from megatron_sgopd.config import PromptSettings, Recipe, Settings
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.imports import import_function
from megatron_sgopd.models.architecture import Architecture, read_architecture
from megatron_sgopd.objective.methods import Method, method_from_settings
from megatron_sgopd.platform import gpu_memory
from megatron_sgopd.platform.cuda import check_precision
from megatron_sgopd.rollout.bank import IDENTITY, BankIdentity, RolloutBank, check_identity
from megatron_sgopd.rollout.prompt_cache import load_prompts
from megatron_sgopd.rollout.prompts import PromptSet, check_not_empty
from megatron_sgopd.rollout.teacher_rollouts import bank_folder, teacher_engine, teacher_worker
from megatron_sgopd.rollout.tokenizer import load_tokenizer
from megatron_sgopd.verify.base import resolve_verifier


@dataclass(frozen=True)
class Inputs:
    """What the settings point at, read and found to fit together."""

    student: Architecture
    teacher: Architecture
    tokenizer: Any
    method: Method
    train: PromptSet
    heldout: PromptSet | None
    bank: BankIdentity | None
    """Of the teacher's rollouts; None where none are wanted."""
    remarks: tuple[str, ...]
    """What a person should know, and may want."""

    @property
    def prompts_digest(self) -> str:
        """Of all prompts that the run is trained and evaluated on, wherever they come from."""
        return " ".join(prompts.digest for prompts in (self.train, self.heldout) if prompts is not None)


def check_inputs(settings: Settings, row_tokens: int, seed: int) -> Inputs:
    """Read models' configurations, tokenizers, prompts and verifier, and check them against each other.

    Args:
        row_tokens: length of a packed row, which prompt and response must fit.
        seed: of the run.

    Raises:
        ConfigError: naming the first setting that does not fit, and the mend.
    """
    method = method_of(settings)
    resolve_verifier(settings.verify.verifier)
    replay = settings.logging.replay
    if replay is not None and not any(Path(replay).glob("step_*.json")):
        raise ConfigError(
            f"logging.replay={replay} holds no recorded batch (step_000000.json and so on): record one with "
            "logging.record"
        )
    student, teacher = read_architecture(settings.model.path), read_architecture(settings.teacher.path)
    for architecture in (student, teacher):
        check_conversion(architecture.folder)
    if student.num_experts and replay is None and gpu_memory(settings.platform) is None:
        raise ConfigError(
            f"model.path={settings.model.path} has experts, and vLLM takes no new weights for experts on a CPU: train "
            "it on GPUs, or take a model without experts"
        )
    _check_lengths(settings, student, teacher, row_tokens)
    tokenizer, remarks = common_tokenizer(settings)
    _check_rows(tokenizer, student, teacher)
    train, *others = load_prompts([*data_sources(settings, row_tokens).values()], settings.model.path)
    heldout = others[0] if others else None
    train = train.without(heldout or ())
    check_not_empty(train, settings.data.train.source)
    if settings.verify.verifier == "task":
        check_task_scorers([train, *others])
    if len(train) < settings.rollout.prompts_per_step:
        raise ConfigError(
            f"data.train has {len(train)} prompts, fewer than rollout.prompts_per_step="
            f"{settings.rollout.prompts_per_step}: lower the latter or give more prompts"
        )
    wanted = settings.teacher_rollouts.weight > 0
    bank = _check_teacher_rollouts(settings, tokenizer, train, row_tokens, seed) if wanted else None
    return Inputs(student, teacher, tokenizer, method, train, heldout, bank, remarks)


PROMPTS_DIGEST = "prompts.digest"
"""File of a run folder."""


def check_same_prompts(run_dir: Path, inputs: Inputs) -> None:
    """The position in the prompts follows from the step, so a run goes on only with the prompts it began with.

    Raises:
        ConfigError: they have changed.
    """
    path = run_dir / PROMPTS_DIGEST
    if path.is_file() and path.read_text() != inputs.prompts_digest:
        raise ConfigError(
            f"the prompts of this run have changed since it began (digest {inputs.prompts_digest}, {path} says "
            f"{path.read_text()}): restore them and the tokenizer, or start a new run in another run_dir"
        )


_NO_METHOD_FIELDS = ("method", "logprob_chunk_tokens", "updates_per_batch")


def check_task_scorers(sets: Iterable[PromptSet]) -> None:
    """Check that verifier `task` has a scorer for all prompts.

    Raises:
        ConfigError: a prompt is of no task, or of one whose scorer would evaluate the answer as code.
    """
    from megatron_sgopd.verify.tasks import scorer

    for task in {task for prompts in sets for task in prompts.tasks}:
        scorer(task)


OTHER_KERNELS_CLIP = 2.0
"""C of the importance weights, where the settings leave it open and the engine computes by other kernels, or in FP8."""


def method_of(settings: Settings) -> Method:
    """The method's preset with what the settings change of it.

    Raises:
        ConfigError: an unknown method, or values that contradict each other.
    """
    overrides = {
        field.name: getattr(settings.sgopd, field.name)
        for field in dataclasses.fields(settings.sgopd)
        if field.name not in _NO_METHOD_FIELDS
    }
    given = {name: value for name, value in overrides.items() if value is not None}
    if settings.fp8.rollouts or settings.platform == "cuda" or gpu_memory(settings.platform) is not None:
        given.setdefault("importance_clip", OTHER_KERNELS_CLIP)
    if given.get("importance_clip") == 0:
        given["importance_clip"] = None
    if given.get("noise_floor") == "auto":
        _check_measurable(settings)
        given |= {"noise_floor": 0.0, "measured_noise_floor": True}
    if "objective" in given:
        given["objective"] = import_function(given["objective"], "sgopd.objective")
    return method_from_settings(settings.sgopd.method, **given)


def _check_measurable(settings: Settings) -> None:
    """|s - b| tells how far the precision moves q - s: not where b is of another precision than s, nor where q is."""
    for name, value in (("fp8.rollouts", settings.fp8.rollouts), ("fp8.teacher", settings.fp8.teacher)):
        if value:
            raise ConfigError(
                f"sgopd.noise_floor=auto reads |s - b|, which with {name}={value} is not the noise of q - s: measure "
                "that with `megatron-sgopd noise-floor RECIPE`, and set sgopd.noise_floor to the number it gives"
            )


def _check_teacher_rollouts(
    settings: Settings, tokenizer: Any, train: PromptSet, row_tokens: int, seed: int
) -> BankIdentity:
    wanted = settings.teacher_rollouts
    if wanted.end_step < max(wanted.hold_steps, 1):
        raise ConfigError(
            f"teacher_rollouts.end_step={wanted.end_step} is before hold_steps={wanted.hold_steps}, or there is no "
            "step with them: let it be the first step without teacher rollouts"
        )
    if wanted.mode == "mixture" and wanted.weight > 1:
        raise ConfigError(
            f"teacher_rollouts.weight={wanted.weight} is a fraction of the slots in mode mixture: give 0 to 1"
        )
    identity = teacher_worker(settings, tokenizer, row_tokens, seed).identity(train)
    folder = bank_folder(settings)
    if wanted.bank is not None or (folder / IDENTITY).is_file():
        check_identity(folder, identity)
    if wanted.bank is not None:
        bank = RolloutBank(folder)
        if bank.approved == 0:
            raise ConfigError(
                f"teacher_rollouts.bank={wanted.bank} has {bank.rollouts} rollouts and none that was approved, but "
                f"teacher_rollouts.weight={wanted.weight}: fill it with `megatron-sgopd teacher-rollouts`, or set "
                "the weight to 0"
            )
    return identity


def data_sources(settings: Settings, row_tokens: int) -> dict[str, PromptSettings]:
    """What a run reads, under the names of its settings: a prompt may be as long as a row of `row_tokens` leaves room
    for, if no lower limit was set."""
    room = row_tokens - settings.rollout.max_new_tokens
    named = {"data.train": settings.data.train, "data.heldout": settings.data.heldout}
    return {
        name: dataclasses.replace(source, max_prompt_tokens=min(room, source.max_prompt_tokens or room))
        for name, source in named.items()
        if source is not None
    }


def _check_rows(tokenizer: Any, student: Architecture, teacher: Architecture) -> None:
    """Every id that the tokenizer makes, and that the student can emit, has a row in what scores it."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    for name, architecture in (("model", student), ("teacher", teacher)):
        if largest >= architecture.vocab_size:
            raise ConfigError(
                f"the tokenizer has ids up to {largest}, and {name}.path={architecture.folder} only "
                f"{architecture.vocab_size} rows (vocab_size): take the tokenizer that the model was trained with, or "
                "a model whose embeddings were resized"
            )
    if teacher.vocab_size < student.vocab_size:
        raise ConfigError(
            f"the student has {student.vocab_size} rows of vocabulary and can emit any of their ids, the teacher only "
            f"{teacher.vocab_size}: take a teacher with as many, or a student with fewer"
        )


def _check_lengths(settings: Settings, student: Architecture, teacher: Architecture, row_tokens: int) -> None:
    new_tokens = settings.rollout.max_new_tokens
    if new_tokens >= row_tokens:
        raise ConfigError(
            f"rollout.max_new_tokens={new_tokens} leaves no room for a prompt in train.row_tokens={row_tokens}: "
            "raise the latter"
        )
    for name, architecture in (("model", student), ("teacher", teacher)):
        if row_tokens > architecture.max_position_embeddings:
            raise ConfigError(
                f"train.row_tokens={row_tokens} is more than the context of {name}.path "
                f"({architecture.max_position_embeddings} tokens in {architecture.folder}): lower it"
            )


def common_tokenizer(settings: Settings) -> tuple[Any, tuple[str, ...]]:
    """The student's tokenizer, which must map the same text to the same ids as the teacher's; and what is to be said of
    the teacher's.

    Raises:
        ConfigError: it does not.
    """
    student, teacher = (load_tokenizer(path) for path in (settings.model.path, settings.teacher.path))
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        different = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
        token = different[0]
        raise ConfigError(
            f"student and teacher have different tokenizers: {len(different)} tokens differ, first {token!r} (id "
            f"{ours.get(token)} in {settings.model.path}, {theirs.get(token)} in {settings.teacher.path}): the teacher "
            "scores the student's token ids, so take a teacher with the same tokenizer"
        )
    for name in ("eos_token_id", "pad_token_id"):
        if getattr(student, name) != getattr(teacher, name):
            raise ConfigError(
                f"{name} is {getattr(student, name)} in {settings.model.path} but {getattr(teacher, name)} in "
                f"{settings.teacher.path}: make tokenizer_config.json of both agree"
            )
    if settings.data.train.chat_template and student.chat_template != teacher.chat_template:
        return student, (
            f"the chat template of teacher.path={settings.teacher.path} is not that of the student, by which both read "
            "prompts: `train RECIPE --dry-run` shows the first; a teacher that was trained with another form says less",
        )
    return student, ()


def check_layout(recipe: Recipe, student: Architecture, teacher: Architecture) -> None:
    """Ranks, heads, layers and batches divide as the layout needs.

    Raises:
        ConfigError: naming the first that does not.
    """
    parallel, train, rollout = recipe.parallel, recipe.train, recipe.rollout
    setup = setup_of(recipe)
    check_divides(setup, student, teacher, rollout.prompts_per_step * rollout.group_size)
    if (recipe.teacher_rollouts.weight > 0 and recipe.teacher_rollouts.bank is None) or recipe.evaluate.teacher:
        teacher.check_parallel(rollout.tensor_parallel, 1)
        if (tensor := teacher_engine(recipe).tensor_parallel) != rollout.tensor_parallel:
            raise ConfigError(
                f"teacher_rollouts.tensor_parallel={tensor} is not rollout.tensor_parallel={rollout.tensor_parallel}, "
                "and vLLM has one in a process: leave it out, or make the teacher's rollouts beforehand "
                "(`megatron-sgopd teacher-rollouts`, teacher_rollouts.bank) and leave evaluate.teacher out"
            )
    if recipe.sgopd.estimator == "full":
        check_full_estimator(student, teacher, setup.student.layout, setup.teacher.layout, setup.offload)
    check_context(setup.context, train.row_tokens, method_of(recipe))
    split = setup.context * math.lcm(setup.tensor, setup.teacher_tensor)
    if parallel.sequence and train.row_tokens % split:
        raise ConfigError(
            f"train.row_tokens={train.row_tokens} is not divisible by parallel.tensor={parallel.tensor} and "
            f"teacher.tensor_parallel={setup.teacher_tensor}, each x parallel.context={setup.context}, which "
            f"parallel.sequence needs: let it be a multiple of {split}"
        )
    if recipe.platform == "cuda" or gpu_memory(recipe.platform) is not None:
        check_precision(train.precision)
    if method_of(recipe).outcome.startswith("group") and rollout.group_size == 1:
        raise ConfigError(
            "rollout.group_size=1 leaves nothing to compare a response with, and "
            f"sgopd.method={recipe.sgopd.method} takes outcomes relative to their group: raise it to 2 or more, or set "
            "sgopd.outcome to pm1"
        )
    if recipe.megatron.get("wandb-project") and importlib.util.find_spec("wandb") is None:
        raise ConfigError("megatron.wandb-project is set, and wandb is not installed: install it, or leave that out")
    if train.min_learning_rate > train.learning_rate:
        raise ConfigError(
            f"train.min_learning_rate={train.min_learning_rate} is more than train.learning_rate="
            f"{train.learning_rate}: lower it"
        )


def check_disk(run_dir: Path, parameter_count: int, precision: str) -> None:
    """One checkpoint fits beside what is on the disk already.

    Raises:
        ConfigError: with the space that is needed and free.
    """
    # Weights, two moments, and float32 master weights where the weights are BF16.
    needed = parameter_count * (14 if precision == "bf16" else 12)
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConfigError(
            f"a checkpoint takes {needed / 2**30:.1f} GiB but {existing} has {free / 2**30:.1f} GiB free: "
            "free some space or choose another run_dir"
        )

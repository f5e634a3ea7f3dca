"""A YAML recipe: read, checked, and turned into Megatron's command line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_sgopd.checkpoint.completeness import newest_step
from megatron_sgopd.checkpoint.files import write_atomically
from megatron_sgopd.checks import Inputs, check_disk, check_inputs, check_layout, check_same_prompts, method_of
from megatron_sgopd.cluster.hardware import Device, device
from megatron_sgopd.cluster.plan import Plan, planner_of, setup_of, teacher_engine_bytes
from megatron_sgopd.common.data_files import read_yaml
from megatron_sgopd.config import Recipe, TrainSettings, as_dict, build, settings_flags
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.fp8 import check_fp8, training_flags
from megatron_sgopd.models.architecture import Architecture
from megatron_sgopd.models.provider import megatron_flags, padded_vocab_size
from megatron_sgopd.models.weight_map import parameter_count
from megatron_sgopd.monitor.output import METRICS, RESOLVED
from megatron_sgopd.objective.methods import Method
from megatron_sgopd.platform import gpu_memory
from megatron_sgopd.platform.cuda import CudaPlatform

_FREE_TO_CHANGE = frozenset({"logging", "evaluate", "alarms", "checkpoint", "run_dir", "private", "platform"})
_LAYOUT = frozenset(
    {"parallel.ranks", "parallel.tensor", "parallel.pipeline", "parallel.context", "parallel.expert"}
    | {
        "parallel.sequence",
        "teacher.tensor_parallel",
        "teacher.pipeline_parallel",
        "teacher.expert_parallel",
        "teacher.offload",
        "rollout.tensor_parallel",
        "teacher_rollouts.tensor_parallel",
        "teacher_rollouts.memory_fraction",
        "train.rows_per_microbatch",
    }
    | {"rollout.memory_fraction", "rollout.cache_gib", "rollout.sync_bucket_mib", "sgopd.logprob_chunk_tokens"}
)
"""Settings that change nothing but the order of sums: a run may go on with others."""
_SAME_PROMPTS = frozenset({"data.train.source", "data.heldout.source"})
"""Settings that may change if the prompts do not."""
_PLUGIN = "(the plugin)"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `section.key=value` overrides, and check every setting by itself.

    Paths of models and data are taken relative to the current folder. `run_dir` defaults to `runs/` and the
    name of the recipe's folder or file.

    Raises:
        ConfigError: unreadable file, bad YAML, unknown setting, value out of range.
    """
    path = Path(path)
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {path} must hold sections such as `model:` and `train:`, not {values!r}")
    for override in overrides:
        _apply(values, override)
    values.setdefault("run_dir", f"runs/{path.parent.name if path.stem == 'recipe' else path.stem}")
    return build(Recipe, values, str(path))


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r} is not of the form section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override!r}: {section!r} is a value, not a section")
    values[last] = yaml.safe_load(text)


def check_recipe(recipe: Recipe) -> Inputs:
    """All checks of a recipe that need no model: inputs, layout, flags, run folder, disk.

    Raises:
        ConfigError: the first that fails.
    """
    check_run_dir(recipe)
    inputs = check_inputs(recipe, recipe.train.row_tokens, recipe.train.seed)
    if _trained(Path(recipe.run_dir)):
        check_same_prompts(Path(recipe.run_dir), inputs)
    check_layout(recipe, inputs.student, inputs.teacher)
    check_fp8(recipe, setup_of(recipe), inputs.student, inputs.teacher)
    megatron_arguments(recipe, inputs)
    check_memory(recipe)
    check_disk(Path(recipe.run_dir), parameter_count(inputs.student), recipe.train.precision)
    return inputs


def device_here(recipe: Recipe, planned_as: str) -> Device:
    """This machine's device.

    Args:
        planned_as: the device of the table that is like it but for the memory.
    """
    like = device(planned_as)
    return dataclasses.replace(like, memory=gpu_memory(recipe.platform) or like.memory)


def plan_here(recipe: Recipe, method: Method, planned_as: str) -> Plan:
    """A recipe's own layout on this machine, which is like `planned_as` (see `device_here`)."""
    return planner_of(recipe, method, device_here(recipe, planned_as)).judge(setup_of(recipe))


def check_memory(recipe: Recipe) -> None:
    """Every phase of a step fits this machine's GPUs, as the planner reckons; nothing is said where there are none.

    Raises:
        ConfigError: naming the phase that does not fit, what it needs, and the mend.
    """
    if gpu_memory(recipe.platform) is None:
        return
    plan = plan_here(recipe, method_of(recipe), CudaPlatform.planned_as)
    if plan.problems:
        raise ConfigError(f"{plan.worst_problem}. `megatron-sgopd plan` proposes layouts that fit")


def check_teacher_memory(recipe: Recipe, teacher: Architecture) -> None:
    """The teacher's engine fits this machine's GPUs when it is alone; nothing is said where there are none.

    Raises:
        ConfigError: it does not.
    """
    if gpu_memory(recipe.platform) is not None:
        teacher_engine_bytes(recipe, teacher, device_here(recipe, CudaPlatform.planned_as))


def check_run_dir(recipe: Recipe) -> None:
    """A run folder belongs to one recipe: going on in it with settings that give other numbers is refused.

    Raises:
        ConfigError: naming the settings that differ.
    """
    different = _changes(recipe)
    if fatal := sorted(different.keys() - _LAYOUT - _SAME_PROMPTS - {"train.steps"}):
        earlier, now = different[fatal[0]]
        raise ConfigError(
            f"run folder {recipe.run_dir} belongs to a run with {fatal[0]}={earlier!r}, not {now!r}"
            + (f" (and {len(fatal) - 1} more differences)" if len(fatal) > 1 else "")
            + ": choose another run_dir, or remove the folder"
        )
    if "train.steps" in different:
        _check_steps(recipe, different["train.steps"][0])
    flags = {name.removeprefix("--").replace("_", "-") for name, value in recipe.megatron.items() if value}
    moved = sorted(different.keys() & {"parallel.tensor", "parallel.pipeline", "parallel.expert"})
    if moved and "use-distributed-optimizer" in flags and "dist-ckpt-optim-fully-reshardable" not in flags:
        earlier, now = different[moved[0]]
        raise ConfigError(
            f"the checkpoints of {recipe.run_dir} hold a distributed optimizer's state as it was split for {moved[0]}="
            f"{earlier}, which cannot be loaded with {now}: go on with {earlier}; for runs that may change it, set "
            "megatron.dist-ckpt-optim-fully-reshardable from the start"
        )


def _check_steps(recipe: Recipe, earlier: int) -> None:
    """With another number of steps, those that are done have had the learning rate that they would have had."""
    train, done = recipe.train, newest_step(Path(recipe.run_dir) / "checkpoints")
    said = f"run folder {recipe.run_dir} belongs to a run with train.steps={earlier}, not {train.steps}"
    mend = (
        f"keep train.steps, or begin another run with what this one has learnt (megatron-sgopd export {recipe.run_dir} "
        "OUT, model.path=OUT)"
    )
    if train.steps < done:
        raise ConfigError(f"{said}, and has {done} steps already: choose another run_dir")
    if train.schedule != "constant":
        raise ConfigError(
            f"{said}: train.schedule={train.schedule} spreads the learning rate over all steps, so that those that are "
            f"done would have had another: {mend}"
        )
    was, now = (warmup_steps(dataclasses.replace(train, steps=steps)) for steps in (earlier, train.steps))
    if was != now:
        raise ConfigError(f"{said}: its warm-up was of {was} steps and would have been of {now}: {mend}")


def warmup_steps(train: TrainSettings) -> int:
    """Steps of warm-up: fewer than there are steps, so that a quick try needs no other setting."""
    return min(train.warmup_steps, train.steps - 1)


def remarks(recipe: Recipe) -> list[str]:
    """What to say before a run starts: how it goes on otherwise than until now, and a warm-up that is cut short."""
    different = {name: f"{name}={now} (was {earlier})" for name, (earlier, now) in sorted(_changes(recipe).items())}
    layout = ", ".join(said for name, said in different.items() if name in _LAYOUT)
    said = [f"goes on with {layout}: the same numbers, but for the order of float sums"] * bool(layout)
    said += [
        f"goes on with {different[name]}: the prompts are the same" for name in sorted(different.keys() & _SAME_PROMPTS)
    ]
    said += [f"goes on with {change}" for name, change in different.items() if name == "train.steps"]
    if (warmup := warmup_steps(recipe.train)) < recipe.train.warmup_steps:
        said.append(
            f"train.warmup_steps={recipe.train.warmup_steps} is cut to {warmup}, since train.steps={recipe.train.steps}"
        )
    return said


def _changes(recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Settings that shape the training and are not those of the run so far: earlier value and value now."""
    path = Path(recipe.run_dir) / RESOLVED
    if not (_trained(path.parent) and path.is_file()):
        return {}
    earlier, now = (_flat(values) for values in (read_yaml(path), as_dict(recipe)))
    return {
        key: (earlier.get(key), now.get(key))
        for key in earlier.keys() | now.keys()
        if earlier.get(key) != now.get(key) and key.split(".")[0] not in _FREE_TO_CHANGE
    }


def _trained(run_dir: Path) -> bool:
    return any((run_dir / name).exists() for name in ("checkpoints", METRICS))


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat


def write_resolved(recipe: Recipe) -> None:
    """Keep the recipe with all its defaults in the run folder, which the caller has claimed, and say what is to be
    said of it.

    Raises:
        ConfigError: the folder has become another run's since it was checked.
    """
    check_run_dir(recipe)
    for said in remarks(recipe):
        print(f"megatron-sgopd: {said}", flush=True)
    write_atomically(Path(recipe.run_dir) / RESOLVED, resolved_text(recipe).encode())


def resolved_text(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included."""
    return yaml.safe_dump(as_dict(recipe), sort_keys=False)


def megatron_arguments(recipe: Recipe, inputs: Inputs) -> list[str]:
    """The command line of `megatron_sgopd.pretrain`: Megatron's flags, then the plugin's.

    Raises:
        ConfigError: a flag of the `megatron` section is set by the recipe or the plugin already.
    """
    owned = {name: (value, "model.path") for name, value in _as_mapping(megatron_flags(inputs.student)).items()}
    owned["padded-vocab-size"] = (padded_vocab_size(inputs.student, recipe.parallel.tensor), "model.path")
    owned |= _recipe_flags(recipe) | training_flags(recipe)
    for name, value in recipe.megatron.items():
        flag = name.removeprefix("--").replace("_", "-")
        if flag in owned and value != owned[flag][0]:
            raise ConfigError(
                f"megatron.{name}={value!r} contradicts {owned[flag][1]}, which sets --{flag} to {owned[flag][0]!r}: "
                f"remove it" + ("" if owned[flag][1] == _PLUGIN else f" and change {owned[flag][1]} instead")
            )
    flags = {name: value for name, (value, _) in owned.items()}
    flags |= {name.removeprefix("--").replace("_", "-"): value for name, value in recipe.megatron.items()}
    if flags.get("async-save") and not flags.get("use-persistent-ckpt-worker"):
        raise ConfigError(
            "megatron.async-save without megatron.use-persistent-ckpt-worker: Megatron would save as if it had not "
            "been asked for; set both, or neither"
        )
    return [*_command_line(flags), *settings_flags(recipe)]


def _as_mapping(flags: Sequence[str]) -> dict[str, Any]:
    """`["--swiglu", "--lr", "1"]` -> `{"swiglu": True, "lr": "1"}`."""
    mapping: dict[str, Any] = {}
    for flag, following in zip(flags, [*flags[1:], "--"], strict=True):
        if flag.startswith("--"):
            mapping[flag.removeprefix("--")] = True if following.startswith("--") else following
    return mapping


def _command_line(flags: dict[str, Any]) -> list[str]:
    """False and None leave a flag out, True gives it alone, a list gives it several values."""
    arguments = []
    for name, value in flags.items():
        if value is True:
            arguments.append(f"--{name}")
        elif isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        elif value is not None and value is not False:
            arguments.append(f"--{name}={value}")
    return arguments


def _recipe_flags(recipe: Recipe) -> dict[str, tuple[Any, str]]:
    """Megatron flag -> its value and the setting that it comes from."""
    train, parallel, rollout = recipe.train, recipe.parallel, recipe.rollout
    run_dir = Path(recipe.run_dir)
    checkpoints = str(run_dir / "checkpoints")
    tensorboard = str(run_dir / "tensorboard") if recipe.logging.tensorboard else None
    return {
        "tensor-model-parallel-size": (parallel.tensor, "parallel.tensor"),
        "pipeline-model-parallel-size": (parallel.pipeline, "parallel.pipeline"),
        "sequence-parallel": (parallel.sequence, "parallel.sequence"),
        "context-parallel-size": (parallel.context, "parallel.context"),
        "expert-model-parallel-size": (parallel.expert, "parallel.expert"),
        "seq-length": (train.row_tokens, "train.row_tokens"),
        "micro-batch-size": (train.rows_per_microbatch, "train.rows_per_microbatch"),
        "global-batch-size": (rollout.prompts_per_step * rollout.group_size, "rollout.group_size"),
        "train-iters": (train.steps, "train.steps"),
        "lr": (train.learning_rate, "train.learning_rate"),
        "min-lr": (train.min_learning_rate, "train.min_learning_rate"),
        "lr-decay-style": (train.schedule, "train.schedule"),
        "lr-warmup-iters": (warmup_steps(train), "train.warmup_steps"),
        # Of W steps the first has 1/(W+1) of the learning rate, where Megatron would give it none.
        "lr-warmup-init": (train.learning_rate / (warmup_steps(train) + 1), "train.learning_rate"),
        "override-opt-param-scheduler": (True, _PLUGIN),  # that of more steps, which `check_run_dir` allows
        "weight-decay": (train.weight_decay, "train.weight_decay"),
        "adam-beta1": (train.adam_beta1, "train.adam_beta1"),
        "adam-beta2": (train.adam_beta2, "train.adam_beta2"),
        # With 0 Megatron would not take the norm, and a gradient that is no number would be saved.
        "clip-grad": (train.clip_grad or math.inf, "train.clip_grad"),
        "seed": (train.seed, "train.seed"),
        "bf16": (train.precision == "bf16", "train.precision"),
        "fp16": (False, "train.precision"),
        "save": (checkpoints, "run_dir"),
        "load": (checkpoints, "run_dir"),
        "save-interval": (recipe.checkpoint.every or train.steps, "checkpoint.every"),
        "ckpt-format": ("torch_dist", _PLUGIN),
        "tensorboard-dir": (tensorboard, "logging.tensorboard"),
        "log-interval": (1, _PLUGIN),
        "eval-iters": (0, _PLUGIN),
        "eval-interval": (train.steps, _PLUGIN),
        "dataloader-type": ("external", _PLUGIN),
        "calculate-per-token-loss": (True, _PLUGIN),
        "tokenizer-type": ("NullTokenizer", _PLUGIN),
        "no-check-for-nan-in-loss-and-grad": (True, _PLUGIN),  # our alarm says what to change
        "rerun-mode": ("disabled", _PLUGIN),  # it would keep every microbatch of a step
    }


def as_command(arguments: Sequence[str], ranks: int) -> str:
    """The launch command for a terminal."""
    import shlex

    launcher = ["torchrun", "--standalone", f"--nproc-per-node={ranks}", "-m", "megatron_sgopd.pretrain"]
    return " \\\n  ".join([shlex.join(launcher), *(shlex.quote(argument) for argument in arguments)])

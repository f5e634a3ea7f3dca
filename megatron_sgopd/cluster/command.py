"""`megatron-sgopd plan`: what fits where, and how long it takes. `megatron-sgopd doctor`: what is wrong here."""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from megatron_sgopd.arguments import add_set
from megatron_sgopd.common.console import Terminal, styled
from megatron_sgopd.errors import ConfigError

if TYPE_CHECKING:
    from megatron_sgopd.cluster.hardware import Device
    from megatron_sgopd.cluster.plan import Plan
    from megatron_sgopd.cluster.times import Calibration
    from megatron_sgopd.config import Recipe

_GIB = 1 << 30
_BEST = 3
_CALIBRATION_STEPS = 1000
"""Of a run, the last ones, that its times are taken from."""


def add_commands(commands: Any) -> None:
    """Add both commands to the command line."""
    _add_plan(commands)
    _add_doctor(commands)


def _add_doctor(commands: Any) -> None:
    command = commands.add_parser(
        "doctor",
        help="check this machine, and a recipe on it",
        description="Check versions, devices, kernels, a product, a collective, limits, the locale and the rendezvous; "
        "with RECIPE also models, tokenizers, prompts, layout, memory, storage, checkpoints and Slurm's variables, and "
        "let the student generate one token. Exit code 1 if anything is red.",
        epilog="Example: megatron-sgopd doctor examples/arithmetic_cpu/recipe.yaml",
    )
    command.add_argument("recipe", metavar="RECIPE", nargs="?", help="YAML file; see examples/")
    add_set(command)
    command.add_argument("--no-generate", action="store_true", help="leave out the token, which loads the student")
    command.add_argument("--json", action="store_true", help="one JSON object a line for each finding")
    command.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from megatron_sgopd.cluster.doctor import examine
    from megatron_sgopd.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.set) if arguments.recipe else None
    console, worst = Terminal(), 0
    for finding in examine(recipe, generate=not arguments.no_generate):
        worst |= finding.level == "red"
        if arguments.json:
            print(json.dumps(asdict(finding)), flush=True)
        else:
            mark = {"green": "ok  ", "yellow": "look", "red": "BAD "}[finding.level]
            console.print(styled(mark, finding.level), f"{finding.check:12} {finding.said}")
    return worst


def _add_plan(commands: Any) -> None:
    command = commands.add_parser(
        "plan",
        help="say what memory and time a recipe takes on how many GPUs, and which layout is best",
        description="Predict, from the recipe and the models' config.json alone, the memory of a rank in each phase of "
        "a step and the seconds of each stage; then try all layouts on as many GPUs, and show the three fastest that "
        "fit and why others do not. Times are estimates from data sheets and assumed efficiencies (--assumptions), "
        "unless --calibrate names a run whose stages were measured. Exit code 1: the recipe's own layout does not fit; "
        "2: none does.",
        epilog="Example: megatron-sgopd plan examples/llama31_70b_to_8b/recipe.yaml --gpus 32",
    )
    command.add_argument("recipe", metavar="RECIPE", nargs="?", help="YAML file; see examples/")
    add_set(command)
    command.add_argument("--gpus", type=int, metavar="N", help="GPUs, one a rank (parallel.ranks)")
    command.add_argument("--gpu", default="h100-80g", metavar="NAME", help="kind of device (h100-80g)")
    command.add_argument(
        "--prompt-tokens", type=float, metavar="N", help="mean length of a prompt (an eighth of a row)"
    )
    command.add_argument(
        "--response-tokens", type=float, metavar="N", help="mean length of a response (half of rollout.max_new_tokens)"
    )
    command.add_argument("--calibrate", type=Path, metavar="RUN", help="run folder whose stage times correct the times")
    command.add_argument("--calibrate-gpu", metavar="NAME", help="kind of device that it ran on (as --gpu)")
    command.add_argument("--assumptions", action="store_true", help="print what is assumed of devices, and stop")
    command.add_argument("--json", action="store_true", help="one JSON object")
    command.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from megatron_sgopd.checks import method_of
    from megatron_sgopd.cluster.hardware import device
    from megatron_sgopd.cluster.plan import planner_of, setup_of
    from megatron_sgopd.recipe import load_recipe

    if arguments.assumptions:
        return _show_assumptions()
    if arguments.recipe is None:
        raise ConfigError("RECIPE is missing: name a YAML file, such as those in examples/")
    for name in ("gpus", "prompt_tokens", "response_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value:g} must be at least 1")
    if arguments.calibrate_gpu and arguments.calibrate is None:
        raise ConfigError("--calibrate-gpu says on what the run of --calibrate ran: give that too")
    gpu = device(arguments.gpu)
    calibration = None
    if arguments.calibrate is not None:
        calibration = calibrate(arguments.calibrate, arguments.calibrate_gpu or arguments.gpu)
    recipe = load_recipe(arguments.recipe, arguments.set)
    ranks = arguments.gpus or recipe.parallel.ranks
    lengths = arguments.prompt_tokens, arguments.response_tokens
    planner = planner_of(recipe, method_of(recipe), gpu, lengths, calibration)
    own = setup_of(recipe, ranks)
    undivided = planner.undivided(own)
    judged = None if undivided else planner.judge(own)
    best, misses = planner.best(ranks, _BEST)
    nearest = None if best else planner.nearest(ranks)
    if arguments.json:
        facts = {"gpu": gpu.name, "ranks": ranks, "usable_bytes": planner.usable, "undivided": undivided}
        facts |= {"recipe": judged and _as_dict(judged), "best": [_as_dict(plan) for plan in best]}
        facts |= {"misses": [_as_dict(plan) for plan in misses], "nearest": nearest and _as_dict(nearest)}
        facts["calibration"] = dict(calibration.factors) if calibration else {}
        print(json.dumps(facts))
    else:
        print(f"{arguments.recipe} on {ranks} x {gpu.name}, {planner.usable / _GIB:.1f} GiB of each usable")
        _show_own(judged, undivided)
        _show_best(best, misses)
        if recipe.teacher_rollouts.end_step:
            _show_teacher_engine(recipe, gpu)
        if calibration:
            said = ", ".join(f"{stage} x {factor:.3g}" for stage, factor in calibration.factors.items())
            print(f"Times are those of data sheets, corrected by {arguments.calibrate}: {said}")
    if not best:
        raise ConfigError(_refusal(ranks, gpu.name, misses, nearest))
    return 0 if judged is not None and not judged.missing else 1


def calibrate(run: Path, gpu: str) -> Calibration:
    """Factors between predicted and measured seconds of a run's stages.

    Raises:
        ConfigError: the folder holds no run of at least two steps.
    """
    from megatron_sgopd.checks import method_of
    from megatron_sgopd.cluster.hardware import device
    from megatron_sgopd.cluster.plan import planner_of, setup_of
    from megatron_sgopd.cluster.times import calibration
    from megatron_sgopd.monitor.lines import last_json_lines
    from megatron_sgopd.monitor.output import METRICS, RESOLVED
    from megatron_sgopd.recipe import load_recipe

    steps = list(itertools.islice(last_json_lines(run / METRICS), _CALIBRATION_STEPS))[::-1]
    if len(steps) < 2 or not (run / RESOLVED).is_file():
        raise ConfigError(f"--calibrate {run} holds no run of at least two steps: name a run folder")
    recipe = load_recipe(run / RESOLVED)
    responses = recipe.rollout.prompts_per_step * recipe.rollout.group_size
    middle = sorted(steps[1:], key=lambda line: line["response_tokens"])[len(steps[1:]) // 2]
    response_tokens = middle["response_tokens"] / responses
    prompt_tokens = middle["rows"] * recipe.train.row_tokens / responses - response_tokens
    planner = planner_of(recipe, method_of(recipe), device(gpu), (max(1.0, prompt_tokens), response_tokens))
    return calibration(planner.judge(setup_of(recipe)).seconds, steps)


def _as_dict(plan: Plan) -> dict[str, Any]:
    return {
        "settings": plan.setup.settings(),
        "fits": not plan.missing,
        "problems": plan.problems,
        "phase_bytes": plan.phases,
        "stage_seconds": plan.seconds,
        "step_seconds": plan.step_seconds,
        "response_tokens_per_second": plan.tokens_per_second,
        "gpu_hours_per_step": plan.setup.ranks * plan.step_seconds / 3600,
        "setup": asdict(plan.setup),
    }


def _show_own(judged: Plan | None, undivided: str | None) -> None:
    if judged is None:
        print(f"The recipe's own layout does not divide: {undivided}")
        return
    print("The recipe's own layout fits." if not judged.missing else "The recipe's own layout does not fit:")
    for problem in judged.problems.values():
        print(f"  {problem}")
    table = Table(title="GiB on the fullest rank", title_justify="left")
    table.add_column("phase")
    table.add_column("in all", justify="right")
    table.add_column("of which")
    for phase, parts in judged.phases.items():
        table.add_row(phase, f"{sum(parts.values()) / _GIB:.2f}", _parts(parts))
    Terminal(soft_wrap=False).print(table)
    _show_times(judged)


def _parts(parts: dict[str, int]) -> str:
    largest = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {nbytes / _GIB:.2f}" for name, nbytes in largest if nbytes >= _GIB // 100)


def _show_times(plan: Plan) -> None:
    stages = ", ".join(f"{stage} {seconds:.3g}" for stage, seconds in plan.seconds.items() if seconds >= 5e-4)
    hours = plan.setup.ranks * plan.step_seconds / 3600
    print(
        f"A step takes {plan.step_seconds:.3g} s ({stages}): {plan.tokens_per_second:,.0f} response tokens/s, "
        f"{hours:.3g} GPU-hours"
    )


def _show_best(best: list[Plan], misses: list[Plan]) -> None:
    for number, plan in enumerate(best, start=1):
        peak, nbytes = max(((name, sum(p.values())) for name, p in plan.phases.items()), key=lambda pair: pair[1])
        print(f"\nBest {number} of those that fit: fullest in {peak}, {nbytes / _GIB:.1f} GiB")
        _show_times(plan)
        print("  " + " ".join(f"--set {name}={json.dumps(value)}" for name, value in plan.setup.settings().items()))
    if misses:
        print("\nOf those that do not fit, the nearest by phase:")
    for plan in misses:
        setup = plan.setup
        student, teacher = f"{setup.tensor} x {setup.pipeline}", f"{setup.teacher_tensor} x {setup.teacher_pipeline}"
        print(f"  student {student}, teacher {teacher}, engine {setup.rollout_tensor}: {plan.worst_problem}")


def _show_teacher_engine(recipe: Recipe, gpu: Device) -> None:
    """What `megatron-sgopd teacher-rollouts` takes."""
    from megatron_sgopd.cluster.plan import teacher_engine_bytes
    from megatron_sgopd.models.architecture import read_architecture
    from megatron_sgopd.rollout.teacher_rollouts import teacher_engine

    try:
        parts = teacher_engine_bytes(recipe, read_architecture(recipe.teacher.path, with_weights=False), gpu)
    except ConfigError as error:
        print(f"\nTeacher rollouts ahead of training do not fit: {error}")
        return
    ranks = teacher_engine(recipe).tensor_parallel
    print(f"\nTeacher rollouts ahead of training: an engine takes {ranks} GPUs, {_parts(parts)} GiB of each")


def _refusal(ranks: int, gpu: str, misses: list[Plan], nearest: Plan | None) -> str:
    closest = min(misses, key=lambda plan: sum(plan.missing.values()), default=None)
    why = closest.worst_problem if closest else "models, ranks and batch divide in none"
    if nearest is None:
        return f"no layout fits {ranks} x {gpu}, nor on any number of them that was tried. {why}"
    settings = " ".join(f"{name}={json.dumps(value)}" for name, value in nearest.setup.settings().items())
    return f"no layout fits {ranks} x {gpu}. {why}. The nearest that fits takes {nearest.setup.ranks}: {settings}"


def _show_assumptions() -> int:
    from megatron_sgopd.cluster.hardware import assumptions

    table = Table()
    for heading in ("assumed", "value", "of or for"):
        table.add_column(heading)
    for name, value, meaning in assumptions():
        table.add_row(name, f"{value:g}", meaning)
    Terminal(soft_wrap=False).print(table)
    return 0

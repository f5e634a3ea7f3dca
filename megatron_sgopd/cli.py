"""megatron-sgopd COMMAND …: the command line."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sgopd import __version__
from megatron_sgopd.arguments import add_set
from megatron_sgopd.checkpoint.commands import add_commands
from megatron_sgopd.checkpoint.completeness import newest_step
from megatron_sgopd.cluster.command import add_commands as add_planning
from megatron_sgopd.common.console import printable_output
from megatron_sgopd.common.data_files import read_json
from megatron_sgopd.compare.command import add_command as add_compare
from megatron_sgopd.errors import ConfigError, Unavailable
from megatron_sgopd.evaluation.command import add_command as add_eval
from megatron_sgopd.monitor.attempts import OUTCOMES, read_attempts
from megatron_sgopd.monitor.diagnosis import diagnosis
from megatron_sgopd.monitor.output import EXIT_STOPPED, LOGS, SUMMARY, claimed, run_folder
from megatron_sgopd.precision.command import add_command as add_noise_floor
from megatron_sgopd.processes import (
    NO_HUB,
    RUN_HELD,
    SAFE_PATH,
    STOP_SIGNALS,
    adopt_slurm_ranks,
    die_with_parent,
    end_with_rank,
    hold_stop_signals,
)
from megatron_sgopd.report.command import add_command as add_report
from megatron_sgopd.requeue import add_command as add_requeue
from megatron_sgopd.rollout.command import add_command as add_teacher_rollouts
from megatron_sgopd.rollout.data_command import add_command as add_check_data
from megatron_sgopd.status import add_command as add_status

if TYPE_CHECKING:
    from megatron_sgopd.config import Recipe

BAD_INPUT = 2
_LOCAL = ["--rdzv-backend=c10d", "--rdzv-conf=store_type=file", "--local-addr=127.0.0.1"]
_LOCAL_ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "lo"}
"""torchrun's ranks find each other without a port that is open to other machines."""
_LONGEST_STOP = 24 * 3600
"""Seconds after a signal that ranks may take to save: they know best, and who is in haste kills them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; bad input gives one message on stderr and exit code 2."""
    os.environ.update(NO_HUB | os.environ)
    with printable_output():
        return _run(_parser().parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # third parties'; python -W default shows them
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no CUDA
    try:
        return arguments.run(arguments)
    except ConfigError as error:
        print(f"megatron-sgopd: {error}", file=sys.stderr)
        return BAD_INPUT
    except Unavailable as error:
        print(f"megatron-sgopd: {error}", file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        return 130
    except Exception:  # here and not by the interpreter, so that it is printable too
        traceback.print_exc()
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-sgopd", description="Sign-gated on-policy distillation on Megatron-Core."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    train = commands.add_parser(
        "train",
        help="train a student by a recipe",
        description="Check a recipe, then train by it. A run folder that was trained by the same recipe goes on "
        "from its last checkpoint. Under torchrun or srun the ranks found there are used; otherwise as many "
        "processes as parallel.ranks are started on this machine.",
        epilog="Example: megatron-sgopd train examples/arithmetic_cpu/recipe.yaml --set train.steps=20",
    )
    train.add_argument("recipe", metavar="RECIPE", help="YAML file; see examples/")
    add_set(train)
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print the resolved recipe, the first prompt as the student reads it and the Megatron "
        "command line, and stop",
    )
    train.set_defaults(run=_train)
    add_check_data(commands)
    add_teacher_rollouts(commands)
    add_eval(commands)
    add_compare(commands)
    add_planning(commands)
    add_noise_floor(commands)
    add_report(commands)
    add_status(commands)
    add_requeue(commands)
    add_commands(commands)
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from megatron_sgopd.recipe import (
        as_command,
        check_recipe,
        load_recipe,
        megatron_arguments,
        remarks,
        resolved_text,
        write_resolved,
    )

    is_rank = "RANK" in os.environ or "SLURM_PROCID" in os.environ
    if is_rank and not arguments.dry_run:
        hold_stop_signals()
    recipe = load_recipe(arguments.recipe, arguments.set)
    inputs = check_recipe(recipe)
    flags = megatron_arguments(recipe, inputs)
    if arguments.dry_run:
        print(resolved_text(recipe))
        for said in (*remarks(recipe), *inputs.remarks):
            print(f"# {said}")
        first = inputs.train[0]
        print(f"# first prompt, {len(first.token_ids)} tokens, as the student reads it: {first.text!r}\n")
        print(as_command(flags, recipe.parallel.ranks))
        return 0
    if is_rank:
        return _train_as_rank(recipe, flags)
    if _is_finished(recipe):
        return 0
    with claimed(run_folder(recipe)):  # until the ranks have ended
        write_resolved(recipe)
        return _launch(flags, recipe.parallel.ranks, Path(recipe.run_dir))


def _is_finished(recipe: Recipe) -> bool:
    """Whether the run folder has all steps of its recipe already; shows what came of them."""
    path = Path(recipe.run_dir) / SUMMARY
    summary = read_json(path) if path.exists() else {"steps": 0}
    if summary["steps"] < recipe.train.steps or newest_step(path.parent / "checkpoints") < recipe.train.steps:
        return False
    rates = ", ".join(f"{name} {summary[name]:.1%}" for name in ("before", "after", "teacher") if summary[name])
    print(
        f"{recipe.run_dir} has all its {summary['steps']} steps already (held-out pass rate: {rates or 'none taken'})."
    )
    print(
        "To train on, raise train.steps (where train.schedule is constant). To train again, remove the folder, or "
        "choose another with --set run_dir=DIR."
    )
    return True


def _train_as_rank(recipe: Recipe, flags: Sequence[str]) -> int:
    """Train in this process, one of the ranks that torchrun or srun started."""
    from megatron_sgopd.pretrain import main as pretrain
    from megatron_sgopd.recipe import write_resolved

    os.environ.update(SAFE_PATH)  # for what Megatron and vLLM start
    adopt_slurm_ranks()
    if int(os.environ["WORLD_SIZE"]) != recipe.parallel.ranks:
        raise ConfigError(
            f"the launcher started {os.environ['WORLD_SIZE']} processes, but parallel.ranks={recipe.parallel.ranks}: "
            "make them equal"
        )
    sys.argv[1:] = flags
    return pretrain(lambda: write_resolved(recipe))


def _launch(flags: Sequence[str], ranks: int, run_dir: Path) -> int:
    """Start the ranks on this machine, wait, and show the first rank's error if there is one.

    A signal that asks to stop is handed on once; the ranks save at their next safe point.
    """
    logs = run_dir / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    for stale in logs.glob("*.error"):
        stale.unlink()
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", *_LOCAL]
    command += [f"--shutdown-timeout={_LONGEST_STOP}", f"--signals-to-handle={','.join(s.name for s in STOP_SIGNALS)}"]
    with (logs / "launcher.log").open("w") as launcher_log:
        process = subprocess.Popen(
            [*command, "-m", "megatron_sgopd.pretrain", *flags],
            stderr=launcher_log,
            start_new_session=True,  # Ctrl-C reaches every process of a session's terminal; it is to be handed on once
            preexec_fn=die_with_parent,
            env={"OMP_NUM_THREADS": threads, **os.environ, **_LOCAL_ENVIRONMENT, **SAFE_PATH, RUN_HELD: str(run_dir)},
        )
        code = _wait_handing_signals_on(process)
    if code == 0:
        return 0
    last = read_attempts(run_dir)[-1:]
    if last and last[0].outcome == OUTCOMES[EXIT_STOPPED]:
        print(f"megatron-sgopd: {last[0].reason}; {last[0].reached} are saved, and the same command goes on from there")
        return EXIT_STOPPED
    said = diagnosis(run_dir) or f"the ranks ended with exit code {code}, without a word: see {logs}/launcher.log"
    print(f"megatron-sgopd: {said}\nThe whole output of each rank is in {logs}/rank-*.log", file=sys.stderr)
    return 1


def _wait_handing_signals_on(process: subprocess.Popen[bytes]) -> int:
    """The exit code of the launcher, which gets the first signal that asks to stop; a second one kills it."""
    asked = False

    def hand_on(number: int, _: Any) -> None:
        nonlocal asked
        if asked:
            process.kill()
        else:
            print("megatron-sgopd: saving at the next safe point; the same signal again stops at once", flush=True)
            process.send_signal(number)
        asked = True

    for number in STOP_SIGNALS:
        signal.signal(number, hand_on)
    return process.wait()


end_with_rank()
if __name__ == "__main__":
    sys.exit(main())

"""`megatron-sgopd eval`: its arguments."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_sgopd.arguments import add_prompt_text, add_set


def add_command(commands: Any) -> None:
    """Add the command to the command line."""
    command = commands.add_parser(
        "eval",
        help="score a model on held-out problems",
        description="Sample responses to problems, verify them, and report avg@k, pass@k and maj@k with 95 % "
        "intervals over problems. MODEL is a Hugging Face folder, a Megatron checkpoint, or a run folder of this "
        "project, whose recipe then gives problems, verifier and limits. Every response is kept; an evaluation that "
        "was stopped goes on when it is started again. Under torchrun or srun the ranks share the problems out.",
        epilog="Example: megatron-sgopd eval runs/demo --samples 16 --out runs/demo/eval",
    )
    command.add_argument("model", type=Path, metavar="MODEL", help="model, checkpoint or run folder")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for results and responses")
    command.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="problems: .jsonl, .parquet or a folder, with the columns of a public data set (docs/data.md); may be "
        "given several times (the recipe's data.heldout)",
    )
    command.add_argument("--recipe", type=Path, metavar="RECIPE", help="whose settings count (a run folder's own)")
    add_set(command)
    command.add_argument("--step", type=int, metavar="N", help="checkpoint of a run to take (the newest)")
    command.add_argument(
        "--samples", type=int, metavar="N", help="responses to each problem (the recipe's evaluate.samples, or 8)"
    )
    command.add_argument("--k", metavar="K,K", help="of pass@k and maj@k (powers of two up to --samples)")
    command.add_argument("--temperature", type=float, metavar="T", help="of the sampling (the recipe's, or 1.0)")
    command.add_argument("--top-p", type=float, metavar="P", help="share of likeliest tokens (the recipe's, or 1.0)")
    command.add_argument("--top-k", type=int, metavar="N", help="likeliest tokens, 0: all (the recipe's, or 0)")
    command.add_argument(
        "--stop", action="append", metavar="TEXT", help="ends a response; may be given several times (the recipe's)"
    )
    command.add_argument("--max-new-tokens", type=int, metavar="N", help="limit of a response (the recipe's, or 1024)")
    command.add_argument("--verifier", metavar="NAME", help="math, task, exact or import.path:function (math)")
    command.add_argument("--tensor-parallel", type=int, metavar="N", help="ranks that share a replica (1)")
    add_prompt_text(command, of="--data")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (0)")
    command.add_argument(
        "--contamination",
        action="append",
        default=[],
        metavar="FILE",
        help="training prompts: name the problems that share a run of 13 words with one of them; phrases "
        "that many of them have do not count",
    )
    command.add_argument("--platform", choices=["auto", "cpu", "cuda"], help="hardware to run on (auto)")
    command.set_defaults(run=_eval)


def _eval(arguments: argparse.Namespace) -> int:
    from megatron_sgopd.evaluation.offline import evaluate

    return evaluate(arguments)

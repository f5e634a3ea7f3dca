"""`megatron-sgopd compare`: its arguments."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_sgopd.arguments import add_set


def add_command(commands: Any) -> None:
    """Add the command to the command line."""
    command = commands.add_parser(
        "compare",
        help="train by several methods and seeds, and tell what can be told apart",
        description="Train by a recipe once for each variant and seed, with the same prompts, and write a table: held-"
        "out pass rate with its interval, paired difference to a baseline, seconds and tokens. With --learning-rates "
        "each variant first gets its own from the same small sweep, on seeds of its own and half of the problems, "
        "which the table leaves out; a sweep that ends at an edge goes on. Cells that are finished are kept when the "
        "command is started again; one that fails does not stop the others.",
        epilog="Example: megatron-sgopd compare recipe.yaml --methods sgopd,opd,grpo --seeds 5 --out runs/compare",
    )
    command.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML file; see examples/")
    command.add_argument(
        "--methods", default="", metavar="NAME,NAME", help="variants that differ in sgopd.method alone"
    )
    command.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME:SET[,SET]",
        help="another variant, by settings as of --set; may be given several times",
    )
    command.add_argument("--baseline", metavar="NAME", help="what differences are taken to (opd, else the first)")
    command.add_argument("--seeds", type=int, default=5, metavar="N", help="runs of each variant (5)")
    command.add_argument(
        "--learning-rates", default="", metavar="LR,LR", help="sweep: each variant takes the one that did best"
    )
    command.add_argument("--sweep-seeds", type=int, default=2, metavar="N", help="runs of each learning rate (2)")
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at a time, which share the cores (1)")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the cells' run folders")
    command.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="the table as Markdown (OUT/RESULTS.md); finished cells are kept beside it (.json), and not run again",
    )
    command.add_argument(
        "--again", type=int, default=0, metavar="N", help="run N kept cells once more: the same must come of them"
    )
    add_set(command)
    command.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    from megatron_sgopd.compare.cells import compare

    return compare(arguments)

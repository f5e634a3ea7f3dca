"""Command line arguments that several commands have."""

from __future__ import annotations

import argparse


def add_set(parser: argparse.ArgumentParser) -> None:
    """Add `--set`, as `load_recipe` takes its overrides."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change one setting of the recipe; may be given several times",
    )

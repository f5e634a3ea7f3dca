"""`megatron-sgopd report`: its arguments."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_sgopd.errors import ConfigError


def add_command(commands: Any) -> None:
    """Add the command to the command line."""
    command = commands.add_parser(
        "report",
        help="show one or many runs as one HTML page, down to single tokens",
        description="Write one HTML file about the given runs that needs no network: learning curves with intervals, "
        "what the gate did, where the time went, alarms, and a viewer of sampled responses whose tokens are coloured "
        "by the gate's verdict. Runs that differ in seed and run_dir alone share one curve. A run may still be going "
        "on; with --live the page is served on this machine alone, and follows it.",
        epilog="Example: megatron-sgopd report runs/compare/cells/*/*  ·  To see a job on a cluster's node: "
        "megatron-sgopd report --live RUN there, ssh -L 8765:localhost:8765 NODE here, then open the address that it "
        "printed.",
    )
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders (run_dir of a recipe)")
    command.add_argument("--out", type=Path, metavar="FILE", help="the page (RUN/report.html; of many: report.html)")
    command.add_argument("--live", action="store_true", help="serve the page and keep it up to date, until Ctrl-C")
    command.add_argument("--port", type=int, default=8765, metavar="N", help="port of --live (8765); 0: any free one")
    command.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from megatron_sgopd.report.live import serve
    from megatron_sgopd.report.page import write_page

    if arguments.live:
        if arguments.out:
            raise ConfigError("--out and --live exclude each other: a served page is not written to a file")
        serve(arguments.runs, arguments.port)
        return 0
    out = arguments.out or (arguments.runs[0] / "report.html" if len(arguments.runs) == 1 else Path("report.html"))
    size = write_page(arguments.runs, out)
    print(f"report: {out} ({size / 2**20:.1f} MiB), opens in any browser")
    return 0

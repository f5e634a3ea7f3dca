"""Running the cells of a comparison, each a training run of its own, and collecting what they say."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from megatron_sgopd.checkpoint.files import write_atomically
from megatron_sgopd.common.data_files import read_bytes, read_json
from megatron_sgopd.compare.table import (
    Cell,
    Variant,
    best_rate,
    beyond_edge,
    results_table,
    sweep_table,
    verdict,
)
from megatron_sgopd.config import as_dict
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.monitor.lines import read_json_lines
from megatron_sgopd.monitor.output import EVALUATIONS, METRICS, SUMMARY, run_folder
from megatron_sgopd.processes import SAFE_PATH, die_with_parent
from megatron_sgopd.recipe import check_recipe, check_run_dir, load_recipe

FIRST_SEED, FIRST_SWEEP_SEED = 1, 1001
"""Of the runs that are reported, and of those that only choose a learning rate."""

_SAYS_NOTHING = ("run_dir", "private", "platform", "logging")
"""Sections of a recipe that change nothing of what comes of a run."""
_MOST_EXTENSIONS = 4
"""Times that a sweep goes on beyond its edge."""


@dataclass(frozen=True)
class Job:
    """A run to do: a cell of the table, or of the sweep."""

    variant: str
    settings: tuple[str, ...]
    """As of --set."""
    learning_rate: float | None
    """None: the recipe's."""
    seed: int
    folder: Path
    identity: str
    """Digest of its whole recipe, wherever it is run."""


def compare(arguments: argparse.Namespace) -> int:
    """Run the command; 1 if a cell failed. Raises ConfigError at bad input, before the first cell."""
    variants = _variants(arguments)
    baseline = arguments.baseline or ("opd" if "opd" in variants else next(iter(variants)))
    if baseline not in variants:
        raise ConfigError(f"--baseline {baseline!r} is not among the variants: {', '.join(variants)}")
    grid = _grid(arguments.learning_rates)
    learning_rates = _check(arguments, variants)
    results = arguments.results or arguments.out / "RESULTS.md"
    runner = _Runner(arguments, results.with_suffix(".json"))
    rates: dict[str, dict[float, list[float]]] = {}
    if grid:
        rates = _sweep(runner, variants, grid, arguments)
    chosen = {name: best_rate(found) for name, found in rates.items()}
    jobs = [
        runner.job(name, settings, chosen.get(name), FIRST_SEED + offset, "cells")
        for offset in range(arguments.seeds)
        for name, settings in variants.items()
    ]
    cells = runner.run(jobs)
    if arguments.again:
        return runner.again([job for job, cell in zip(jobs, cells, strict=True) if cell is not None][: arguments.again])
    if grid:  # on the other half the learning rates were chosen
        cells = [cell and dataclasses.replace(cell, by_problem=cell.by_problem[1::2]) for cell in cells]
    found = [
        Variant(
            name,
            chosen.get(name) or learning_rates[name],
            tuple(cell for job, cell in zip(jobs, cells, strict=True) if job.variant == name and cell is not None),
            sum(job.variant == name and cell is None for job, cell in zip(jobs, cells, strict=True)),
        )
        for name in variants
    ]
    if not next(variant for variant in found if variant.name == baseline).cells:
        print(f"megatron-sgopd: every run of the baseline {baseline} failed: see {arguments.out}", file=sys.stderr)
        return 1
    text = _results(arguments, found, rates, baseline)
    write_atomically(results, text.encode())
    print(text)
    print(f"compare: written to {results}")
    return 1 if any(cell is None for cell in cells) else 0


def _variants(arguments: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """Settings by name."""
    variants: dict[str, tuple[str, ...]] = {
        name: (f"sgopd.method={name}",) for name in arguments.methods.split(",") if name
    }
    for text in arguments.variant:
        name, separator, settings = text.partition(":")
        if not (name and separator):
            raise ConfigError(f"--variant {text!r} is not of the form NAME:SET[,SET]")
        variants[name] = tuple(setting for setting in settings.split(",") if setting)
    if len(variants) < 2:
        raise ConfigError("a comparison needs at least two variants: give --methods NAME,NAME or --variant")
    return variants


def _check(arguments: argparse.Namespace, variants: dict[str, tuple[str, ...]]) -> dict[str, float]:
    """Check each variant's recipe as training would, and that all are held to the same problems.

    Returns:
        Their own learning rates.
    """
    learning_rates, held_out = {}, {}
    for name, settings in variants.items():
        recipe = load_recipe(arguments.recipe, [*arguments.set, *settings, f"run_dir={arguments.out}/check"])
        learning_rates[name] = recipe.train.learning_rate
        held_out[name] = [(prompt.text, prompt.answer) for prompt in check_recipe(recipe).heldout or ()]
    first = next(iter(held_out))
    for name, problems in held_out.items():
        if not problems or problems != held_out[first]:
            raise ConfigError(
                f"variant {name!r} has other held-out problems than {first!r}, or none: without the same data.heldout "
                "they cannot be compared"
            )
    return learning_rates


def _grid(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",") if word]
    except ValueError:
        raise ConfigError(f"--learning-rates {text!r} is not of the form 1e-4,3e-4") from None


def _sweep(
    runner: _Runner, variants: dict[str, tuple[str, ...]], grid: Sequence[float], arguments: argparse.Namespace
) -> dict[str, dict[float, list[float]]]:
    """Pass rates of each variant at each learning rate, on every second problem. A variant whose best one is the least
    or the greatest that it has tried goes on there."""
    rates: dict[str, dict[float, list[float]]] = {name: {rate: [] for rate in grid} for name in variants}
    wanted = {name: list(grid) for name in variants}
    for _ in range(1 + _MOST_EXTENSIONS):
        jobs = [
            runner.job(name, variants[name], rate, FIRST_SWEEP_SEED + offset, "sweep")
            for offset in range(arguments.sweep_seeds)
            for name, wanted_rates in wanted.items()
            for rate in wanted_rates
        ]
        for job, cell in zip(jobs, runner.run(jobs), strict=True):
            assert job.learning_rate is not None
            found = rates[job.variant].setdefault(job.learning_rate, [])
            if cell is not None:
                found.append(float(np.mean(cell.by_problem[::2])))
        wanted = {name: [beyond] for name, found in rates.items() if (beyond := beyond_edge(found)) is not None}
        if not wanted:
            break
    return rates


class _Runner:
    """Runs jobs, some at a time, and says how far they are."""

    def __init__(self, arguments: argparse.Namespace, kept: Path) -> None:
        """Cells that `kept` has need not be run; those that are run are added to it."""
        self._kept_in, self._kept = kept, _read_kept(kept)
        self._recipe, self._overrides = arguments.recipe, arguments.set
        self._jobs, self._out = arguments.jobs, arguments.out
        self._lock = threading.Lock()

    def job(self, variant: str, settings: tuple[str, ...], rate: float | None, seed: int, kind: str) -> Job:
        """A job in its folder."""
        parts = [kind, variant, *([] if kind == "cells" else [f"lr_{rate:g}"]), f"seed_{seed}"]
        job = Job(variant, settings, rate, seed, self._out.joinpath(*parts), "")
        whole = as_dict(load_recipe(self._recipe, self._settings(job)))
        said = {name: value for name, value in whole.items() if name not in _SAYS_NOTHING}
        text = json.dumps(said, sort_keys=True)
        return dataclasses.replace(job, identity=hashlib.blake2b(text.encode(), digest_size=16).hexdigest())

    def run(self, jobs: Sequence[Job]) -> list[Cell | None]:
        """Run those that are not finished; None stands for one that failed.

        Raises:
            ConfigError: one was run before with other settings.
        """
        for job in jobs:
            check_run_dir(load_recipe(self._recipe, self._settings(job)))
        started, done = time.monotonic(), 0
        todo = sum(self._finished(job) is None for job in jobs)
        if todo < len(jobs):
            print(f"compare: {len(jobs) - todo} of {len(jobs)} runs are finished already", flush=True)

        def one(job: Job) -> Cell | None:
            nonlocal done
            cell = self._finished(job)
            if cell is not None:
                with self._lock:
                    self._keep(job, cell)
                return cell
            code = self._train(job)
            cell = self._finished(job)
            with self._lock:
                done += 1
                if cell is not None:
                    self._keep(job, cell)
                left = timedelta(seconds=round((time.monotonic() - started) / done * (todo - done)))
                said = f"pass rate {cell.pass_rate:.1%}, {cell.seconds:.0f} s" if cell else f"FAILED, code {code}"
                print(f"compare: {done}/{todo} {job.folder.relative_to(self._out)}: {said}, left {left}", flush=True)
            return cell

        with ThreadPoolExecutor(self._jobs) as pool:
            return list(pool.map(one, jobs))

    def again(self, jobs: Sequence[Job]) -> int:
        """Run jobs that are finished once more, and say whether the same comes of it; 1 if not."""
        different = 0
        for job in jobs:
            known = self._finished(job)
            once_more = dataclasses.replace(job, folder=self._out / "again" / job.folder.relative_to(self._out))
            if _of_folder(once_more) is None:
                self._train(once_more)
            cell = _of_folder(once_more)
            same = known is not None and cell is not None and cell.by_problem == known.by_problem
            different += not same
            said = "the same" if same else "DIFFERENT"
            print(f"compare: {job.variant}, seed {job.seed}, once more: {said}", flush=True)
        return int(different > 0)

    def _finished(self, job: Job) -> Cell | None:
        """What a run says, or has said where it was kept; None if it has not ended."""
        return _of_folder(job) or self._kept.get(job.identity)

    def _keep(self, job: Job, cell: Cell) -> None:
        if job.identity in self._kept:
            return
        self._kept[job.identity] = cell
        lines = [f'"{name}": {json.dumps(dataclasses.asdict(one))}' for name, one in sorted(self._kept.items())]
        self._kept_in.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._kept_in, ("{\n" + ",\n".join(lines) + "\n}\n").encode())

    def _settings(self, job: Job) -> list[str]:
        settings = [*self._overrides, *job.settings, f"train.seed={job.seed}", f"run_dir={job.folder}"]
        return settings + [f"train.learning_rate={job.learning_rate!r}"] * (job.learning_rate is not None)

    def _train(self, job: Job) -> int:
        command = [sys.executable, "-m", "megatron_sgopd.cli", "train", str(self._recipe)]
        for setting in self._settings(job):
            command += ["--set", setting]
        run_folder(load_recipe(self._recipe, self._settings(job)))
        threads = max(1, len(os.sched_getaffinity(0)) // self._jobs)
        with (job.folder / "compare.log").open("a") as log:
            return subprocess.run(
                command,
                stdout=log,
                stderr=log,
                check=False,
                preexec_fn=die_with_parent,
                env={"OMP_NUM_THREADS": str(threads), **os.environ, **SAFE_PATH},
            ).returncode


_KEPT = TypeAdapter(dict[str, Cell])


def _read_kept(path: Path) -> dict[str, Cell]:
    """Finished cells by their identity."""
    if not path.is_file():
        return {}
    try:
        return _KEPT.validate_json(read_bytes(path))
    except ValidationError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not as compare writes it ({reason}): move it away") from None


def _of_folder(job: Job) -> Cell | None:
    """What a run says in its folder; None if it has not ended."""
    if not (job.folder / SUMMARY).is_file():
        return None
    summary = read_json(job.folder / SUMMARY)
    *_, after = (line for line in read_json_lines(job.folder / EVALUATIONS) if line["name"] == "after")
    tokens = sum(step["tokens"] for step in read_json_lines(job.folder / METRICS))
    return Cell(job.seed, tuple(after["by_problem"]), summary["seconds"], tokens)


def _results(
    arguments: argparse.Namespace,
    variants: Sequence[Variant],
    rates: dict[str, dict[float, list[float]]],
    baseline: str,
) -> str:
    """RESULTS.md."""
    problems = len(next(cell.by_problem for variant in variants for cell in variant.cells))
    lines = [
        f"# {arguments.recipe}: variants side by side",
        "",
        "```bash",
        _command(arguments),
        "```",
        "",
        f"Held-out pass rate after training, over {problems} problems, with its 95 % interval over seeds and problems; "
        "differences are paired by seed and problem. Intervals are Student's, with one degree of freedom fewer than "
        "seeds, and each stands for itself; the sentence below the table is corrected for their number. Seconds are "
        f"those of {arguments.jobs} run(s) at a time on {os.cpu_count()} CPU cores.",
        "",
        *results_table(variants, baseline),
        "",
        verdict(variants, baseline),
    ]
    if rates:
        lines += [
            "",
            f"Each variant's learning rate is the one that did best in the same sweep, on {arguments.sweep_seeds} "
            "seed(s) and as many problems that are not among those above; where the best was the least or the "
            "greatest, the sweep went on:",
            "",
            *sweep_table(rates),
        ]
    return "\n".join(lines) + "\n"


def _command(arguments: argparse.Namespace) -> str:
    """What makes the table again."""
    words = ["megatron-sgopd", "compare", str(arguments.recipe)]
    for flag, value in (
        ("--methods", arguments.methods),
        ("--baseline", arguments.baseline),
        ("--seeds", arguments.seeds),
        ("--learning-rates", arguments.learning_rates),
        ("--sweep-seeds", arguments.sweep_seeds if arguments.learning_rates else None),
        ("--jobs", arguments.jobs),
        ("--out", arguments.out),
    ):
        words += [flag, str(value)] if value else []
    for flag, values in (("--variant", arguments.variant), ("--set", arguments.set)):
        for value in values:
            words += [flag, value]
    return shlex.join(words)

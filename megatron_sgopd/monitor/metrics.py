"""What a run writes: metrics.jsonl, samples.jsonl, evaluations.jsonl, summary.json, TensorBoard, progress lines."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from rich.text import Text

from megatron_sgopd.checkpoint.files import write_atomically
from megatron_sgopd.common.console import styled
from megatron_sgopd.config import Settings
from megatron_sgopd.evaluation.protocol import MEASURED, differences, last_measured, measured_as
from megatron_sgopd.evaluation.scores import Responses, as_json, powers_of_two, scores
from megatron_sgopd.monitor.lines import (
    append_json_line,
    drop_later_steps,
    halve_steps,
    last_json_lines,
    read_json_lines,
)
from megatron_sgopd.monitor.output import EVALUATIONS, METRICS, SAMPLES, SUMMARY, console
from megatron_sgopd.rollout.trajectory import from_first_rank

_OFTEN_CLIPPED = 0.5
"""Share of the updates from which on a person is told."""


class Monitor:
    """Rank 0 writes files and progress; Megatron's TensorBoard and W&B writers live on the last rank."""

    def __init__(self, settings: Settings, start_step: int, train_steps: int) -> None:
        """Go on in the run folder after `start_step` steps. Later lines, of steps that are done again, are cut off; but
        for sampled responses they are kept in `….superseded.jsonl`."""
        self._folder = Path(settings.run_dir)
        self._writes = dist.get_rank() == 0
        self._start_step, self._train_steps = start_step, train_steps
        self._seconds = 0.0
        self._console = console()
        self._sample_bytes = settings.logging.samples_mib << 20
        if self._writes:
            for name in (METRICS, EVALUATIONS):
                path = self._folder / name
                drop_later_steps(path, start_step, path.with_name(f"{path.stem}.superseded{path.suffix}"))
            drop_later_steps(self._folder / SAMPLES, start_step)

    def step(self, metrics: dict[str, Any]) -> None:
        """Record one step; `metrics` is the same on every rank and holds `step` and `seconds`."""
        self._seconds += metrics["seconds"]
        _to_megatron_writers(metrics)
        if self._writes:
            append_json_line(self._folder / METRICS, metrics)
            self._console.print(self._progress(metrics))

    def _progress(self, m: dict[str, Any]) -> Text:
        done = m["step"] - self._start_step
        left = self._seconds / done * (self._train_steps - m["step"])
        stages = sorted(m["stage_seconds"].items(), key=lambda item: -item[1])
        return styled(f"step {m['step']}/{self._train_steps}", "bold").append(
            f"  loss {m['loss']:+.4f}  pass {m['pass_rate']:.0%}  "
            f"agree {m['agree']:.0%}  KL {m.get('reverse_kl', 0):.3f}  {m['tokens_per_second']:.0f} tok/s  "
            f"{m['seconds']:.1f} s ({' '.join(f'{k} {v:.1f}' for k, v in stages[:4])})  "
            f"left {timedelta(seconds=round(left))}",
            style="not bold",
        )

    def samples(self, lines: Sequence[dict[str, Any]], shown: int = 3) -> None:
        """Keep some responses with their outcomes, and show the first of them."""
        if not self._writes:
            return
        path = self._folder / SAMPLES
        for line in lines:
            append_json_line(path, line)
        if lines and path.stat().st_size > self._sample_bytes:
            halve_steps(path)
        for line in lines[:shown]:
            mark = styled("right", "green") if line["outcome"] else styled(line["reason"], "red")
            # repr: on one line.
            self._console.print(" ", mark, f" {line['response']!r}  (answer {line['answer']!r})")

    def evaluation(self, name: str, step: int, responses: Responses, measured: dict[str, Any]) -> None:
        """Record the scores on the held-out problems: `before`, `teacher`, `step` or `after`.

        Args:
            measured: the protocol.
        """
        if not self._writes:
            return
        found = scores(responses, powers_of_two(responses.samples))
        average = found[f"avg@{responses.samples}"]
        line = {
            "name": name,
            "step": step,
            "pass_rate": average.mean,
            "problems": responses.problems,
            "samples": responses.samples,
            "scores": as_json(found),
            "by_problem": responses.outcomes_PN.mean(axis=1).tolist(),
            MEASURED: measured,
        }
        append_json_line(self._folder / EVALUATIONS, line)
        self._console.print(
            styled(name, "bold"),
            f"pass rate {average.mean:.1%} ({average.low:.1%} to {average.high:.1%}; "
            f"avg@{responses.samples} of {responses.problems} problems)",
        )

    def summary(self) -> None:
        """Write summary.json from the files of all attempts, and show the table."""
        if not self._writes:
            return
        stages: dict[str, float] = {}
        steps, total, clipped = 0, 0.0, 0.0
        for line in read_json_lines(self._folder / METRICS):
            steps, total, clipped = steps + 1, total + line["seconds"], clipped + line["grad_clipped"]
            for stage, seconds in line["stage_seconds"].items():
                stages[stage] = stages.get(stage, 0.0) + seconds
        lines = list(read_json_lines(self._folder / EVALUATIONS))
        alike = measured_as(lines, last_measured(lines))
        rates = {line["name"]: line["pass_rate"] for line in alike}
        summary = {
            **{name: rates.get(name) for name in ("before", "after", "teacher")},
            "steps": steps,
            "seconds": total,
            "stage_seconds": stages,
            "unexplained_share": 1 - sum(stages.values()) / total,
            "grad_clipped": clipped / steps,
        }
        write_atomically(self._folder / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
        self._console.print(_table(summary))
        if len(alike) < len(lines):
            self._console.print(
                f"{len(lines) - len(alike)} evaluations are left out, since they were measured otherwise than the last "
                f"one: {differences(lines[0][MEASURED], lines[-1][MEASURED])}"
            )
        if clipped > _OFTEN_CLIPPED * steps:
            self._console.print(
                f"the gradient was clipped in {clipped / steps:.0%} of all updates: there, train.clip_grad and the "
                "learning rate set an update's size, whatever the gradient's norm"
            )

    def last_metrics(self, names: Sequence[str]) -> dict[str, float]:
        """Those of the last step before this attempt, on every rank; without those that it did not have."""
        last = next(last_json_lines(self._folder / METRICS), {}) if self._writes else {}
        known = [math.nan if last.get(name) is None else last[name] for name in names]
        values = from_first_rank(torch.tensor(known, dtype=torch.float64)).tolist()
        return {name: value for name, value in zip(names, values, strict=True) if not math.isnan(value)}

    def note(self, text: str) -> None:
        """A plain line for the user, from rank 0."""
        if self._writes:
            self._console.print(text)


def _table(summary: dict[str, Any]) -> Table:
    table = Table(title=f"held-out pass rate after {summary['steps']} steps")
    for name in ("before", "after", "teacher"):
        table.add_column(name, justify="right")
    rates = [summary[name] for name in ("before", "after", "teacher")]
    table.add_row(*("-" if rate is None else f"{rate:.1%}" for rate in rates))
    return table


def _to_megatron_writers(metrics: dict[str, Any]) -> None:
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    tensorboard, wandb = get_tensorboard_writer(), get_wandb_writer()
    if tensorboard is None and wandb is None:
        return
    scalars = {f"sgopd/{name}": value for name, value in metrics.items() if isinstance(value, (int, float))}
    scalars |= {f"sgopd/seconds/{stage}": value for stage, value in metrics["stage_seconds"].items()}
    if tensorboard is not None:
        for name, value in scalars.items():
            tensorboard.add_scalar(name, value, metrics["step"])
    if wandb is not None:
        wandb.log(scalars, metrics["step"])

"""Time and peak memory of both forms of the log-probs against the naive one: forward and backward, float32, CPU.

    .venv/bin/python tools/bench/logprobs.py

Every measurement is a process of its own: it makes its inputs, runs the form once at a few tokens so that threads and
libraries are up, and then once for the record. Peak extra memory is the kernel's high-water mark of resident memory
(VmHWM in /proc/self/status) less what was resident before the call; it counts gradients and the matmul library's own
buffers too. (getrusage's ru_maxrss would not do: it starts at the parent's size.) The forms take turns and the fastest
repetition of each counts. The floor is the time of a form's matmuls alone, at the rate of a large one measured in the
same process. Meant for an idle machine: the naive form needs 16 GB at the default shapes.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch

from megatron_sgopd.models.logprobs import OutputHead, TeacherHead, fused_full_loss, fused_policy_loss, target_logprobs

MATMULS = {"naive": 3, "fused": 3, "recomputing": 4, "full": 4}
"""`full` is the loss over whole distributions, with a teacher of the same width: another loss, by the same means."""
FULL_MEMORY_LIMIT = 1.3
TIME_LIMIT = 1.1
MEMORY_LIMIT = 1 / 8
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Problem:
    """What is measured: fields as on the command line."""

    tokens: int
    hidden: int
    vocabulary: int
    chunk_tokens: int
    threads: int

    @property
    def naive_bytes(self) -> int:
        """Log-probs, their gradient and that of the logits, and the weight's."""
        return 4 * (3 * self.tokens * self.vocabulary + self.vocabulary * self.hidden)


@dataclass(frozen=True)
class Measurement:
    """One forward and backward pass of one form."""

    form: str
    seconds: float
    cpu_seconds: float
    floor_seconds: float
    peak_bytes: int
    grad_norms: tuple[float, float]
    """Of hidden states and weight: the forms must agree on them."""


def measure(form: str, problem: Problem) -> Measurement:
    torch.set_num_threads(problem.threads)
    generator = torch.Generator().manual_seed(0)
    # Logits of standard deviation 2, so that some tokens are likely and most are not.
    hidden_TH = torch.randn(problem.tokens, problem.hidden, generator=generator).requires_grad_()
    weight_VH = torch.randn(problem.vocabulary, problem.hidden, generator=generator)
    weight_VH.mul_(2 * problem.hidden**-0.5).requires_grad_()
    targets_T = torch.randint(problem.vocabulary, (problem.tokens,), generator=generator)
    coefficients_T = torch.randn(problem.tokens, generator=generator)

    teacher = None
    if form == "full":
        teacher_TH = torch.randn(problem.tokens, problem.hidden, generator=generator)
        teacher_VH = torch.randn(problem.vocabulary, problem.hidden, generator=generator)
        teacher_head = OutputHead(
            teacher_VH.mul_(2 * problem.hidden**-0.5), problem.vocabulary, None, problem.chunk_tokens
        )
        with torch.no_grad():
            q_T = target_logprobs(teacher_TH, teacher_head, targets_T)[0]
        teacher = TeacherHead(teacher_TH, teacher_head, q_T)

    def run(tokens: int) -> tuple[torch.Tensor, ...]:
        if teacher is not None:
            head = OutputHead(weight_VH, problem.vocabulary, None, problem.chunk_tokens)
            part = replace(teacher, hidden_TH=teacher.hidden_TH[:tokens], logprobs_T=teacher.logprobs_T[:tokens])
            loss = fused_full_loss(
                hidden_TH[:tokens],
                head,
                targets_T[:tokens],
                part,
                lambda logprobs_C, chunk: (torch.ones_like(logprobs_C), coefficients_T[chunk]),
            )[0]
            return torch.autograd.grad(loss, (hidden_TH, weight_VH))
        loss = _loss(form, hidden_TH[:tokens], weight_VH, targets_T[:tokens], coefficients_T, problem.chunk_tokens)
        return torch.autograd.grad(loss, (hidden_TH, weight_VH))

    run(WARM_UP_TOKENS)
    floor_seconds = MATMULS[form] * 2 * problem.tokens * problem.vocabulary * problem.hidden / _matmul_rate(problem)
    resident = _status_bytes("VmRSS")
    start, cpu_start = time.perf_counter(), time.process_time()
    grads = run(problem.tokens)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak_bytes = _status_bytes("VmHWM") - resident
    norm_hidden, norm_weight = (grad.norm().item() for grad in grads)
    return Measurement(form, seconds, cpu_seconds, floor_seconds, peak_bytes, (norm_hidden, norm_weight))


def _loss(
    form: str,
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_T: torch.Tensor,
    coefficients_T: torch.Tensor,
    chunk_tokens: int,
) -> torch.Tensor:
    """-sum_t c_t s_t."""
    head = OutputHead(weight_VH, len(weight_VH), None, chunk_tokens)
    coefficients_T = coefficients_T[: len(targets_T)]
    if form == "fused":
        return fused_policy_loss(hidden_TH, head, targets_T, lambda _, chunk: coefficients_T[chunk])[0]
    if form == "recomputing":
        return -torch.dot(coefficients_T, target_logprobs(hidden_TH, head, targets_T)[0])
    logprobs_TV = (hidden_TH @ weight_VH.T).log_softmax(-1)
    return -torch.dot(coefficients_T, logprobs_TV.gather(1, targets_T[:, None])[:, 0])


def _matmul_rate(problem: Problem) -> float:
    """FLOP/s of a product of the problem's kind that is large enough to run at full speed."""
    left, right = torch.ones(1024, problem.hidden), torch.ones(8192, problem.hidden)
    out = torch.empty(len(left), len(right))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(left, right.T, out=out)
        seconds.append(time.perf_counter() - start)
    return 2 * left.numel() * len(right) / min(seconds)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(f"/proc/self/status has no {field}")


def compare(problem: Problem, forms: Sequence[str], repetitions: int) -> list[Measurement]:
    """The fastest repetition of each form."""
    best: dict[str, Measurement] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as executor:
        for form in [*forms] * repetitions:
            new = executor.submit(measure, form, problem).result()
            print(f"{problem.vocabulary} {form}: {new.seconds:.1f} s", file=sys.stderr, flush=True)
            best[form] = min(best.get(form, new), new, key=lambda measurement: measurement.seconds)
            # float32 sums of thousands of terms in another order.
            first = best[forms[0]].grad_norms
            if form != "full" and not all(
                math.isclose(*pair, rel_tol=1e-4) for pair in zip(new.grad_norms, first, strict=True)
            ):
                raise ArithmeticError(f"norms of the gradients: {new.grad_norms} ({form}), {first} ({forms[0]})")
    return list(best.values())


def table(problem: Problem, measurements: Sequence[Measurement]) -> str:
    naive = next((one for one in measurements if one.form == "naive"), None)
    lines = [
        f"T {problem.tokens}, H {problem.hidden}, V {problem.vocabulary}, float32, {problem.threads} threads",
        f"{'form':<12} {'seconds':>8} {'floor':>8} {'CPU s':>8} {'x naive':>8} {'peak MB':>8} {'x naive':>8}",
    ]
    for one in measurements:
        time_ratio = one.seconds / naive.seconds if naive else math.nan
        memory_ratio = one.peak_bytes / naive.peak_bytes if naive else math.nan
        lines.append(
            f"{one.form:<12} {one.seconds:8.1f} {one.floor_seconds:8.1f} {one.cpu_seconds:8.1f} {time_ratio:8.2f}"
            f" {one.peak_bytes / 1e6:8.0f} {memory_ratio:8.3f}"
        )
        if naive and one.form == "fused":
            met = time_ratio <= TIME_LIMIT and memory_ratio <= MEMORY_LIMIT
            lines[0] += f"; fused within {TIME_LIMIT} x time and {MEMORY_LIMIT} x memory: {'yes' if met else 'NO'}"
    by_form = {one.form: one for one in measurements}
    if {"fused", "full"} <= by_form.keys():
        share = by_form["full"].peak_bytes / by_form["fused"].peak_bytes
        lines.append(f"full takes {share:.2f} x the memory of fused: {'yes' if share <= FULL_MEMORY_LIMIT else 'NO'}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="T")
    parser.add_argument("--hidden", type=int, default=1024, help="H")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[151936, 49152], help="each V to measure")
    parser.add_argument("--chunk-tokens", type=int, default=0, help="C; 0 (default) as the library chooses")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False), help="default: all cores")
    parser.add_argument("--repetitions", type=int, default=2, help="of each form")
    parser.add_argument("--forms", nargs="+", choices=list(MATMULS), default=list(MATMULS))
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    options = parser.parse_args()
    for vocabulary in options.vocabulary:
        problem = Problem(options.tokens, options.hidden, vocabulary, options.chunk_tokens, options.threads)
        available = psutil.virtual_memory().available
        if "naive" in options.forms and problem.naive_bytes > 0.95 * available:
            parser.error(
                f"the naive form needs {problem.naive_bytes / 1e9:.1f} GB at {problem.tokens} tokens and {vocabulary} "
                f"vocabulary rows, {available / 1e9:.1f} GB are free: pass fewer --tokens or --forms without naive"
            )
        measurements = compare(problem, options.forms, options.repetitions)
        if options.json:
            print(json.dumps(asdict(problem) | {"measurements": [asdict(one) for one in measurements]}))
        else:
            print(table(problem, measurements), flush=True)


if __name__ == "__main__":
    main()

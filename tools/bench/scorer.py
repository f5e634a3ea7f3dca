""".venv/bin/python tools/bench/scorer.py [--layers 8] [--rows 24] [--json]

Scoring by a frozen model, log-probs gathered and all, against a bare forward pass of the same Megatron model over the
same packed rows, logits included; how time grows with layers and rows, and memory with rows. One process at a time,
float32.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from reporting import Figure, parser, report

ROW_TOKENS, ROWS_PER_MICROBATCH, VOCABULARY, REPETITIONS = 256, 4, 8192, 5


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=8)
    arguments.add_argument("--rows", type=int, default=24)
    options = arguments.parse_args()
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29555")
    from megatron_models import each_layout

    with tempfile.TemporaryDirectory() as root:
        # Memory first and in processes of their own, which start with an empty heap.
        peaks = [_in_new_process(peak_of_scoring, root, options.layers, n * options.rows) for n in (1, 4)]
        for _ in each_layout(((1, 1, 1),)):
            figures = measure(Path(root), options.layers, options.rows)
    grown = Figure("peak memory of four times the rows over once", peaks[1] / peaks[0], "", 1.0, at_most=1.1)
    return report("scorer", [*figures, grown], options.json)


def _in_new_process(function: Callable[..., float], *arguments: Any) -> float:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def peak_of_scoring(root: str, layers: int, rows: int) -> float:
    """Bytes that scoring takes at most, beside the model and the rows themselves."""
    from megatron_models import each_layout

    for _ in each_layout(((1, 1, 1),)):
        from megatron_sgopd.platform import current

        one, batch = scorer(Path(root), layers), packed_rows(rows)
        before = current().memory_used()
        current().reset_peak_memory()
        one.score(batch, 1.0)
        peak = current().peak_memory() - before
    return float(peak)


def measure(root: Path, layers: int, rows: int) -> list[Figure]:
    shallow, once, twice = scorer(root, layers), packed_rows(rows), packed_rows(2 * rows)
    scored, alone = both(shallow, once)
    longer, _ = both(shallow, twice)
    deeper, _ = both(scorer(root, 2 * layers), once)
    return [
        Figure("scoring over a bare forward pass", scored / alone, "", 1.0, at_most=1.15),
        Figure("twice the rows over once", longer / scored, "", 2.0, at_least=1.7, at_most=2.3),
        Figure("twice the layers over once", deeper / scored, "", 2.0, at_least=1.7, at_most=2.3),
    ]


def scorer(root: Path, layers: int) -> Any:
    """Of a model with random weights."""
    from megatron_models import base_config
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from megatron_sgopd.models.architecture import read_architecture
    from megatron_sgopd.models.scorer import Scorer

    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
    )
    Qwen3ForCausalLM(config).save_pretrained(root / str(layers))
    architecture = read_architecture(root / str(layers))
    return Scorer(architecture, base_config(), 1, 1, False, 0)


def packed_rows(count: int) -> Any:
    """Two sequences a row, full."""
    import numpy as np

    from megatron_sgopd.rollout.packing import pack
    from megatron_sgopd.rollout.prompts import Prompt
    from megatron_sgopd.rollout.trajectory import Trajectory

    prompt, length = Prompt("p", "", tuple(range(32)), "", "", {}), ROW_TOKENS // 2 - 32
    drawn = np.random.default_rng(0).integers(0, VOCABULARY, (2 * count, length)).tolist()
    trajectories = [Trajectory(prompt, i, tuple(t), (0.0,) * length, False) for i, t in enumerate(drawn)]
    return pack(trajectories, ROW_TOKENS, 1, ROWS_PER_MICROBATCH, share_prompts=False)


def bare(model: Any, rows: Any) -> None:
    """A forward pass of all rows, to the logits of every token."""
    import torch
    from megatron.core import mpu

    from megatron_sgopd.models.microbatch import microbatches
    from megatron_sgopd.platform import current

    with torch.no_grad():
        for batch in microbatches(rows, 0, rows.rows, mpu.get_context_parallel_group()):
            model(
                batch.tokens_BL, batch.positions_BL, **current().packed_attention(batch.segments_BS, batch.responses_BS)
            )


def both(one: Any, rows: Any) -> tuple[float, float]:
    """Median seconds of scoring and of the bare pass, in turns."""
    one.score(rows, 1.0)  # the first is slow
    seconds: dict[str, list[float]] = {"scored": [], "bare": []}
    for _ in range(REPETITIONS):
        for name, run in (("scored", lambda: one.score(rows, 1.0)), ("bare", lambda: bare(one.model, rows))):
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return statistics.median(seconds["scored"]), statistics.median(seconds["bare"])


if __name__ == "__main__":
    sys.exit(main())

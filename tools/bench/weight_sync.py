""".venv/bin/python tools/bench/weight_sync.py [--layers 4] [--threads 1] [--json]

A weight sync of a model of half a gigabyte and more, digests on both sides and vLLM's own loading included, against a
copy of as many bytes in memory; an engine's later ones, since its first reads all rows. One process, float32, by
default of one thread, as a rank has that has a core. Medians of syncs, copies and parts in turns.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from reporting import Figure, parser, report

if TYPE_CHECKING:
    import torch

REPETITIONS = 15
_MEMORY = 256 << 20


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=4, help="of 28 (4)")
    arguments.add_argument("--threads", type=int, default=1, help="of the process (1)")
    options = arguments.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    from megatron_sgopd.platform import select

    select("cpu")
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29556")
    from megatron_models import each_layout
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=16000,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=options.layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=1024,
    )
    with tempfile.TemporaryDirectory() as root:
        Qwen3ForCausalLM(config).save_pretrained(root)
        for _ in each_layout(((1, 1, 1),)):
            took, nbytes = measure(root)
    seconds = {name: statistics.median(values) for name, values in took.items()}
    figures = [
        Figure("weights", nbytes / 1e6, "MB"),
        *(
            Figure(f"bandwidth of a {name} over a copy's", seconds["copy"] / seconds[name], "", 1.0, at_least=0.6)
            for name in ("sync", "sync by whole tensors")
        ),
        *(Figure(name, nbytes / value / 1e9, "GB/s") for name, value in seconds.items()),
    ]
    return report("weight_sync", figures, options.json)


def measure(folder: str) -> tuple[dict[str, list[float]], int]:
    """Seconds of a sync, of its parts and of a copy, in turns; bytes of the weights."""
    import torch
    from megatron_models import build, process_groups

    from megatron_sgopd.config import RolloutSettings
    from megatron_sgopd.models.architecture import read_architecture
    from megatron_sgopd.models.weights import export_weights, load_weights, shard_digests
    from megatron_sgopd.platform import current
    from megatron_sgopd.rollout.engine import RolloutEngine
    from megatron_sgopd.rollout.weight_sync import compared_rows, sync_student, sync_weights

    architecture = read_architecture(folder)
    model, groups = build(architecture), process_groups()
    load_weights(model, architecture, groups)
    engine = RolloutEngine(folder, RolloutSettings(cache_gib=0.1), 128, seed=0)
    flat = torch.cat([weight.data.flatten() for weight in model.parameters()])
    other = torch.empty_like(flat)

    def exported() -> Iterator[tuple[str, torch.Tensor]]:
        return export_weights(model, architecture, groups, _MEMORY)

    def gathered() -> None:
        rows = compared_rows(engine)
        sync_weights(engine, exported(), shard_digests(model, architecture, groups, rows), rows)

    runs: dict[str, Callable[[], object]] = {
        "sync": lambda: sync_student(engine, model, architecture, groups, _MEMORY),
        "sync by whole tensors": gathered,
        "digests": lambda: shard_digests(model, architecture, groups, compared_rows(engine)),
        "vLLM's loading": lambda: engine.load_weights(exported()),
        "copy": lambda: other.copy_(flat),
    }
    took: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(REPETITIONS + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            with current().plain_torch():
                run()
            if repetition:  # the first reads all rows
                took[name].append(time.perf_counter() - began)
    engine.close()
    return took, flat.nbytes


if __name__ == "__main__":
    sys.exit(main())

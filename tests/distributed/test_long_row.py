"""Rows that pass through a model as one long row give the numbers that they give one beside the other."""

from pathlib import Path
from typing import Any

import torch
from launch import run_ranks
from megatron_models import base_config, each_layout


def score_both_ways(models: str) -> None:
    from megatron_sgopd import platform
    from megatron_sgopd.models.architecture import read_architecture
    from megatron_sgopd.rollout.packing import pack
    from megatron_sgopd.rollout.prompts import Prompt
    from megatron_sgopd.rollout.trajectory import Trajectory

    generator = torch.Generator().manual_seed(0)
    prompt = Prompt("p", "", (1, 2, 3), "", "", {})
    lengths = (5, 30, 61, 17, 40, 2, 9)
    draw = [tuple(torch.randint(0, 250, (n,), generator=generator).tolist()) for n in lengths]
    trajectories = [Trajectory(prompt, i, tokens, (0.0,) * len(tokens), False) for i, tokens in enumerate(draw)]
    rows = pack(trajectories, 64, 4)
    for tensor, pipeline, _ in each_layout(((1, 1, 1), (1, 2, 1), (2, 1, 1))):
        from megatron_sgopd.models.scorer import Scorer
        from megatron_sgopd.platform.cpu import CpuPlatform

        class OneLongRow(CpuPlatform):
            """As the CPU, but laid out as on a GPU."""

            one_long_row = True

            def packed_attention(self, segment_ids_BS: torch.Tensor) -> dict[str, Any]:
                rows, length = segment_ids_BS.shape
                apart_BS = segment_ids_BS + length * torch.arange(rows)[:, None]
                return super().packed_attention(apart_BS.view(1, -1))

        architecture = read_architecture(Path(models) / "llama_untied")
        scorer = Scorer(
            architecture, base_config(), tensor, pipeline, offload=True, rows_per_microbatch=2, chunk_tokens=0
        )
        assert scorer.hosted is not None
        scorer.hosted.fetch("weights")
        usual, _ = scorer.score(rows, 1.0)
        before, platform._current = platform._current, OneLongRow()
        long, _ = scorer.score(rows, 1.0)
        platform._current = before
        scorer.hosted.release()
        assert usual.shape == (sum(lengths),) and bool((usual < 0).all())
        torch.testing.assert_close(long, usual, rtol=1e-5, atol=1e-5)  # float32 sums in another order


def test_the_numbers_are_the_same(tiny_models: dict[str, Path]) -> None:
    run_ranks(2, score_both_ways, str(next(iter(tiny_models.values())).parent))

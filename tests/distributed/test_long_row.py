"""However rows are laid out, tokens get the same log-probs: one long row, and several responses behind one prompt."""

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
    from megatron_sgopd.step import in_row_order

    generator = torch.Generator().manual_seed(0)
    prompt = Prompt("p", "", (1, 2, 3), "", "", {})
    lengths = (5, 30, 61, 17, 40, 2, 9)
    draw = [tuple(torch.randint(0, 250, (n,), generator=generator).tolist()) for n in lengths]
    trajectories = [Trajectory(prompt, i, tokens, (0.0,) * len(tokens), False) for i, tokens in enumerate(draw)]
    rows, shared = (pack(trajectories, 64, 2, 2, share_prompts) for share_prompts in (False, True))
    assert int(rows.responses_RS.max()) == 1 < int(shared.responses_RS.max())
    for tensor, pipeline, _ in each_layout(((1, 1, 1), (1, 2, 1), (2, 1, 1))):
        from megatron_sgopd.models.scorer import Scorer
        from megatron_sgopd.platform.cpu import CpuPlatform

        class OneLongRow(CpuPlatform):
            """As the CPU, but laid out as on a GPU."""

            one_long_row = True

            def packed_attention(self, segments_BS: torch.Tensor, responses_BS: torch.Tensor) -> dict[str, Any]:
                rows, length = segments_BS.shape
                apart_BS = segments_BS + length * torch.arange(rows)[:, None]
                return super().packed_attention(apart_BS.view(1, -1), responses_BS.view(1, -1))

        architecture = read_architecture(Path(models) / "llama_untied")
        scorer = Scorer(architecture, base_config(), tensor, pipeline, offload=True, chunk_tokens=0)
        assert scorer.hosted is not None
        scorer.hosted.fetch("weights")
        usual, _ = scorer.score(rows, 1.0)
        before, platform._current = platform._current, OneLongRow()
        long, _ = scorer.score(rows, 1.0)
        platform._current = before
        assert usual.shape == (sum(lengths),) and bool((usual < 0).all())
        torch.testing.assert_close(long, usual, rtol=1e-5, atol=1e-5)  # float32 sums in another order
        behind_one_prompt = in_row_order(scorer.score(shared, 1.0)[0][shared.trajectory_order()], rows)
        torch.testing.assert_close(behind_one_prompt, usual, rtol=1e-5, atol=1e-5)  # likewise
        scorer.hosted.release()


def test_the_numbers_are_the_same(tiny_models: dict[str, Path]) -> None:
    run_ranks(2, score_both_ways, str(next(iter(tiny_models.values())).parent))

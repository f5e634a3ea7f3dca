"""However rows are laid out, tokens get the same log-probs.

As one long row, with several responses behind one prompt, and split over context-parallel ranks.
"""

from pathlib import Path
from typing import Any

import torch
from launch import run_ranks
from megatron_models import base_config, each_layout

LENGTHS = (5, 30, 61, 17, 40, 2, 9)


def packed(share_prompts: bool, context: int) -> Any:
    from megatron_sgopd.rollout.packing import pack
    from megatron_sgopd.rollout.prompts import Prompt
    from megatron_sgopd.rollout.trajectory import Trajectory

    generator = torch.Generator().manual_seed(0)
    prompt = Prompt("p", "", (1, 2, 3), "", "", {})
    draw = [tuple(torch.randint(0, 250, (n,), generator=generator).tolist()) for n in LENGTHS]
    trajectories = [Trajectory(prompt, i, tokens, (0.0,) * len(tokens), False) for i, tokens in enumerate(draw)]
    return pack(trajectories, 64, 2, 2, share_prompts, context)


def score_all_ways(models: str) -> None:
    from megatron_sgopd import platform

    packings = {c: [packed(share_prompts, c) for share_prompts in (False, True)] for c in (1, 2)}
    for rows, shared in packings.values():
        assert int(rows.responses_RS.max()) == 1 < int(shared.responses_RS.max())
    found: dict[tuple[int, str], list[torch.Tensor]] = {}
    for tensor, pipeline, _ in each_layout(((1, 1, 1), (1, 2, 1), (2, 1, 1)), contexts=(1, 2)):
        from megatron.core.parallel_state import get_context_parallel_world_size

        from megatron_sgopd.models.architecture import read_architecture
        from megatron_sgopd.models.scorer import Scorer
        from megatron_sgopd.platform.cpu import CpuPlatform

        class OneLongRow(CpuPlatform):
            """As the CPU, but laid out as on a GPU."""

            one_long_row = True

            def packed_attention(
                self, segments_BS: torch.Tensor, responses_BS: torch.Tensor, context_group: Any = None
            ) -> dict[str, Any]:
                rows, length = segments_BS.shape
                apart_BS = segments_BS + length * torch.arange(rows)[:, None]
                return super().packed_attention(apart_BS.view(1, -1), responses_BS.view(1, -1), context_group)

        context = get_context_parallel_world_size()
        rows, shared = packings[context]
        for name in ("llama_untied", "qwen3_moe"):
            base = base_config(context_parallel_size=context)
            architecture = read_architecture(Path(models) / name)
            scorer = Scorer(architecture, base, tensor, pipeline, offload=True, chunk_tokens=0)
            assert scorer.hosted is not None
            scorer.hosted.fetch("weights")
            before = platform._current
            for way, laid_out in ((before, rows), (before, shared), (OneLongRow(), rows)):
                platform._current = way
                logprobs_T, _ = scorer.score(laid_out, 1.0)
                found.setdefault((context, name), []).append(logprobs_T[laid_out.trajectory_order()])
            platform._current = before
            scorer.hosted.release()
    assert [len(logprobs) for logprobs in found.values()] == [9, 9, 3, 3]
    for (_, name), logprobs in found.items():
        usual = found[1, name][0]
        assert usual.shape == (sum(LENGTHS),) and bool((usual < 0).all())
        for other in logprobs:  # float32 sums in another order
            torch.testing.assert_close(other, usual, rtol=1e-5, atol=1e-5)


def test_the_numbers_are_the_same(tiny_models: dict[str, Path]) -> None:
    run_ranks(2, score_all_ways, str(next(iter(tiny_models.values())).parent))

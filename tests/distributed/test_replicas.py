"""Replicas of the rollout engine know nothing of each other, whatever each of them has to do."""

from pathlib import Path

from launch import run_ranks

STUDENT = Path(__file__).parents[2] / "examples/arithmetic_cpu/models/student"


def check_replicas() -> None:
    from megatron_sgopd.platform import select

    select("cpu")
    import torch.distributed as dist

    from megatron_sgopd.config import RolloutSettings
    from megatron_sgopd.rollout.engine import RolloutEngine
    from megatron_sgopd.rollout.prompts import Prompt

    dist.init_process_group("gloo")
    engine = RolloutEngine(STUDENT, RolloutSettings(max_new_tokens=24, cache_gib=0.1), 64, seed=1)
    prompts = [Prompt(str(i), "", tuple(range(5 + i, 11 + i)), "", "", {}) for i in range(3)]
    sums, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda *arguments, **keywords: sums.append(all_reduce(*arguments, **keywords))
    # Two prompts for the first replica and one for the second; and none for the second, whose ranks must not wait.
    found = {count: engine.generate(prompts[:count], [2] * count, 1.0, run_seed=7, step=3) for count in (3, 1)}
    dist.all_reduce = all_reduce
    assert not sums, f"{len(sums)} sums over replicas: one of them that ends earlier would leave the others hanging"
    assert [(t.prompt.id, t.sample) for t in found[3]] == [(p.id, s) for p in prompts for s in range(2)]
    assert [t.token_ids for t in found[1]] == [t.token_ids for t in found[3][:2]]
    assert len({len(t.token_ids) for t in found[3]}) > 1, "else replicas could not fall out of step"


def test_a_replica_generates_without_the_others() -> None:
    run_ranks(2, check_replicas, timeout=200)

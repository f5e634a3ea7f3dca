"""Weights that are sent to a real vLLM engine arrive, and a sync that went wrong is noticed."""

from pathlib import Path

import pytest
from launch import run_ranks

STUDENT = Path(__file__).parents[2] / "examples/arithmetic_cpu/models/student"


def check_sync() -> None:
    from megatron_sgopd.platform import gpu_memory, select

    select("cpu")
    assert gpu_memory() is None  # whatever stands in for torch.cuda says
    import torch
    import torch.distributed as dist
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from megatron_sgopd.config import RolloutSettings
    from megatron_sgopd.errors import Alarm
    from megatron_sgopd.models.digests import tensor_digest
    from megatron_sgopd.rollout.engine import RolloutEngine
    from megatron_sgopd.rollout.prompts import Prompt
    from megatron_sgopd.rollout.weight_sync import compared_rows, sync_weights

    dist.init_process_group("gloo")
    engine = RolloutEngine(STUDENT, RolloutSettings(max_new_tokens=24, cache_gib=0.1), 64, seed=1)
    prompts = [Prompt(str(i), "", tuple(range(5 + i, 11 + i)), "", "", {}) for i in range(6)]
    model = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    weights = {name: tensor.float() for name, tensor in load_file(STUDENT / "model.safetensors").items()}

    # One kind of weight at a time, so that none can hide behind the others.
    generator = torch.Generator().manual_seed(0)
    for kind in ("embed_tokens", "layernorm", "q_norm", "k_norm", "model.norm", "_proj"):
        for name, tensor in weights.items():
            if kind in name:
                tensor += 0.05 * torch.randn(tensor.shape, generator=generator) * tensor.std().clamp(min=0.1)
        version, rows = engine.weight_version, compared_rows(engine)
        digests = {name: tensor_digest(tensor, rows) for name, tensor in weights.items()}
        sync_weights(engine, iter(weights.items()), digests, rows)
        assert engine.weight_version == version + 1
        model.load_state_dict(weights, strict=False)
        for temperature in (1.0, 0.7):
            for trajectory in engine.generate(prompts, [1] * len(prompts), temperature, run_seed=1, step=0):
                ids = torch.tensor([trajectory.prompt.token_ids + trajectory.token_ids])
                with torch.no_grad():
                    logprobs = (model(ids).logits[0, :-1] / temperature).log_softmax(-1).gather(1, ids[0, 1:, None])
                expected = logprobs[len(trajectory.prompt.token_ids) - 1 :, 0]
                gap = (torch.tensor(trajectory.behaviour_logprobs) - expected).abs().max()
                assert gap < 1e-4, (kind, temperature, float(gap))

    last = list(weights)[-1]
    for fault in ("stale", "missing", "unknown"):
        sent = dict(weights)
        if fault == "stale":
            sent[last] = load_file(STUDENT / "model.safetensors")[last].float()
        elif fault == "missing":
            del sent[last]
        else:
            del digests[last]
        with pytest.raises(Alarm, match=last):
            sync_weights(engine, iter(sent.items()), digests, rows)

    # What is sampled depends on run seed, step, prompt and sample, not on who is sampled beside it.
    together = engine.generate(prompts, [2] * len(prompts), 1.0, run_seed=7, step=3)
    alone = engine.generate(prompts[4:5], [2], 1.0, run_seed=7, step=3)
    assert [t.token_ids for t in together[8:10]] == [t.token_ids for t in alone]
    assert together[8].token_ids != together[9].token_ids or len(together[8].token_ids) < 3


def test_weights_arrive_and_faults_are_noticed():
    run_ranks(1, check_sync, timeout=200)

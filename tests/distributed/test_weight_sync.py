"""Weights that are sent to a real vLLM engine arrive, and a sync that went wrong is noticed."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from launch import run_ranks
from transformers import Qwen2Config, Qwen2ForCausalLM

STUDENT = Path(__file__).parents[2] / "examples/arithmetic_cpu/models/student"


def check_sync() -> None:
    """On two ranks, each with an engine of its own."""
    from functools import partial

    from megatron_sgopd.platform import current, gpu_memory, select
    from megatron_sgopd.platform.cpu import CpuPlatform
    from megatron_sgopd.platform.cuda import CudaPlatform, reload_weights

    select("cpu")
    assert gpu_memory("auto") is None  # whatever stands in for torch.cuda says
    import torch
    import torch.distributed as dist
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from megatron_sgopd.config import RolloutSettings
    from megatron_sgopd.errors import Alarm
    from megatron_sgopd.models.digests import tensor_digest
    from megatron_sgopd.rollout.engine import RolloutEngine
    from megatron_sgopd.rollout.prompts import Prompt
    from megatron_sgopd.rollout.trajectory import Decoding
    from megatron_sgopd.rollout.weight_sync import compared_rows, sync_weights

    dist.init_process_group("gloo")
    engine = RolloutEngine(STUDENT, RolloutSettings(max_new_tokens=24, cache_gib=0.1), 64, seed=1)
    assert not [name for name in engine._unregistered() if not name.endswith("_scale_cpu")], "of which no sync knows"
    planted = torch.arange(3.0)
    engine._llm.apply_model(lambda model: setattr(model.model, "planted", [planted]))
    engine._fresh = {name: tensor.clone() for name, tensor in engine._unregistered().items()}
    assert "model.planted.0" in engine._fresh and engine.lost_tensors() == []
    planted[1] = 0
    prompts = [Prompt(str(i), "", tuple(range(5 + i, 11 + i)), "", "", {}) for i in range(6)]
    model = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    weights = {name: tensor.float() for name, tensor in load_file(STUDENT / "model.safetensors").items()}

    # One kind of weight at a time, so that none can hide behind the others.
    generator = torch.Generator().manual_seed(0)
    loads = (CpuPlatform.load_engine_weights, CudaPlatform.load_engine_weights)
    for number, kind in enumerate(("embed_tokens", "layernorm", "q_norm", "k_norm", "model.norm", "_proj")):
        # As on a CPU, and as on a GPU, where vLLM may have to quantize them: its own code for that runs here too.
        current().load_engine_weights = partial(loads[number % 2], current())
        for name, tensor in weights.items():
            if kind in name:
                tensor += 0.05 * torch.randn(tensor.shape, generator=generator) * tensor.std().clamp(min=0.1)
        version, rows = engine.weight_version, compared_rows(engine)
        digests = {name: tensor_digest(tensor, rows) for name, tensor in weights.items()}
        if version == 0:
            with pytest.raises(Alarm, match=r"lost while it slept \(.*model\.planted\.0"):
                sync_weights(engine, iter(weights.items()), digests, rows)
            version, planted[1] = 1, 1
        sync_weights(engine, iter(weights.items()), digests, rows)
        assert engine.weight_version == version + 1
        model.load_state_dict(weights, strict=False)
        for temperature in (1.0, 0.7):
            for trajectory in engine.generate(prompts, [1] * len(prompts), Decoding(temperature), run_seed=1, step=0):
                ids = torch.tensor([trajectory.prompt.token_ids + trajectory.token_ids])
                with torch.no_grad():
                    logprobs = (model(ids).logits[0, :-1] / temperature).log_softmax(-1).gather(1, ids[0, 1:, None])
                expected = logprobs[len(trajectory.prompt.token_ids) - 1 :, 0]
                gap = (torch.tensor(trajectory.behaviour_logprobs) - expected).abs().max()
                assert gap < 1e-4, (kind, temperature, float(gap))

    del current().load_engine_weights
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
    with pytest.raises(Alarm, match=r"got no weights and keep old ones \(RowParallelLinear\)"):
        reload_weights(engine._llm, ((n, w) for n, w in weights.items() if not n.endswith("1.mlp.down_proj.weight")))

    # What is sampled depends on run seed, step, prompt and sample, not on who is sampled beside it.
    together = engine.generate(prompts, [2] * len(prompts), Decoding(), run_seed=7, step=3)
    alone = engine.generate(prompts[4:5], [2], Decoding(), run_seed=7, step=3)
    assert [t.token_ids for t in together[8:10]] == [t.token_ids for t in alone]
    assert together[8].token_ids != together[9].token_ids or len(together[8].token_ids) < 3

    # Replicas know nothing of each other: three and two prompts, which end at different steps, and one and none.
    sums, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda *arguments, **keywords: sums.append(all_reduce(*arguments, **keywords))
    found = {count: engine.generate(prompts[:count], [2] * count, Decoding(), run_seed=7, step=3) for count in (5, 1)}
    dist.all_reduce = all_reduce
    assert not sums, f"{len(sums)} sums over replicas: one of them that ends earlier would leave the others hanging"
    for count, trajectories in found.items():
        assert [t.token_ids for t in trajectories] == [t.token_ids for t in together[: 2 * count]]
    assert len({len(t.token_ids) for t in found[5]}) > 1, "else replicas could not fall out of step"


def test_weights_arrive_faults_are_noticed_and_replicas_generate_without_each_other():
    run_ranks(2, check_sync, timeout=200)


def check_shards(folders: Sequence[Path]) -> None:
    from megatron_models import build, each_layout, process_groups

    for layout in each_layout(((2, 1, 1),)):
        import torch
        from transformers import AutoModelForCausalLM

        from megatron_sgopd.config import RolloutSettings
        from megatron_sgopd.models.architecture import read_architecture
        from megatron_sgopd.models.weights import digests_of_shards, fill_shards, load_weights, shard_digests
        from megatron_sgopd.rollout.engine import RolloutEngine
        from megatron_sgopd.rollout.prompts import Prompt
        from megatron_sgopd.rollout.trajectory import Decoding
        from megatron_sgopd.rollout.weight_sync import compared_rows, sync_student

        prompts = [Prompt(str(i), "", tuple(range(5 + i, 11 + i)), "", "", {}) for i in range(4)]
        settings = RolloutSettings(max_new_tokens=12, cache_gib=0.1, tensor_parallel=2)
        for folder in folders:
            architecture, groups = read_architecture(folder), process_groups()
            model, engine = build(architecture, layout), RolloutEngine(folder, settings, 64, seed=1)
            load_weights(model, architecture, groups)
            targets = engine.parameters(architecture)
            for version in range(2):
                engine.load_weights = None  # not called
                for target in targets.values():
                    target.fill_(torch.nan)
                sync_student(engine, model, architecture, groups, 1 << 16)
                assert engine.weight_version == version + 1
            expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            for trajectory in engine.generate(prompts, [1] * len(prompts), Decoding(), run_seed=1, step=0):
                ids = torch.tensor([trajectory.prompt.token_ids + trajectory.token_ids])
                with torch.no_grad():
                    logprobs = expected(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
                    gap = logprobs[-len(trajectory.token_ids) :, 0] - torch.tensor(trajectory.behaviour_logprobs)
                assert gap.abs().max() < 1e-4, (folder, float(gap.abs().max()))

            # The digests are of what the engine has, not of what was meant for it.
            rows = compared_rows(engine)
            filled = fill_shards(model, architecture, groups, targets, 1 << 16)
            before = shard_digests(model, architecture, groups, rows)
            assert digests_of_shards(filled, architecture, groups, rows) == before
            [(slab, target)] = [
                shards[-1] for shards in filled.values() if shards[0][0].piece.name.endswith("q_proj.bias")
            ]
            target[slab.offset] += 1e-3  # v's first, of both ranks
            after = digests_of_shards(filled, architecture, groups, rows)
            assert [name for name in after if after[name] != before[name]] == [slab.piece.name]
            # Whole tensors, since it is of another dtype: vLLM casts them, and what was sent is compared.
            del engine.load_weights
            sync_student(engine, model.bfloat16(), architecture, groups, 1 << 16)
            engine.close()


def test_ranks_copy_their_own_shards_into_an_engine_that_is_split_alike(tmp_path: Path):
    # Vocabularies that vLLM pads to another length than Megatron, and to the same.
    folders = []
    for vocab_size in (200, 512):
        folders.append(tmp_path / str(vocab_size))
        config = Qwen2Config(
            vocab_size=vocab_size,
            hidden_size=128,  # heads of 32, the least that the CPU kernel takes
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=vocab_size == 200,
            eos_token_id=1,
            pad_token_id=0,
        )
        model = Qwen2ForCausalLM(config)
        for parameter in model.parameters():  # biases too, which start as zeros
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folders[-1])
        for file in STUDENT.glob("tokenizer*"):
            shutil.copy(file, folders[-1])
    run_ranks(2, check_shards, folders, timeout=200)

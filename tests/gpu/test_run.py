"""Whole runs on one GPU: Megatron's loop, vLLM's sleep mode, sync, FP8, saves in the background."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgopd.monitor.output import EXIT_STOPPED

from ..e2e.conftest import Finished, start
from ..slurm.cluster import wait_until
from .conftest import ON_ONE_GPU, run


def test_trainer_and_engine_agree_about_the_policy(bf16_run: Finished) -> None:
    """Proves the weight sync after each wake-up at sleep level 2: stale or missing weights give gaps of nats."""
    assert [line["step"] for line in bf16_run.metrics] == [1, 2, 3]
    assert all(line["logprob_gap"] < 0.05 for line in bf16_run.metrics)


def test_the_engine_leaves_its_memory_to_training(bf16_run: Finished) -> None:
    """Proves that sleep mode frees memory: training takes less than generation, whose cache is a fifth of the GPU."""
    peaks = bf16_run.metrics[-1]["phase_memory_mib"]
    assert peaks["train"] < peaks["generate"]
    assert "GiB in use at most on the first rank, and planned: " in bf16_run.output


def test_a_run_that_was_stopped_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """Proves saving and loading of Transformer Engine's modules with the distributed optimizer."""
    changes = ON_ONE_GPU | {"checkpoint.every": 1, "megatron.use-distributed-optimizer": True}
    process = start(tmp_path, changes)
    wait_until(lambda: (tmp_path / "metrics.jsonl").is_file(), 600)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=300) in (0, EXIT_STOPPED)
    finished = run(tmp_path, changes)
    assert [line["step"] for line in finished.metrics] == [1, 2, 3]
    assert all(line["logprob_gap"] < 0.05 for line in finished.metrics)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_training_in_fp8_is_in_fp8(tmp_path: Path, recipe: str) -> None:
    """Proves that `prove_fp8` holds for a student after its first step; otherwise the run stops with an alarm."""
    finished = run(tmp_path, {"fp8.format": "hybrid", "fp8.recipe": recipe})
    assert len(finished.metrics) == 3


@pytest.mark.parametrize("kind", ["per_tensor", "per_block"])
def test_rollouts_in_fp8_follow_every_sync(tmp_path: Path, kind: str) -> None:
    """Proves that vLLM quantizes anew what it is given at each sync, and that importance weights are on."""
    finished = run(tmp_path, {"fp8.rollouts": kind})
    assert all(line["logprob_gap"] < 0.5 for line in finished.metrics)
    assert all("importance_clipped" in line for line in finished.metrics)


def test_a_checkpoint_is_saved_while_training_goes_on(tmp_path: Path) -> None:
    """Proves asynchronous saves: each checkpoint has a manifest at the end."""
    changes = {"checkpoint.every": 1, "megatron.async-save": True, "megatron.use-persistent-ckpt-worker": True}
    finished = run(tmp_path, changes)
    assert len(list((finished.folder / "checkpoints").glob("iter_*/manifest.json"))) == 3


def replay(recorded_run: Finished, folder: Path, changes: dict[str, Any]) -> Finished:
    """A run on another's responses, which it scores anew."""
    recorded, scores = folder / "recorded", shutil.ignore_patterns("*.safetensors")
    shutil.copytree(recorded_run.folder / "recorded", recorded, ignore=scores)
    return run(folder / "run", changes | {"logging.replay": str(recorded)})


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_that_share_rows_train_as_one(bf16_run: Finished, tmp_path: Path) -> None:
    """Proves that gradients of context-parallel ranks are summed once, to what one rank has of the same responses."""
    shared = replay(bf16_run, tmp_path, {"parallel.ranks": 2, "parallel.context": 2})
    for name in ("loss", "grad_norm", "reverse_kl"):  # BF16 sums in another order
        assert shared.metrics[0][name] == pytest.approx(bf16_run.metrics[0][name], rel=0.05), name


def test_an_offloaded_teacher_gives_the_same_numbers(bf16_run: Finished, tmp_path: Path) -> None:
    """Proves the timeline: teacher and reference come and go, and the scores do not notice."""
    offloaded = replay(bf16_run, tmp_path, {"teacher.offload": True})
    assert offloaded.metrics[-1]["teacher_forwards"] == 3
    for ours, theirs in zip(offloaded.metrics, bf16_run.metrics, strict=True):
        assert ours["reverse_kl"] == pytest.approx(theirs["reverse_kl"], rel=1e-3)

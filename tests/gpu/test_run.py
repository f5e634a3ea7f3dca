"""Whole runs: Megatron's loop, vLLM's engines, weight sync, FP8, checkpoints, a teacher that comes and goes."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sgopd.monitor.attempts import read_attempts
from megatron_sgopd.monitor.output import EXIT_STOPPED

from ..commands import set_words
from ..e2e.conftest import RECIPE, REPOSITORY, SMALL, Finished, start
from ..e2e.test_run import wait_for_step
from .conftest import SHORT, Where, layout, replay, run

NUMBERS = ("loss", "grad_norm", "reverse_kl")


def agree(finished: Finished, where: Where, steps: int = 3) -> None:
    """All steps are there, and trainer and engine agree about the policy in each."""
    assert [line["step"] for line in finished.metrics] == list(range(1, steps + 1))
    assert all(line["logprob_gap"] < where.gap for line in finished.metrics)


def test_trainer_and_engine_agree_about_the_policy(base_run: Finished, where: Where) -> None:
    """Proves each weight sync, on a GPU after waking up at sleep level 2: stale or missing weights give nats."""
    agree(base_run, where)


def test_the_engine_leaves_its_memory_to_training(cuda: Where, tmp_path: Path) -> None:
    """Proves that sleep mode frees memory: training takes less than generation, whose cache is a fifth of the GPU."""
    finished = run(cuda, tmp_path)
    peaks = finished.metrics[-1]["phase_memory_mib"]
    assert peaks["train"] < peaks["generate"]
    assert "GiB in use at most on the first rank, and planned: " in finished.output


# ---- Engines ------------------------------------------------------------------------------------------------


def test_replicas_generate_what_one_engine_does(base_run: Finished, where: Where, tmp_path: Path) -> None:
    """Proves that replicas that end at different steps do not wait for each other, and that seeds do not depend on
    who generates: on a GPU they run under asynchronous scheduling."""
    where.need(2)
    finished = run(where, tmp_path, layout(ranks=2))
    agree(finished, where)
    ours, theirs = (r.recorded_text(0)["trajectories"] for r in (finished, base_run))
    lengths = [len(t["token_ids"]) for t in ours]
    assert len(set(lengths)) > 1, "else replicas could not fall out of step"
    same = [one["token_ids"] == other["token_ids"] for one, other in zip(ours, theirs, strict=True)]
    assert sum(same) >= (len(same) if where.name == "cpu" else len(same) // 2)  # BF16 kernels depend on the batch


@pytest.mark.parametrize(
    ("student", "engine"),
    [
        pytest.param(1, 2, id="engine split, student whole"),
        pytest.param(2, 1, id="student split, engine whole"),
        pytest.param(2, 2, id="both split alike"),
    ],
)
def test_weights_reach_engines_of_any_split(student: int, engine: int, where: Where, tmp_path: Path) -> None:
    """Proves both ways of weight sync: whole tensors gathered and handed to vLLM's reload, as the recipes of 70B and
    32B do, and each rank's own shards copied in place; and vLLM's tensor parallelism beside Megatron's groups."""
    where.need(2)
    agree(run(where, tmp_path, layout(ranks=2, tensor=student, rollout__tensor_parallel=engine)), where)


@pytest.mark.parametrize("kind", ["per_tensor", "per_block"])
def test_rollouts_in_fp8_follow_every_sync(cuda: Where, blocks: dict[str, Any], tmp_path: Path, kind: str) -> None:
    """Proves that vLLM quantizes anew what it is given at each sync, and that importance weights are on."""
    finished = run(cuda, tmp_path, blocks | {"fp8.rollouts": kind})
    assert all(line["logprob_gap"] < 0.5 for line in finished.metrics)
    assert all("importance_clipped" in line for line in finished.metrics)


# ---- Layouts of the trainer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "split",
    [
        pytest.param(layout(ranks=2, parallel__context=2), id="CP 2"),
        pytest.param(layout(ranks=2, tensor=2), id="TP 2"),
        pytest.param(layout(ranks=2, parallel__pipeline=2), id="PP 2"),
        pytest.param(
            layout(ranks=4, tensor=2, parallel__pipeline=2, teacher__tensor_parallel=1, teacher__pipeline_parallel=2),
            id="TP 2 x PP 2",
        ),
    ],
)
def test_ranks_that_share_a_model_train_as_one(
    split: dict[str, Any], base_run: Finished, where: Where, tmp_path: Path
) -> None:
    """Proves tensor, pipeline and context parallelism of student, teacher and reference, on a GPU with sequence
    parallelism: gradients are summed once, to what one rank has of the same responses."""
    where.need(split["parallel.ranks"])
    sequence = {"parallel.sequence": where.name == "cuda" and split["parallel.tensor"] > 1}
    shared = replay(base_run, where, tmp_path, split | sequence)
    for name in NUMBERS:
        assert shared.metrics[0][name] == pytest.approx(base_run.metrics[0][name], rel=where.rel, abs=1e-6), name


# ---- The teacher --------------------------------------------------------------------------------------------


def test_an_offloaded_teacher_gives_the_same_numbers(base_run: Finished, where: Where, tmp_path: Path) -> None:
    """Proves the timeline: teacher and reference come and go, and the scores do not notice."""
    offloaded = replay(base_run, where, tmp_path, {"teacher.offload": True})
    assert offloaded.metrics[-1]["teacher_forwards"] == 3
    for ours, theirs in zip(offloaded.metrics, base_run.metrics, strict=True):
        assert ours["reverse_kl"] == pytest.approx(theirs["reverse_kl"], rel=1e-3)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_bank_of_teacher_rollouts_is_filled_and_trained_on(ranks: int, where: Where, tmp_path: Path) -> None:
    """Proves the teacher's own engine, split over all ranks in processes without Megatron, and training by its bank."""
    where.need(ranks)
    bank = tmp_path / "bank"
    settings = SMALL | SHORT | where.settings | {"teacher_rollouts.tensor_parallel": ranks}
    settings |= {"teacher_rollouts.end_step": 2, "teacher_rollouts.samples": 2, "teacher_rollouts.memory_fraction": 0.3}
    program = ["torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", "-m", "megatron_sgopd.cli"]
    words = ["teacher-rollouts", str(RECIPE), "--bank", str(bank), *set_words(settings)]
    command = [sys.executable, "-m", *program, *words]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    taught = {"teacher_rollouts.bank": str(bank), "teacher_rollouts.weight": 0.5, "teacher_rollouts.end_step": 2}
    finished = run(where, tmp_path / "run", taught | {"teacher_rollouts.samples": 2})
    agree(finished, where)
    assert [line["teacher_rollouts"] > 0 for line in finished.metrics] == [True, True, False]


# ---- Checkpoints --------------------------------------------------------------------------------------------


def stop_and_go_on(where: Where, folder: Path, changes: dict[str, Any]) -> None:
    """A run that is stopped after its first steps goes on to its last, from a checkpoint."""
    changes = layout() | SHORT | where.settings | {"checkpoint.every": 1, "train.steps": 12} | changes
    process = start(folder, changes)
    wait_for_step(folder, 2, process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=300) in (0, EXIT_STOPPED)
    agree(run(where, folder, changes), where, steps=12)
    first, second = read_attempts(folder)
    assert 0 < second.step == first.reached < 12


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_was_stopped_goes_on_from_its_checkpoint(ranks: int, where: Where, tmp_path: Path) -> None:
    """Proves saving and loading of the models' state, on a GPU Transformer Engine's modules and the distributed
    optimizer as the recipes have it, which the CPU cannot load."""
    where.need(ranks)
    names = ("use-distributed-optimizer", "overlap-grad-reduce", "dist-ckpt-optim-fully-reshardable")
    recipe = {f"megatron.{name}": True for name in (*names, "ckpt-fully-parallel-load")}
    stop_and_go_on(where, tmp_path, layout(ranks) | (recipe if where.name == "cuda" else {}))


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_training_in_fp8_is_in_fp8_and_goes_on_from_its_checkpoint(
    cuda: Where, blocks: dict[str, Any], tmp_path: Path, recipe: str
) -> None:
    """Proves that `prove_fp8` holds for a student after its first step, else the run stops with an alarm; and that
    Transformer Engine takes its own state back from a checkpoint."""
    fp8 = {"fp8.format": "hybrid", "fp8.recipe": recipe, "fp8.first_last_layers_bf16": False}
    stop_and_go_on(cuda, tmp_path, blocks | fp8 | {"megatron.use-distributed-optimizer": True})


def test_a_teacher_in_fp8_scores_in_fp8(cuda: Where, blocks: dict[str, Any], tmp_path: Path) -> None:
    """Proves that teacher and reference multiply in FP8 beside a student in BF16."""
    assert len(run(cuda, tmp_path, blocks | {"fp8.teacher": "blockwise"}).metrics) == 3


def test_a_checkpoint_is_saved_while_training_goes_on(cuda: Where, tmp_path: Path) -> None:
    """Proves asynchronous saves: each checkpoint has a manifest at the end."""
    changes = {"checkpoint.every": 1, "megatron.async-save": True, "megatron.use-persistent-ckpt-worker": True}
    finished = run(cuda, tmp_path, changes)
    assert len(list((finished.folder / "checkpoints").glob("iter_*/manifest.json"))) == 3

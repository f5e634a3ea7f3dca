"""A run goes on from the newest checkpoint that is whole, whatever has happened to the others or to its folder."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_sgopd.checkpoint.completeness import BLOCKS, MANIFEST, newest_step, step_folder

from ..commands import same_students
from .conftest import NUMBERS, ONE_RANK, Finished, succeed, train


def unfinished(run: Finished, folder: Path) -> Path:
    """A copy of a run as if it had been killed just before its end; its checkpoints."""
    shutil.copytree(run.folder, folder)
    (folder / "summary.json").unlink()
    return folder / "checkpoints"


def blocks(checkpoint: Path) -> list[Path]:
    """Its files with tensors."""
    return sorted(checkpoint.glob(f"*{BLOCKS}"))


def truncate(checkpoint: Path) -> None:
    file = blocks(checkpoint)[0]
    os.truncate(file, file.stat().st_size // 2)


def flip_a_byte(checkpoint: Path) -> None:
    file = blocks(checkpoint)[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def skew_clocks(checkpoints: Path) -> None:
    """The oldest are from tomorrow, the newest from yesterday."""
    for age, folder in enumerate(sorted(checkpoints.glob("iter_*"), reverse=True)):
        for path in (folder, *folder.iterdir()):
            os.utime(path, times=(path.stat().st_mtime + 86400 * (age - 2),) * 2)


@pytest.mark.long
def test_broken_checkpoints_are_named_and_the_newest_whole_one_is_taken(main_run: Finished, tmp_path: Path):
    checkpoints = unfinished(main_run, tmp_path / "run")
    truncate(step_folder(checkpoints, 11))
    flip_a_byte(step_folder(checkpoints, 10))
    blocks(step_folder(checkpoints, 8))[-1].unlink()
    (step_folder(checkpoints, 6) / MANIFEST).unlink()
    skew_clocks(checkpoints)
    resumed = succeed(tmp_path / "run", {"train.steps": 11, "checkpoint.verify": "digests"})
    for said in (
        "checkpoint skipped: iter_0000011/",
        "bytes, and was written with ",
        "checkpoint skipped: iter_0000010/",
        "has another digest than when it was written; kept as iter_0000010.broken",
        "is missing; kept as iter_0000008.broken",
        f"checkpoint skipped: iter_0000006 has no {MANIFEST}; kept as iter_0000006.broken",
    ):
        assert said in resumed.output
    assert "step 5/11" in resumed.output and "step 4/11" not in resumed.output
    for ours, theirs in zip(resumed.metrics, main_run.metrics, strict=True):
        assert {name: ours[name] for name in NUMBERS} == {name: theirs[name] for name in NUMBERS}
    assert same_students(resumed.folder, main_run.folder, tmp_path)


OTHER_LAYOUTS = {
    "DP 2": {"parallel.tensor": 1},
    "PP 2": {"parallel.tensor": 1, "parallel.pipeline": 2},
    "one rank": ONE_RANK,
}


@pytest.mark.long
@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_a_run_goes_on_in_another_layout_and_says_so(main_run: Finished, tmp_path: Path, layout: str):
    checkpoints = unfinished(main_run, tmp_path / "run")
    for step in (11, 10):
        shutil.rmtree(step_folder(checkpoints, step))
    resumed = succeed(tmp_path / "run", {"train.steps": 11} | OTHER_LAYOUTS[layout])
    assert "goes on with " in resumed.output and "parallel.tensor=1 (was 2)" in resumed.output
    for ours, theirs in zip(resumed.metrics[8:], main_run.metrics[8:], strict=True):
        for name in NUMBERS:  # float32 sums in another order, through three steps of Adam
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), (ours["step"], name)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that holds two checkpoints and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=15m", "none", folder]).returncode:
        pytest.skip("needs root, and the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.long
def test_a_full_disk_costs_one_checkpoint_and_a_read_only_one_stops_the_run_at_the_start(small_disk: Path):
    changes = {
        "parallel.ranks": 1,
        "parallel.tensor": 1,
        "train.steps": 4,
        "checkpoint.every": 1,
        "data.heldout": None,
        "logging.tensorboard": False,
        "logging.record": None,
    }
    run = small_disk / "run"
    full = train(run, changes)
    assert full.code == 1
    assert "No space left on device" in full.output + full.errors
    whole = newest_step(run / "checkpoints")
    assert whole >= 1

    subprocess.run(["mount", "-o", "remount,ro,size=300m", small_disk], check=True)
    refused = train(run, changes)
    assert refused.code == 2
    assert f"run_dir={run} cannot be written to" in refused.errors

    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    resumed = succeed(run, changes)
    assert f"step {whole + 1}/4" in resumed.output and f"step {whole}/4" not in resumed.output
    assert [line["step"] for line in resumed.metrics] == [1, 2, 3, 4]

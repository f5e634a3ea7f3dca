"""A bank of teacher rollouts: what is read is what was written, by whom and of whom."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from array import array
from pathlib import Path

import pytest

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.rollout.bank import (
    BankIdentity,
    RolloutBank,
    StoredRollout,
    check_identity,
    writing,
)

IDENTITY = BankIdentity("t", "v", "p", 2, 1.0, 1.0, 0, "[]", max_new_tokens=64, seed=0, verifier="task")


def rollouts(problems: range, samples: int = 2) -> list[StoredRollout]:
    """Rollouts of every kind; lengths differ."""
    return [
        StoredRollout(
            f"problem {number}",
            sample,
            array("i", range(number % 7 + sample)),
            f"response {number} \u2713",
            truncated=number % 5 == 0,
            outcome=(number + sample) % 2,
            extracted=None if number % 3 else "<b>\x00",
            reason="right" if (number + sample) % 2 else "wrong",
        )
        for number in problems
        for sample in range(samples)
    ]


def test_what_is_read_is_what_was_written_also_by_several_writers(tmp_path: Path) -> None:
    for member, problems in ((1, range(1500)), (2, range(1500, 1510))):
        with writing(tmp_path, IDENTITY, f"shards_2-{member}") as writer:
            writer.write(rollouts(problems))
    bank = RolloutBank(tmp_path)
    assert len(bank) == 1510 and bank.rollouts == 3020
    for rollout in rollouts(range(0, 1510, 97)):
        assert rollout in bank.of(rollout.problem)
        assert [found.sample for found in bank.of(rollout.problem)] == [0, 1]
    assert bank.approved == sum(rollout.outcome for rollout in rollouts(range(1510)))
    assert "problem 9999" not in bank and bank.of("problem 9999") == []


def test_a_reader_sees_parts_that_come_later_and_a_writer_goes_on_after_its_own(tmp_path: Path) -> None:
    bank = RolloutBank(tmp_path / "bank")
    for turn in range(3):
        with writing(tmp_path / "bank", IDENTITY, "train-0") as writer:
            writer.write(rollouts(range(10 * turn, 10 * turn + 10)))
        assert f"problem {10 * turn}" not in bank
        bank.refresh()
        assert f"problem {10 * turn}" in bank
    assert len(list((tmp_path / "bank").glob("train-0-*.parquet"))) == 3


def test_memory_is_bounded_by_row_groups(tmp_path: Path) -> None:
    with writing(tmp_path, IDENTITY, "train-0") as writer:
        writer.write(rollouts(range(20_000), samples=1))
    bank = RolloutBank(tmp_path)
    for number in range(0, 20_000, 500):
        bank.of(f"problem {number}")
    assert len(bank._read) <= 16
    assert max(table.num_rows for table, _ in bank._read.values()) <= 1024


def test_each_flipped_byte_is_caught_with_the_file_and_the_row_group_named(tmp_path: Path) -> None:
    with writing(tmp_path, IDENTITY, "train-0") as writer:
        writer.write(rollouts(range(1200)))
    path = tmp_path / "train-0-000000.parquet"
    content = path.read_bytes()
    groups = json.loads(path.with_suffix(".json").read_text())["row_groups"]
    assert len(groups) == 3
    for position in range(4, len(content), 101):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :])
        place = [i for i, g in enumerate(groups) if g["offset"] <= position < g["offset"] + g["bytes"]]
        index = place[0] if place else 0
        named = f"row group {index}" if place else "footer"
        with pytest.raises(ConfigError, match=f"train-0-000000.parquet, {named}: the bytes are not those"):
            RolloutBank(tmp_path).of(groups[index]["problems"][0])
        others = [i for i in range(3) if i != index] if place else []
        for other in others:
            RolloutBank(tmp_path).of(groups[other]["problems"][0])
    path.write_bytes(content[:-20])
    with pytest.raises(ConfigError, match="footer"):
        RolloutBank(tmp_path).of("problem 0")
    path.unlink()
    with pytest.raises(ConfigError, match=r"train-0-000000\.parquet cannot be read"):
        RolloutBank(tmp_path).of("problem 0")


def test_a_damaged_description_is_caught(tmp_path: Path) -> None:
    with writing(tmp_path, IDENTITY, "train-0") as writer:
        writer.write(rollouts(range(20)))
    path = tmp_path / "train-0-000000.json"
    content = path.read_text()
    path.write_text(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"train-0-000000\.json cannot be read"):
        RolloutBank(tmp_path)
    path.write_text(content.replace("problem 17", "problem 71"))
    with pytest.raises(ConfigError, match="names other problems than row group 0 has"):
        RolloutBank(tmp_path).of("problem 71")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("model", "other"), ("tokenizer", "other"), ("prompts", "other"), ("verifier", "math")),
        *(("samples", 4), ("temperature", 0.7), ("max_new_tokens", 65), ("seed", 1)),
    ],
)
def test_a_bank_of_another_is_refused_with_the_difference_named(tmp_path: Path, field: str, value: object) -> None:
    with writing(tmp_path, IDENTITY, "train-0"):
        pass
    check_identity(tmp_path, IDENTITY)
    other = dataclasses.replace(IDENTITY, **{field: value})
    message = f"is a bank with another {field} [(]{field} is {getattr(IDENTITY, field)!r}, and the recipe has {value!r}"
    with pytest.raises(ConfigError, match=message):
        check_identity(tmp_path, other)
    with pytest.raises(ConfigError, match=message), writing(tmp_path, other, "train-0"):
        pass


def test_a_folder_that_is_no_bank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no bank of rollouts .*teacher-rollouts RECIPE"):
        check_identity(tmp_path, IDENTITY)


WRITER = """
import sys, time
from pathlib import Path
from tests.unit.test_bank import IDENTITY, rollouts
from megatron_sgopd.rollout.bank import writing
with writing(Path(sys.argv[1]), IDENTITY, sys.argv[2]) as writer:
    print("ready", flush=True)
    for turn in range(int(sys.argv[3])):
        writer.write(rollouts(range(40 * turn, 40 * turn + 40)))
        print(turn, flush=True)
    time.sleep(60)
"""


def writer_process(folder: Path, name: str, parts: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), name, str(parts)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_two_writers_never_do_the_same_problems(tmp_path: Path) -> None:
    process = writer_process(tmp_path, "shards_2-1", 0)
    try:
        for name, message in (
            ("shards_2-1", "another process writes as shards_2-1"),
            ("train-0", "shards_2-1 is being written, and would do the same problems as train-0"),
        ):
            with pytest.raises(ConfigError, match=message), writing(tmp_path, IDENTITY, name):
                pass
        with writing(tmp_path, IDENTITY, "shards_2-2"):
            pass
    finally:
        process.kill()
        process.wait()
    with writing(tmp_path, IDENTITY, "shards_2-1"), writing(tmp_path, IDENTITY, "shards_2-2"):
        pass


def test_a_writer_that_is_killed_leaves_whole_parts_only(tmp_path: Path) -> None:
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        process = writer_process(folder, "train-0", 10_000)
        assert process.stdout is not None
        finished = [int(process.stdout.readline()) for _ in range(3 + attempt)]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        bank = RolloutBank(folder)
        assert len(bank) >= 40 * len(finished)
        assert bank.rollouts == 2 * len(bank)
        for number in range(len(bank)):
            assert bank.of(f"problem {number}") == rollouts(range(number, number + 1))

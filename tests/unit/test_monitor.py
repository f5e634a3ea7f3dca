"""A run's files of JSON lines: read from either end, and cut back, also after a kill in the middle of a line."""

import json
import math
from pathlib import Path

import pytest

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.monitor.lines import (
    Growing,
    append_json_line,
    drop_later_steps,
    halve_steps,
    last_json_lines,
    read_json_lines,
)


def test_a_line_that_was_cut_off_is_dropped_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (1, 2, 3))
    for cut in range(26):
        path.write_text(whole + json.dumps({"step": 4, "loss": 0.25})[:cut])
        assert [line["step"] for line in read_json_lines(path)] == [1, 2, 3]
        assert [line["step"] for line in last_json_lines(path)] == [3, 2, 1]
        drop_later_steps(path, 2, tmp_path / "aside")
        assert path.read_text() == "".join(whole.splitlines(keepends=True)[:2])
    assert (tmp_path / "aside").read_text() == 26 * whole.splitlines(keepends=True)[2]
    assert list(read_json_lines(tmp_path / "none")) == list(last_json_lines(tmp_path / "none")) == []
    drop_later_steps(path, 0)
    assert path.read_text() == ""
    drop_later_steps(tmp_path / "none", 3)


@pytest.mark.parametrize("length", [1, 65_535, 65_536, 65_537, 300_000])
def test_lines_are_found_from_the_end_whatever_their_length(tmp_path: Path, length: int) -> None:
    path = tmp_path / "lines"
    lines = [{"step": step, "text": "x" * (length if step % 2 else 3)} for step in range(1, 8)]
    for line in lines:
        append_json_line(path, line)
    assert list(last_json_lines(path)) == lines[::-1]
    assert list(read_json_lines(path)) == lines


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    append_json_line(tmp_path / "lines", {"a": math.nan, "b": {"c": -math.inf}, "d": [math.inf, 1.5]})
    assert json.loads((tmp_path / "lines").read_text()) == {"a": None, "b": {"c": None}, "d": [None, 1.5]}


@pytest.mark.parametrize("text", ["nonsense", "[" * 100_000, '"text"', b"\xff".decode("latin1")])
def test_a_broken_line_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b'{"step": 1}\n' + text.encode("latin1") + b"\n")
    with pytest.raises(ConfigError, match=r"lines, line 2 is not JSON .*: mend or remove that line"):
        list(read_json_lines(path))
    with pytest.raises(ConfigError, match="lines, the line at byte 12 is not JSON"):
        list(last_json_lines(path))


def test_halving_keeps_the_first_and_the_last_step_and_thins_what_is_old(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    for step in range(1, 101):
        for sample in range(2):
            append_json_line(path, {"step": step, "sample": sample})
        if step % 20 == 0:
            halve_steps(path)
    steps = [line["step"] for line in read_json_lines(path)]
    assert {steps.count(step) for step in steps} == {2} and steps == sorted(steps)
    assert steps[0] == 1 and steps[-1] == 100 and len(set(steps)) < 40
    assert sum(step > 80 for step in set(steps)) > sum(step <= 20 for step in set(steps))


def test_a_file_that_grows_is_read_once_and_again_where_it_was_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    file = Growing(path)

    def new() -> tuple[bool, list[bytes]]:
        again, lines = file.new_lines()
        return again, [line for _, line in lines]

    assert new() == (False, [])
    path.write_bytes(b"one\ntwo\nthr")
    assert new() == (False, [b"one\n", b"two\n"])
    path.write_bytes(b"one\ntwo\nthree\n")
    assert new() == (False, [b"three\n"])
    path.write_bytes(b"one\ntwo\n")
    assert new() == (True, [b"one\n", b"two\n"])
    path.write_bytes(b"one\nTWO\nthree\n")
    assert new() == (True, [b"one\n", b"TWO\n", b"three\n"]), "longer again, but not the same"
    path.unlink()
    assert new() == (True, [])

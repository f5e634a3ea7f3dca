"""A run's files after it was killed in the middle of a line."""

import json
from pathlib import Path

from megatron_sgopd.monitor.metrics import _keep_until
from megatron_sgopd.monitor.output import read_json_lines


def test_a_line_that_was_cut_off_is_dropped_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (1, 2, 3))
    for cut in range(1, 26):
        path.write_text(whole + json.dumps({"step": 4, "loss": 0.25})[:cut])
        assert [line["step"] for line in read_json_lines(path)] == [1, 2, 3]
        _keep_until(path, 2)
        assert path.read_text() == "".join(whole.splitlines(keepends=True)[:2])
    assert read_json_lines(tmp_path / "none") == []

"""The benches' own frame: figures with limits, and two runs side by side."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "tools/bench"


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_a_bench_prints_its_figures_with_floors_and_limits_and_two_runs_are_compared(tmp_path: Path) -> None:
    said = run("packing.py", "--responses=2000")
    assert said.returncode == 0 and "share of rows that is no padding" in said.stdout and "floor" in said.stdout
    before, after = tmp_path / "before", tmp_path / "after"
    before.write_text(run("packing.py", "--responses=2000", "--json").stdout)
    line = json.loads(before.read_text())
    assert line["bench"] == "packing"
    line["figures"][1]["value"] *= 2
    after.write_text("noise of a library\n" + json.dumps(line) + "\n")
    compared = run("compare.py", str(before), str(after))
    assert compared.returncode == 0
    assert any(words.endswith(" 2.000") and words.startswith("packing: time") for words in compared.stdout.splitlines())


def test_a_figure_outside_its_limits_fails_the_bench() -> None:
    said = run("packing.py", "--responses=3")
    assert said.returncode == 1 and "MISSED" in said.stdout

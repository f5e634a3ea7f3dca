"""Two commands on one new run folder: one trains, by its own recipe, and the other is refused."""

import json
from pathlib import Path

import pytest
import yaml

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.monitor.output import claimed
from megatron_sgopd.recipe import load_recipe, write_resolved

from ..e2e.conftest import ONE_RANK, SMALL, start
from .conftest import RECIPE


def test_a_recipe_that_became_anothers_while_it_was_waited_for_is_refused(tmp_path: Path) -> None:
    recipes = [load_recipe(RECIPE, [f"run_dir={tmp_path}", f"train.learning_rate={rate}"]) for rate in (1e-4, 2e-4)]
    with claimed(tmp_path):
        write_resolved(recipes[0])
    (tmp_path / "metrics.jsonl").write_text("")
    with claimed(tmp_path), pytest.raises(ConfigError, match=r"belongs to a run with train\.learning_rate=0\.0001"):
        write_resolved(recipes[1])
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["train"]["learning_rate"] == 1e-4


@pytest.mark.long
def test_of_two_that_start_at_once_one_trains_by_its_own_recipe(tmp_path: Path) -> None:
    changes = SMALL | ONE_RANK | {"train.steps": 2, "evaluate.samples": 1}
    rates = (1e-4, 2e-4)
    processes = [start(tmp_path / "run", changes | {"train.learning_rate": rate}) for rate in rates]
    ended = [process.communicate(timeout=300) for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 2], ended
    winner = codes.index(0)
    assert "is being trained in by another process" in ended[1 - winner][1]
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["train"]["learning_rate"] == rates[winner]
    lines = (tmp_path / "run/attempts.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["begin", "end"]

"""Recipes and flags: what is accepted, and what a refusal says."""

from pathlib import Path

import pytest
import yaml

from megatron_sgopd.config import Recipe, build, parse_flags, settings_flags
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.recipe import load_recipe

MINIMAL = {
    "model": {"path": "student"},
    "teacher": {"path": "teacher"},
    "data": {"train": {"source": "reasoning_gym:chain_sum", "task_settings": {"min_terms": 2}}},
    "train": {"steps": 3},
}


def refusal(values: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        build(Recipe, values, "recipe.yaml")
    return str(caught.value)


def test_flags_carry_every_setting_of_the_plugin():
    recipe = build(Recipe, MINIMAL | {"sgopd": {"method": "opd", "noise_floor": 0.1}}, "recipe.yaml")
    settings, rest = parse_flags(["--lr=1", *settings_flags(recipe), "--bf16"])
    assert rest == ["--lr=1", "--bf16"]
    assert settings_flags(settings) == settings_flags(recipe)
    assert settings.sgopd == recipe.sgopd


def test_every_setting_is_documented():
    from megatron_sgopd.config import _flags

    assert [path for path, description in _flags(Recipe) if not description] == []


def test_unknown_setting_names_the_nearest():
    assert "unknown setting 'rollout.group_sise': did you mean 'group_size'?" in refusal(
        MINIMAL | {"rollout": {"group_sise": 4}}
    )


def test_unknown_section_names_the_nearest():
    assert "unknown setting 'rolout': did you mean 'rollout'?" in refusal(MINIMAL | {"rolout": {}})


def test_missing_and_out_of_range_settings_are_named():
    message = refusal(MINIMAL | {"model": {}, "rollout": {"temperature": 0}})
    assert "setting 'model.path' is missing" in message
    assert "setting 'rollout.temperature' is 0: input should be greater than 0" in message


def test_unknown_flag_names_the_nearest():
    with pytest.raises(ConfigError, match=r"--sgopd-metod=opd.*did you mean --sgopd-method"):
        parse_flags(["--sgopd-metod=opd"])


def test_overrides_change_one_setting(tmp_path: Path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    recipe = load_recipe(path, ["train.learning_rate=1e-3", "data.train.task_settings.min_terms=3"])
    assert recipe.train.learning_rate == 1e-3
    assert recipe.data.train.task_settings == {"min_terms": 3}
    assert recipe.run_dir == "runs/tiny"


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "is no YAML"), ("- 1", "must hold sections"), (None, "cannot be read")],
)
def test_unreadable_recipe_is_refused(tmp_path: Path, content: str | None, message: str):
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


@pytest.mark.parametrize("override", ["train.steps", "=3", "train.steps.x=1"])
def test_malformed_override_is_refused(tmp_path: Path, override: str):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ConfigError, match="--set"):
        load_recipe(path, [override])

"""The cache of prompts: when it is used, when it is not, and what it leaves alone."""

import fcntl
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from commands import REPOSITORY

from megatron_sgopd.config import PromptSettings
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.rollout import prompt_cache
from megatron_sgopd.rollout.prompt_cache import _key, _remove_unused, load_prompts

STUDENT = REPOSITORY / "examples/arithmetic_cpu/models/student"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "1+1", "answer": "2"}\n')
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SGOPD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/prompts"


def load(path: Path, model: Path = STUDENT) -> list[str]:
    [prompts] = load_prompts([PromptSettings(source=str(path))], str(model))
    return [prompt.answer for prompt in prompts]


def refuse_to_read(*_: Any) -> None:
    pytest.fail("read again")


def test_prompts_are_read_once_and_again_where_the_file_was_damaged(
    data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(data) == ["2"]
    [made] = cache.glob("*.arrow")
    with monkeypatch.context() as patch:
        patch.setattr(prompt_cache._Reader, "_start", refuse_to_read)
        assert load(data) == ["2"]
    made.write_bytes(made.read_bytes()[:200])
    assert load(data) == ["2"]


@pytest.mark.parametrize(
    "change",
    [
        lambda data, model: data.write_text(data.read_text().replace('"2"', '"3"')),
        lambda data, model: (model / "chat_template.jinja").write_text("{{ messages[0].content }}"),
        lambda data, model: (model / "tokenizer_config.json").write_text(
            json.dumps(json.loads((model / "tokenizer_config.json").read_text()) | {"model_max_length": 77})
        ),
    ],
)
def test_the_key_covers_data_template_and_tokenizer(change: Any, data: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(STUDENT, tmp_path / "model"))
    before = _key(PromptSettings(source=str(data)), str(model))
    (model / "model.safetensors").write_bytes(b"other weights shape no prompt")
    assert _key(PromptSettings(source=str(data)), str(model)) == before
    change(data, model)
    assert _key(PromptSettings(source=str(data)), str(model)) != before


def test_the_key_covers_every_setting_and_where_a_file_lies_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for split, text in (("train", "a"), ("validation", "b")):
        (folder / split).mkdir(parents=True)
        (folder / split / "x.jsonl").write_text(text)
    settings = PromptSettings(source=str(folder))
    before = _key(settings, str(STUDENT))
    (folder / ".git").mkdir()
    (folder / ".git/index").write_text("x")
    assert _key(settings, str(STUDENT)) == before
    (folder / "train").rename(folder / "test")
    (folder / "validation").rename(folder / "train")
    assert _key(settings, str(STUDENT)) != before
    others = [PromptSettings(source=str(folder), **{name: value}) for name, value in OTHER.items()]
    assert OTHER.keys() | {"source"} == vars(settings).keys(), "a new setting is among them"
    assert len({_key(other, str(STUDENT)) for other in [settings, *others]}) == len(OTHER) + 1


OTHER: dict[str, Any] = {
    "prompt_field": "q",
    "answer_field": "a",
    "answer_form": "worked",
    "unusable_rows": "skip",
    "size": 7,
    "task_settings": {"x": 1},
    "seed": 5,
    "split": "test",
    "system_prompt": "Be brief.",
    "prompt_suffix": " Think first.",
    "chat_template": False,
    "chat_template_arguments": {"enable_thinking": False},
    "max_prompt_tokens": 9,
}


def test_files_of_others_in_the_folder_stay(tmp_path: Path) -> None:
    long_ago = time.time() - 365 * 24 * 3600
    for name in ("thesis.tex", "0123.arrow", "4567.arrow"):
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (long_ago, long_ago if name != "4567.arrow" else time.time()))
    (tmp_path / "old").mkdir()
    os.utime(tmp_path / "old", (long_ago, long_ago))
    _remove_unused(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4567.arrow", "old", "thesis.tex"]


@pytest.mark.long
def test_without_a_home_or_locks_prompts_are_read_all_the_same(
    data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        assert load(data) == ["2"]
    monkeypatch.delenv("SGOPD_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert load(data) == ["2"]
    monkeypatch.setenv("SGOPD_CACHE", "/proc/none")
    with pytest.raises(ConfigError, match="SGOPD_CACHE=/proc/none cannot be made"):
        load(data)


@pytest.mark.long
def test_slow_rows_are_waited_for_as_long_as_they_come(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "_ROW_LIMIT", 12.0)  # several times what one takes on a busy machine
    settings = PromptSettings(source="reasoning_gym:knight_swap", size=72)
    began = time.monotonic()
    [prompts] = load_prompts([settings], str(STUDENT))
    assert len(prompts) == 72 and time.monotonic() - began > 12

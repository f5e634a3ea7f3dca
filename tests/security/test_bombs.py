"""What is small and unpacks to much, is nested deeply or never ends: one message, in bounded time and memory."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_sgopd.checkpoint.completeness import MANIFEST, check_complete
from megatron_sgopd.common.data_files import read_json, read_yaml
from megatron_sgopd.config import PromptSettings
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.models.architecture import read_architecture
from megatron_sgopd.rollout import bank, prompt_cache
from megatron_sgopd.rollout.bank import RolloutBank, check_identity, writing
from megatron_sgopd.rollout.prompt_cache import load_prompts
from megatron_sgopd.rollout.recording import Recording
from megatron_sgopd.rollout.sources import read_rows

from ..unit.test_bank import IDENTITY, rollouts
from .conftest import STUDENT, change_json

Refused = Callable[..., str]
DEEP = "[" * 200_000


# ---- Model folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 3_000_000), ("hidden_size", 10**12), ("vocab_size", 10**18), ("num_attention_heads", 10**9)],
)
def test_sizes_beyond_any_model_are_refused_at_once(field: str, value: int, model: Path, refused: Refused) -> None:
    change_json(model / "config.json", **{field: value})
    began = time.monotonic()
    said = refused("inspect", model)
    assert f"{field} = {value} must be a positive whole number, of at most" in said
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "conversion.json"])
def test_deep_json_in_a_model_folder(name: str, model: Path, refused: Refused) -> None:
    if name != "config.json":
        change_json(model / "config.json")
    if name == "model.safetensors.index.json":
        (model / "model.safetensors").unlink()
    (model / name).write_text(f'{{"files": {DEEP}')
    command = ["train", *TRAIN, "--set", f"model.path={model}"] if name == "conversion.json" else ["inspect", model]
    said = refused(*command)
    assert name in said and "nested too deeply" in said


TRAIN = [str(Path(__file__).parents[2] / "examples/arithmetic_cpu/recipe.yaml"), "--set", "run_dir=/nonexistent/run"]


# ---- Recipes, checkpoints, banks, recordings ------------------------------------------------------------


def test_deep_and_large_files(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(DEEP)
    with pytest.raises(ConfigError, match="nested too deeply"):
        read_json(path)
    with pytest.raises(ConfigError, match=r"nested too deeply|is no YAML"):
        read_yaml(path)
    with path.open("w") as file:
        file.truncate(1 << 40)  # takes no space
    for read in (read_json, read_yaml):
        with pytest.raises(ConfigError, match="it has more than"):
            read(path)


def test_aliases_that_stand_for_more_and_more(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    path.write_text("\n".join(lines))
    began = time.monotonic()
    with pytest.raises(ConfigError, match="aliases stand for more than"):
        read_yaml(path)
    path.write_text("a: &a [*a]")
    with pytest.raises(ConfigError, match=r"within itself|aliases stand for more"):
        read_yaml(path)
    assert time.monotonic() - began < 5


def test_a_manifest_a_bank_and_a_recording(tmp_path: Path) -> None:
    (tmp_path / "iter_0000001").mkdir()
    (tmp_path / "iter_0000001" / MANIFEST).write_text(DEEP)
    with pytest.raises(ConfigError, match="nested too deeply"):
        check_complete(tmp_path / "iter_0000001", with_digests=False)
    (tmp_path / "bank.json").write_text(DEEP)
    with pytest.raises(ConfigError, match="is no bank of rollouts"):
        check_identity(tmp_path, IDENTITY)
    (tmp_path / "train-0-000000.json").write_text(DEEP)
    with pytest.raises(ConfigError, match=r"train-0-000000\.json cannot be read"):
        RolloutBank(tmp_path)
    (tmp_path / "step_000000.json").write_text(DEEP)
    with pytest.raises(ConfigError, match=r"step_000000\.json is no recorded batch"):
        Recording(str(tmp_path), None, 100, None, {}).load(0)


def test_a_bank_whose_texts_unpack_to_much(tmp_path: Path) -> None:
    with writing(tmp_path, IDENTITY, "train-0") as writer:
        writer.write([dataclasses.replace(one, response="x" * 1_000_000) for one in rollouts(range(200), samples=1)])
    before = psutil.Process().memory_info().rss
    assert len(RolloutBank(tmp_path).of("problem 7")[0].response) == 1_000_000
    assert psutil.Process().memory_info().rss - before < 100e6, "of 200 MB"


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop_columns("reason"),
        lambda table: table.append_column("more", pa.array(["x"] * len(table))),
        lambda table: table.set_column(2, "token_ids", pa.array([[-5]] * len(table), pa.list_(pa.int32()))),
        lambda table: table.set_column(2, "token_ids", pa.array([None] * len(table), pa.list_(pa.int32()))),
        lambda table: table.set_column(2, "token_ids", pa.array(["x"] * len(table))),
    ],
)
def test_a_bank_that_is_not_as_one_is_written(change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank, "_digest", lambda _: "of whoever wrote it")
    with writing(tmp_path, IDENTITY, "train-0") as writer:
        writer.write(rollouts(range(3)))
    path = tmp_path / "train-0-000000.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    with pytest.raises(ConfigError, match="train-0-000000"):
        RolloutBank(tmp_path).of("problem 0")


# ---- Data sets ------------------------------------------------------------------------------------------


def test_a_column_that_nobody_asked_for_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.parquet"
    bomb = pa.array(["x" * 4_000_000]).take(pa.array([0] * 100))
    table = pa.table({"prompt": [f"{i} + 1" for i in range(100)], "answer": ["1"] * 100, "image": bomb})
    pq.write_table(table, path)
    del table, bomb
    assert path.stat().st_size < 1_000_000, "of 400 MB"
    before = psutil.Process().memory_info().rss
    assert len(list(read_rows(PromptSettings(source=str(path)), pytest.fail))) == 100
    assert psutil.Process().memory_info().rss - before < 100e6


def test_a_column_of_prompts_that_unpacks_to_much_is_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "bomb.parquet"
    prompts = pa.array(["x" * 1_000_000]).take(pa.array([0] * 1000))
    pq.write_table(pa.table({"prompt": prompts, "answer": ["1"] * 1000}), path)
    del prompts
    pa.default_memory_pool().release_unused()
    before, most = psutil.Process().memory_info().rss, 0
    for _ in read_rows(PromptSettings(source=str(path)), pytest.fail):
        most = max(most, psutil.Process().memory_info().rss)
    assert most - before < 500e6, "of a gigabyte"


def test_a_line_without_end_takes_the_reader_and_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "MEMORY_LIMIT", 1 << 30)
    path = tmp_path / "prompts.jsonl"
    with path.open("w") as file:
        file.truncate(3 << 30)  # takes no space
    monkeypatch.setattr(prompt_cache, "_key", lambda *_: "key")  # whose digest of it would take seconds
    with pytest.raises(ConfigError, match=r"prompts\.jsonl.*takes more than 1 GiB of memory"):
        load_prompts([PromptSettings(source=str(path))], str(STUDENT))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1/0 }}", r"line 1: the tokenizer's chat template refuses the messages \(ZeroDivisionError"),
        ("{{ 'x' * 100000000000 }}", "takes more than 1 GiB of memory"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
            "{% endfor %}",
            "nothing came for 3 s: a prompt, or the chat template of .* takes too long",
        ),
        pytest.param(
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            r"refuses the messages \(RecursionError",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "{{ messages.__class__.__mro__ }}", r"refuses the messages \(access to attribute", marks=pytest.mark.long
        ),
    ],
)
def test_a_template_that_fails_or_never_ends_is_named(
    template: str, message: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_cache, "MEMORY_LIMIT", 1 << 30)
    monkeypatch.setattr(prompt_cache, "_ROW_LIMIT", 3.0)
    (model / "chat_template.jinja").write_text(template)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    with pytest.raises(ConfigError, match=message):
        load_prompts([PromptSettings(source=str(tmp_path / "prompts.jsonl"))], str(model))


def test_experts_and_heads_are_bounded_too(tmp_path: Path) -> None:
    folder = tmp_path / "moe"
    folder.mkdir()
    config: dict[str, Any] = json.loads(
        (Path(__file__).parents[2] / "examples/qwen3_30b_a3b_to_1p7b/configs/teacher/config.json").read_text()
    )
    (folder / "config.json").write_text(json.dumps(config | {"num_experts": 10**9}))
    with pytest.raises(ConfigError, match="num_experts = 1000000000 must be a positive whole number, of at most 4096"):
        read_architecture(folder, with_weights=False)

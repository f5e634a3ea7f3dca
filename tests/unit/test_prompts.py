"""Prompts: sources agree, orders repeat, and bad input is named."""

import json
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_sgopd.config import PromptSettings
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.rollout.prompts import PromptSet, PromptStream, load_prompts

TOKENIZER = AutoTokenizer.from_pretrained(
    Path(__file__).parents[2] / "examples/arithmetic_cpu/models/student", local_files_only=True
)
ROWS = [{"prompt": f"{i} + {i} =", "answer": str(2 * i), "other": i} for i in range(7)]
HOSTILE = ["\u202e\u0000", "<|im_end|>", "é" * 50, "{{ 7*7 }}", "𝟚+𝟚"]


def write_lines(path: Path, *lines: object) -> PromptSettings:
    path.write_bytes(
        "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines).encode(errors="surrogateescape")
    )
    return PromptSettings(source=str(path))


def load(settings: PromptSettings, **arguments: object) -> PromptSet:
    return load_prompts(settings, TOKENIZER, **arguments)


def numbered(count: int) -> PromptSet:
    class Numbers(PromptSet):
        def __init__(self) -> None:
            super().__init__(load_rows(count), [str(i) for i in range(count)], [[i] for i in range(count)], 0)

    return Numbers()


def load_rows(count: int):
    from megatron_sgopd.rollout.prompts import _Row

    return [_Row(f"row {i}", str(i), "0") for i in range(count)]


def test_file_formats_give_the_same_prompts(tmp_path: Path):
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    table.to_parquet(tmp_path / "folder/rows.parquet")
    sources = [write_lines(tmp_path / "rows.jsonl", *ROWS)]
    sources += [PromptSettings(source=str(tmp_path / name)) for name in ("rows.parquet", "saved", "splits", "folder")]
    loaded = [[(p.text, p.token_ids, p.answer) for p in load(source)] for source in sources]
    assert all(rows == loaded[0] for rows in loaded)
    assert len(loaded[0]) == 7


def test_chat_messages_go_through_the_template(tmp_path: Path):
    messages = [{"role": "user", "content": "1 + 1 ="}]
    settings = write_lines(
        tmp_path / "chat.jsonl", {"prompt": messages, "answer": "2"}, {"prompt": "1 + 1 =", "answer": 2}
    )
    chat, plain = load(settings)
    assert (
        chat.text == plain.text == TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    )
    assert chat.token_ids == tuple(TOKENIZER(chat.text, add_special_tokens=False).input_ids)
    assert plain.answer == "2"


def test_reasoning_gym_makes_problems_with_what_its_scorer_needs():
    settings = PromptSettings(source="reasoning_gym:chain_sum", size=20, seed=3, task_settings={"min_terms": 2})
    prompts = load(settings)
    assert len(prompts) == 20 and prompts[0].task == "chain_sum"
    json.dumps(prompts[0].metadata)
    assert [p.text for p in prompts] == [p.text for p in load(settings)]


def test_heldout_prompts_are_left_out_of_training():
    tiny = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    heldout = load(PromptSettings(source="reasoning_gym:chain_sum", size=30, seed=1, task_settings=tiny))
    train = load(
        PromptSettings(source="reasoning_gym:chain_sum", size=300, seed=2, task_settings=tiny), exclude=heldout
    )
    assert not {p.text for p in train} & {p.text for p in heldout}
    assert train.excluded == 300 - len(train) > 0


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_only_text(tmp_path: Path, text: str):
    (prompt,) = load(write_lines(tmp_path / "h.jsonl", json.dumps({"prompt": text, "answer": "1"})))
    assert len(prompt.token_ids) > 0


@given(st.integers(1, 20), st.integers(0, 1000), st.lists(st.integers(1, 15), min_size=1, max_size=10))
def test_any_division_into_draws_gives_the_same_sequence_from_anywhere(size: int, seed: int, draws: list[int]):
    prompts = numbered(size)
    whole = PromptStream(prompts, seed).next(sum(draws))
    stream = PromptStream(prompts, seed)
    assert [p for n in draws for p in stream.next(n)] == whole
    resumed = PromptStream(prompts, seed)
    resumed.seek(draws[0])
    assert resumed.next(sum(draws[1:])) == whole[draws[0] :]
    assert len({p.id for p in whole}) == len(whole)


@given(st.integers(1, 30), st.integers(0, 1000))
def test_every_epoch_holds_each_prompt_once_in_an_order_of_its_own(size: int, seed: int):
    stream = PromptStream(numbered(size), seed)
    epochs = [[p.text for p in stream.next(size)] for _ in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert size < 15 or epochs[0] != epochs[1]


REFUSED = {
    "no JSON": ([ROWS[0], "{oops"], "line 2 is no JSON"),
    "no object": (["[1]"], "line 1 must be an object"),
    "no answer field": ([ROWS[0], {"prompt": "x", "anser": "1"}], "line 2 has no field 'answer'.*to 'anser'"),
    "empty answer": ([{"prompt": "x", "answer": " "}], "line 1: 'answer' is missing or empty"),
    "null answer": ([{"prompt": "x", "answer": None}], "line 1: 'answer' is missing or empty"),
    "prompt that is no text": ([{"prompt": 3, "answer": "1"}], "line 1: 'prompt' must be text or a list"),
    "half a surrogate pair": ([{"prompt": "\ud800", "answer": "1"}], "line 1: 'prompt' is no valid Unicode"),
    "bytes that are no UTF-8": (['{"prompt": "\udcff", "answer": "1"}'], "line 1: 'prompt' is no valid Unicode"),
    "empty file": ([], "holds no prompts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_lines_are_named(tmp_path: Path, name: str):
    lines, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        load(write_lines(tmp_path / "bad.jsonl", *lines))


def test_long_prompts_are_named_with_their_length(tmp_path: Path):
    settings = write_lines(tmp_path / "long.jsonl", ROWS[0], {"prompt": "1+" * 100, "answer": "1"})
    limited = PromptSettings(source=settings.source, max_prompt_tokens=50)
    with pytest.raises(ConfigError, match=r"line 2: the prompt has 2\d\d tokens, but 1 to 50 are allowed"):
        load(limited)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (PromptSettings(source="nowhere.jsonl"), "does not exist"),
        (PromptSettings(source=__file__), "unknown suffix '.py'"),
        (PromptSettings(source="reasoning_gym:chain_sun"), "did you mean chain_sum"),
        (PromptSettings(source="reasoning_gym:chain_sum", task_settings={"terms": 2}), "known: .*min_terms"),
        (
            PromptSettings(source="reasoning_gym:chain_sum", task_settings={"min_terms": 9, "max_terms": 2}),
            "do not suit",
        ),
    ],
)
def test_bad_sources_are_refused(settings: PromptSettings, message: str):
    with pytest.raises(ConfigError, match=message):
        load(settings)


def test_wrong_columns_and_splits_are_named(tmp_path: Path):
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ConfigError, match="has no split 'train': it has test"):
        load(PromptSettings(source=str(tmp_path / "splits")))
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match="has no field 'question', it has prompt, answer, other"):
        load(PromptSettings(source=str(tmp_path / "rows.parquet"), prompt_field="question"))

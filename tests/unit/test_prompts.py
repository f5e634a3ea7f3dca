"""Prompts: sources agree, orders repeat, draws resume, and bad input is named."""

import dataclasses
import json
import logging
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_sgopd.config import PromptSettings
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.rollout.prompts import (
    NamedRows,
    Prompt,
    PromptSet,
    PromptStream,
    check_not_empty,
    check_usable,
    read_prompts,
    write_prompts,
)

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no such role') }}{% endif %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer(chat_template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A token for each byte, so that decoding gives back any text; <s> goes before what is not a chat."""
    alphabet = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template)


TOKENIZER = byte_tokenizer()
ROWS: list[dict[str, Any]] = [{"prompt": f"{i} + {i} =", "answer": str(2 * i), "other": i} for i in range(7)]
CHAIN_SUM = PromptSettings(source="reasoning_gym:chain_sum", size=20, seed=3, task_settings={"min_terms": 2})


@pytest.fixture(scope="module", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets_cache")))
        yield


def write_lines(path: Path, *lines: object) -> PromptSettings:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(text.encode(errors="surrogateescape"))
    return PromptSettings(source=str(path))


def load(settings: PromptSettings, exclude: PromptSet | tuple[()] = (), tokenizer: Any = TOKENIZER) -> PromptSet:
    """As the reader's process does, in this one."""
    left_out, sink = NamedRows(), pa.BufferOutputStream()
    write_prompts(read_prompts(settings, tokenizer, left_out), sink, left_out)
    prompts = PromptSet(sink.getvalue()).without(exclude)
    check_usable(prompts, settings)
    check_not_empty(prompts, settings.source)
    return prompts


def numbered(count: int) -> PromptSet:
    return PromptSet.of(Prompt(f"problem {i}", str(i), (i, i + 1), "0", "", {}) for i in range(count))


# ---- Sources ---------------------------------------------------------------------------------------------


def as_parquet(table: datasets.Dataset, path: Path) -> PromptSettings:
    table.to_parquet(path / "rows.parquet")
    return PromptSettings(source=str(path / "rows.parquet"))


def as_saved_folder(table: datasets.Dataset, path: Path) -> PromptSettings:
    table.save_to_disk(path / "saved")
    return PromptSettings(source=str(path / "saved"))


def as_saved_splits(table: datasets.Dataset, path: Path) -> PromptSettings:
    datasets.DatasetDict({"train": table.select([0]), "dev": table}).save_to_disk(path / "splits")
    return PromptSettings(source=str(path / "splits"), split="dev")


def as_parquet_folder(table: datasets.Dataset, path: Path) -> PromptSettings:
    (path / "parquet").mkdir()
    table.select([0]).to_parquet(path / "parquet/test.parquet")
    table.select([]).to_parquet(path / "parquet/train-0.parquet")
    table.to_parquet(path / "parquet/train-1.parquet")
    return PromptSettings(source=str(path / "parquet"))


def as_json_lines_folder(table: datasets.Dataset, path: Path) -> PromptSettings:
    (path / "lines").mkdir()
    rows = table.to_list()
    write_lines(path / "lines/train-0.jsonl", *rows[:3])
    write_lines(path / "lines/train-1.jsonl", *rows[3:])
    write_lines(path / "lines/test.jsonl", rows[0])
    return PromptSettings(source=str(path / "lines"))


def as_csv_folder(table: datasets.Dataset, path: Path) -> PromptSettings:
    (path / "csv").mkdir()
    table.to_csv(path / "csv/train.csv")
    return PromptSettings(source=str(path / "csv"))


FORMATS = [as_parquet, as_saved_folder, as_saved_splits, as_parquet_folder, as_json_lines_folder, as_csv_folder]


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_gives_the_same_prompts(
    tmp_path: Path, write: Callable[[datasets.Dataset, Path], PromptSettings]
) -> None:
    expected = load(write_lines(tmp_path / "rows.jsonl", *ROWS))
    loaded = load(write(datasets.Dataset.from_list(ROWS), tmp_path))
    assert list(loaded) == list(expected)
    assert loaded.digest == expected.digest
    assert [p.answer for p in expected] == [row["answer"] for row in ROWS]
    assert expected[1].text == "[user]1 + 1 =\n[assistant]"


def test_problems_of_a_task_are_the_same_prompts_when_they_come_from_a_file(tmp_path: Path) -> None:
    import reasoning_gym

    entries = reasoning_gym.create_dataset("chain_sum", size=20, seed=3, min_terms=2)
    generated = load(CHAIN_SUM)
    read = load(write_lines(tmp_path / "p.jsonl", *({"prompt": e["question"], "answer": e["answer"]} for e in entries)))
    assert [(p.id, p.text, p.token_ids, p.answer) for p in generated] == [
        (p.id, p.text, p.token_ids, p.answer) for p in read
    ]
    assert {p.task for p in generated} == {"chain_sum"} and {p.task for p in read} == {""}


@pytest.mark.parametrize("task", ["chain_sum", "countdown", "sudoku"])
def test_a_task_judges_its_own_answers_right_by_the_metadata_of_the_prompt(task: str) -> None:
    import reasoning_gym

    score = reasoning_gym.get_score_answer_fn(task)
    for prompt in load(PromptSettings(source=f"reasoning_gym:{task}", size=3)):
        assert json.loads(json.dumps(prompt.metadata)) == prompt.metadata
        assert score(prompt.answer, {"question": "", "answer": prompt.answer, "metadata": prompt.metadata}) == 1


def test_messages_and_text_become_the_same_prompt(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "1 + 1 ="}]
    system = [{"role": "system", "content": "Be brief."}, *messages]
    lines = [{"prompt": messages, "answer": "2"}, {"prompt": "1 + 1 =", "answer": 2}, {"prompt": system, "answer": 2.5}]
    chat, plain, with_system = load(write_lines(tmp_path / "chat.jsonl", *lines))
    assert chat.text == plain.text == "[user]1 + 1 =\n[assistant]"
    assert chat.token_ids == plain.token_ids == tuple(TOKENIZER(chat.text, add_special_tokens=False).input_ids)
    assert with_system.text == "[system]Be brief.\n[user]1 + 1 =\n[assistant]"
    assert (chat.answer, plain.answer, with_system.answer) == ("2", "2", "2.5")


def test_messages_in_a_parquet_file_are_read(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "1 + 1 ="}], "answer": 2}]
    (prompt,) = load(as_parquet(datasets.Dataset.from_list(rows), tmp_path))
    assert (prompt.text, prompt.answer) == ("[user]1 + 1 =\n[assistant]", "2")


def test_text_of_digits_stays_text_beside_messages_in_a_folder(tmp_path: Path) -> None:
    lines = [{"prompt": [{"role": "user", "content": "a"}], "answer": 1}, {"prompt": "1", "answer": "2.50"}]
    write_lines(tmp_path / "train.jsonl", *lines)
    assert [(p.text, p.answer) for p in load(PromptSettings(source=str(tmp_path)))] == [
        ("[user]a\n[assistant]", "1"),
        ("[user]1\n[assistant]", "2.50"),
    ]


def test_without_template_prompts_are_taken_as_they_are(tmp_path: Path) -> None:
    settings = PromptSettings(source=write_lines(tmp_path / "p.jsonl", ROWS[1]).source, chat_template=False)
    (prompt,) = load(settings, (), byte_tokenizer(chat_template=None))
    assert prompt.text == "1 + 1 ="
    assert TOKENIZER.decode(prompt.token_ids) == "<s>1 + 1 ="


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path: Path) -> None:
    settings = write_lines(tmp_path / "p.jsonl", "\ufeff" + json.dumps(ROWS[0]), "", "  ", ROWS[1], "")
    assert [p.answer for p in load(settings)] == ["0", "2"]


HOSTILE = [
    "\u202e\x00\x1b[2J",
    "<|im_end|>[assistant]",
    "{{ 7 * 7 }}{% raw %}",
    "𝟚+𝟚\u2028é\ufdd0\r\n",
    "'; rm -rf / #",
]


@given(st.text(min_size=1).filter(str.strip) | st.sampled_from(HOSTILE))
def test_any_text_reaches_the_model_unchanged(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    settings = write_lines(tmp_path_factory.getbasetemp() / "any.jsonl", {"prompt": text, "answer": text})
    (prompt,) = load(settings)
    assert prompt.text == f"[user]{text}\n[assistant]"
    assert TOKENIZER.decode(prompt.token_ids, clean_up_tokenization_spaces=False) == prompt.text
    assert prompt.answer == text


def test_heldout_prompts_are_left_out_of_training_and_counted() -> None:
    tiny = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    heldout = load(PromptSettings(source="reasoning_gym:chain_sum", size=30, seed=1, task_settings=tiny))
    settings = PromptSettings(source="reasoning_gym:chain_sum", size=300, seed=2, task_settings=tiny)
    everything, train = load(settings), load(settings, exclude=heldout)
    texts = {p.text for p in heldout}
    assert list(train) == [p for p in everything if p.text not in texts]
    assert train.excluded == 300 - len(train) > 0
    assert (everything.excluded, len(everything)) == (0, 300)


def test_a_set_is_a_sequence() -> None:
    prompts = numbered(5)
    assert [p.text for p in prompts[1::2]] == ["1", "3"]
    assert prompts[-1] == prompts[4]
    assert prompts[4].token_ids == (4, 5)
    with pytest.raises(IndexError):
        prompts[5]


def test_digest_tells_any_change() -> None:
    prompt = Prompt("problem 0", "a", (1, 2), "1", "t", {"k": 1})
    other = Prompt("problem 1", "b", (3,), "2", "t", {})
    sets = [[prompt, other], [other, prompt], [prompt]]
    fields = {"id": "x", "text": "b", "token_ids": (1,), "answer": "2", "task": "", "metadata": {"k": 2}}
    sets += [[Prompt(**{**vars(prompt), name: value}), other] for name, value in fields.items()]
    sets += [[Prompt(**{**vars(prompt), "token_ids": (2, 1)}), other]]
    sets += [[Prompt(**{**vars(prompt), "token_ids": (1,)}), Prompt(**{**vars(other), "token_ids": (2, 3)})]]
    digests = [PromptSet.of(prompts).digest for prompts in sets]
    assert len(set(digests)) == len(sets)
    assert digests[0] == PromptSet.of([prompt, other]).digest


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    first = load(as_parquet(table, tmp_path))
    second = load(as_parquet(table.select(range(3)), tmp_path))
    assert len(second) == 3 and second.digest != first.digest


def test_many_tokens_take_few_bytes_each(tmp_path: Path) -> None:
    settings = write_lines(tmp_path / "p.jsonl", *({"prompt": f"{i:0400}", "answer": "1"} for i in range(4000)))
    tracemalloc.start()
    prompts = load(settings)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tokens = sum(len(p.token_ids) for p in prompts)
    assert tokens > 1_600_000
    # 4 bytes are kept, twice while the array grows, beside 1 of text and one batch as Python lists (8 a token,
    # for a quarter of the rows); lists of all rows would take more than 8 for the tokens alone.
    assert peak / tokens < 16


# ---- Columns of public data sets -------------------------------------------------------------------------

PROBLEM = "What is 4 - 1?"
MESSAGES = [{"role": "user", "content": PROBLEM}]
SHAPES: dict[str, dict[str, Any]] = {
    "verl, DAPO": {"data_source": "x", "prompt": MESSAGES, "reward_model": {"ground_truth": "3", "style": "rule"}},
    "verl's GSM8K": {"prompt": MESSAGES, "reward_model": {"ground_truth": "3"}, "extra_info": {"answer": "#### 3"}},
    "OpenMathReasoning": {"problem": PROBLEM, "expected_answer": "3", "generated_solution": "\\boxed{4}"},
    "NuminaMath": {"problem": PROBLEM, "solution": "So it is $\\boxed{3}$.", "source": "x"},
    "NuminaMath 1.5": {"problem": PROBLEM, "solution": "So it is $\\boxed{4}$.", "answer": "3"},
    "Big-Math": {"problem": PROBLEM, "answer": "3", "source": "x", "llama8b_solve_rate": 0.5},
    "MATH": {"problem": PROBLEM, "solution": "Less one: $\\boxed{3}$", "level": "1", "type": "Algebra"},
    "DeepMath": {"question": PROBLEM, "final_answer": "3", "difficulty": 5.0, "r1_solution_1": "\\boxed{4}"},
    "GSM8K": {"question": PROBLEM, "answer": "Four less one is three.\n#### 3"},
    "OlympiadBench": {"question": PROBLEM, "solution": ["It is 3."], "final_answer": ["3"]},
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_public_data_sets_need_no_settings(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        write_lines(path, SHAPES[name])
    else:
        parquet.write_table(pa.Table.from_pylist([SHAPES[name]]), path)
    [prompt] = load(PromptSettings(source=str(path)))
    assert prompt.text == f"[user]{PROBLEM}\n[assistant]" and prompt.answer == "3"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "question": "y", "answer": "1"}, "prompt and question could be meant: set prompt_field"),
        (
            {"problem": "x", "answer": "1", "final_answer": "2"},
            "final_answer and answer could be meant: set answer_field",
        ),
        ({"problem": "x", "solution": "no box"}, "'solution' has no answer in a box ('no box'): leave the row out"),
        (
            {"question": "x", "answer": "work\n####"},
            "'answer' has no answer after #### ('work\\n####'): leave the row out",
        ),
    ],
)
def test_what_could_be_meant_is_not_guessed(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in refusal(write_lines(tmp_path / "p.jsonl", row))


def test_a_path_leads_into_a_column(tmp_path: Path) -> None:
    rows = [{"info": {"q": PROBLEM, "a": {"b": 3}}, "info.q": "literally"}, {"info": {"q": PROBLEM}, "info.q": "x"}]
    source = write_lines(tmp_path / "p.jsonl", *rows).source
    settings = PromptSettings(source=source, prompt_field="info.q", answer_field="info.a.b", unusable_rows="skip")
    prompts = load(settings)
    assert [(prompt.text, prompt.answer) for prompt in prompts] == [("[user]literally\n[assistant]", "3")]
    assert prompts.unusable == 1 and "line 2 has no field 'info.a.b'" in prompts.problems[0]


def test_rows_that_cannot_be_used_are_counted_and_left_out_or_refused_by_the_first_three(tmp_path: Path) -> None:
    rows = [ROWS[0], "{oops", {"prompt": "x", "answer": None}, {"prompt": " ", "answer": "1"}, ["x"], ROWS[1]]
    settings = write_lines(tmp_path / "p.jsonl", *rows)
    message = refusal(settings)
    assert all(f"line {number}" in message for number in (2, 3, 4)) and "line 5" not in message
    assert "4 rows in all cannot be used: unusable_rows: skip leaves them out" in message
    prompts = load(PromptSettings(source=settings.source, unusable_rows="skip"))
    assert [prompt.answer for prompt in prompts] == ["0", "2"] and prompts.unusable == 4
    assert [prompt.id for prompt in prompts] == ["problem 0", "problem 3"], "their places among those that can be read"


@pytest.mark.parametrize(
    ("value", "text"), [(0.00005, "0.00005"), (3.0, "3"), (12, "12"), (1e21, "1000000000000000000000")]
)
def test_numbers_are_written_as_decimals(value: float, text: str, tmp_path: Path) -> None:
    [prompt] = load(write_lines(tmp_path / "p.jsonl", {"prompt": "x", "answer": value}))
    assert prompt.answer == text


def test_numbers_of_few_bits_are_the_shortest_that_are_theirs(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["x", "y"], "answer": pa.array([0.1, 2.5], pa.float32())})
    parquet.write_table(table, tmp_path / "p.parquet")
    assert [prompt.answer for prompt in load(PromptSettings(source=str(tmp_path / "p.parquet")))] == ["0.1", "2.5"]


# ---- Order -----------------------------------------------------------------------------------------------

DRAWS = st.lists(st.integers(0, 15), min_size=1, max_size=10)


@given(st.integers(1, 20), st.integers(0, 1000), DRAWS)
def test_any_division_into_draws_gives_the_same_sequence(size: int, seed: int, draws: list[int]) -> None:
    whole = PromptStream(numbered(size), seed).next(sum(draws))
    stream = PromptStream(numbered(size), seed)
    assert [p for n in draws for p in stream.next(n)] == whole
    assert len({p.id for p in whole}) == len(whole)


@given(st.integers(1, 20), st.integers(0, 1000), st.integers(0, 70), st.integers(0, 30), st.integers(0, 70))
def test_a_stream_goes_on_from_a_position(size: int, seed: int, before: int, after: int, moved: int) -> None:
    whole = PromptStream(numbered(size), seed).next(before + after)
    sought = PromptStream(numbered(size), seed)
    sought.next(moved)
    sought.seek(before)
    assert sought.next(after) == whole[before:]


@given(st.integers(1, 30), st.integers(0, 1000))
def test_every_epoch_holds_each_prompt_once(size: int, seed: int) -> None:
    stream = PromptStream(numbered(size), seed)
    for _ in range(3):
        assert sorted(int(p.text) for p in stream.next(size)) == list(range(size))


def test_seed_and_epoch_decide_the_order() -> None:
    streams = [PromptStream(numbered(50), seed) for seed in (0, 1)]
    orders = [tuple(p.text for p in stream.next(50)) for stream in streams for _ in range(2)]
    assert len({*orders, tuple(map(str, range(50)))}) == 5


def test_the_order_is_that_of_earlier_versions() -> None:
    # Values of numpy 2.3.5: another order would break resuming.
    drawn = PromptStream(numbered(6), 1234).next(12)
    assert [int(p.text) for p in drawn] == [3, 0, 1, 4, 2, 5, 0, 5, 4, 2, 1, 3]
    assert (drawn[0].id, drawn[6].id) == ("epoch 0, problem 3", "epoch 1, problem 0")


# ---- Bad input -------------------------------------------------------------------------------------------


def refusal(settings: PromptSettings, tokenizer: Any = TOKENIZER, exclude: Any = ()) -> str:
    with pytest.raises(ConfigError) as error:
        load(settings, exclude, tokenizer)
    assert "\n" not in str(error.value)
    return str(error.value)


def user(content: object, role: object = "user") -> dict[str, object]:
    return {"prompt": [{"role": role, "content": content}], "answer": "1"}


BAD_LINES: dict[str, tuple[list[Any], str]] = {
    "no JSON": ([ROWS[0], "{oops"], "line 2 is no JSON (Expecting property name"),
    "nested without end": ([ROWS[0], "[" * 200_000], "line 2 is no JSON (maximum recursion depth"),
    "no object": (["[1]"], "line 1 must be an object with fields, not [1]"),
    "no answer field": (
        [ROWS[0], "", {"prompt": "x", "anser": "1"}],
        "line 3 has no field 'answer', it has prompt, anser: set answer_field (did you mean anser?)",
    ),
    "no prompt field": (
        [{"text": "x", "answer": "1"}],
        "line 1 has no column of a name that is known for prompt_field, it has text, answer: set prompt_field",
    ),
    "no fields": (["{}"], "line 1 has no column of a name that is known for prompt_field, it has none"),
    "empty answer": ([{"prompt": "x", "answer": " "}], "line 1: 'answer' is missing or empty (' ')"),
    "null answer": ([{"prompt": "x", "answer": None}], "line 1: 'answer' is missing or empty (None)"),
    "answer that is no number": (['{"prompt": "x", "answer": NaN}'], "line 1: 'answer' is missing or empty (nan)"),
    "answer that is a list": (
        [{"prompt": "x", "answer": [1, 2]}],
        "line 1: 'answer' must be text or a number, not [1, 2]",
    ),
    "answer that is a truth": ([{"prompt": "x", "answer": True}], "'answer' must be text or a number, not True"),
    "prompt that is no text": ([{"prompt": 3, "answer": "1"}], "line 1: 'prompt' must be text or a list"),
    "messages without content": ([user(None)], "line 1: 'prompt' must be text or a list of chat messages"),
    "no messages": ([{"prompt": [], "answer": "1"}], "line 1: 'prompt' is empty"),
    "empty prompt": ([{"prompt": " ", "answer": "1"}], "line 1: 'prompt' is empty"),
    "role that the template refuses": ([user("x", "wizard")], "template refuses the messages (no such role)"),
    "half a pair": ([{"prompt": "\ud800", "answer": "1"}], "line 1: 'prompt' is no valid Unicode text: '\\ud800'"),
    "half a pair in a message": ([user("\ud800")], "line 1: 'prompt' is no valid Unicode text"),
    "half a pair in an answer": ([{"prompt": "x", "answer": "\ud800"}], "line 1: 'answer' is no valid Unicode text"),
    "bytes that are no UTF-8": (['{"prompt": "\udcff", "answer": "1"}'], "line 1: 'prompt' is no valid Unicode text"),
    "empty file": ([], "holds no prompts: give a source with at least one row"),
    "blank file": (["", ""], "holds no prompts"),
}


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines_are_named(tmp_path: Path, name: str, folder: bool) -> None:
    lines, message = BAD_LINES[name]
    file = write_lines(tmp_path / "train.jsonl", *lines)
    refused = refusal(PromptSettings(source=str(tmp_path)) if folder else file)
    assert message in refused
    assert str(tmp_path) in refused and (not message.startswith("line") or f"{file.source}, line" in refused)


def test_long_prompts_are_named_with_their_length(tmp_path: Path) -> None:
    source = write_lines(
        tmp_path / "long.jsonl", {"prompt": "1" * 25, "answer": "1"}, {"prompt": "1" * 26, "answer": "1"}
    )
    template = len("[user]\n[assistant]")
    settings = PromptSettings(source=source.source, max_prompt_tokens=25 + template)
    assert f"line 2: the prompt has {26 + template} tokens, but at most {25 + template} are allowed" in refusal(
        settings
    )
    assert len(load(PromptSettings(source=source.source, max_prompt_tokens=26 + template))) == 2


def test_messages_without_template_are_refused(tmp_path: Path) -> None:
    settings = PromptSettings(source=write_lines(tmp_path / "p.jsonl", user("x")).source, chat_template=False)
    assert "line 1: 'prompt' holds chat messages, which need chat_template: true" in refusal(settings)


def test_a_tokenizer_without_template_is_refused(tmp_path: Path) -> None:
    settings = write_lines(tmp_path / "p.jsonl", *ROWS)
    assert "has no chat template: set chat_template: false" in refusal(settings, byte_tokenizer(chat_template=None))


def test_a_template_gets_its_arguments_and_refuses_what_it_does_not_read(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(
        TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}<t></t>{% endif %}"
    )

    def settings(**arguments: Any) -> PromptSettings:
        source = write_lines(tmp_path / "p.jsonl", *ROWS).source
        return PromptSettings(source=source, chat_template_arguments=arguments)

    assert load(settings(), (), tokenizer)[0].text.endswith("[assistant]")
    quick = load(settings(enable_thinking=False), (), tokenizer)[0]
    assert quick.text.endswith("[assistant]<t></t>") and len(quick.token_ids) == len(quick.text)
    for wrong in ("enable_thinkin", "chat_template", "tokenize", "x]|("):
        assert f"chat_template_arguments has {wrong!r}, which" in refusal(settings(**{wrong: False}), tokenizer)
    plain = dataclasses.replace(settings(enable_thinking=False), chat_template=False)
    assert "has no use with chat_template: false" in refusal(plain, tokenizer)


def test_a_system_message_and_a_suffix_go_before_and_behind_every_prompt(tmp_path: Path) -> None:
    def settings(*rows: Any, **changes: Any) -> PromptSettings:
        return dataclasses.replace(write_lines(tmp_path / "p.jsonl", *rows), prompt_suffix=" Why?", **changes)

    assert load(settings(ROWS[0]))[0].text == "[user]0 + 0 = Why?\n[assistant]"
    both = settings(ROWS[0], system_prompt="Be brief.")
    assert load(both)[0].text == "[system]Be brief.\n[user]0 + 0 = Why?\n[assistant]"
    own = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert load(settings({"prompt": own, "answer": "1"}, system_prompt="no"))[0].text.startswith(
        "[system]s\n[user]u Why?"
    )
    assert load(settings(ROWS[0], chat_template=False))[0].text == "0 + 0 = Why?"
    assert "system_prompt has no use with" in refusal(settings(ROWS[0], system_prompt="s", chat_template=False))


def test_a_template_that_does_not_begin_the_answer_is_refused(tmp_path: Path) -> None:
    template = "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    settings = write_lines(tmp_path / "p.jsonl", *ROWS)
    assert "has no generation prompt" in refusal(settings, byte_tokenizer(chat_template=template))
    with_it = template + "{% if add_generation_prompt %}[assistant]{% endif %}"
    assert load(settings, (), byte_tokenizer(chat_template=with_it))[0].text.endswith("[assistant]")


def test_training_prompts_that_are_all_held_out_are_refused(tmp_path: Path) -> None:
    settings = write_lines(tmp_path / "p.jsonl", *ROWS)
    assert "all 7 prompts are among the held-out ones" in refusal(settings, exclude=load(settings))


def task(name: str, **task_settings: object) -> PromptSettings:
    return PromptSettings(source=f"reasoning_gym:{name}", size=3, task_settings=task_settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (PromptSettings(source="nowhere.jsonl"), "nowhere.jsonl does not exist: give a .jsonl or .parquet file"),
        (PromptSettings(source=__file__), "unknown suffix '.py'"),
        (task("chain_sun"), "no task 'chain_sun' (did you mean chain_sum"),
        (task("chain_sum", min_trems=2), "chain_sum has no setting 'min_trems' (did you mean min_terms"),
        (task("chain_sum", size=2), "task_settings.size is not read: set size itself"),
        (
            task("chain_sum", min_terms=9, max_terms=2),
            "'max_terms': 2}: AssertionError('max_terms must be >= min_terms')",
        ),
        (
            task("chain_sum", min_terms="two"),
            "chain_sum does not work with task_settings {'min_terms': 'two'}: TypeError",
        ),
        (task("calendar_arithmetic", tasks=[]), "does not work with task_settings {'tasks': []}: IndexError"),
        (
            task("graph_color"),
            "problem 0: 'answer' is missing or empty (None), but every prompt needs a reference answer",
        ),
        (task("rearc"), "scorer of 'rearc' gives its own answer 0.05 instead of 1.0"),
    ],
)
def test_bad_sources_are_refused(settings: PromptSettings, message: str) -> None:
    assert message in refusal(settings)


def test_wrong_columns_and_splits_are_named(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    splits = as_saved_splits(table, tmp_path)
    assert "has no split 'train2', it has train, dev: set split" in refusal(
        PromptSettings(source=splits.source, split="train2")
    )
    lines = as_json_lines_folder(table, tmp_path)
    assert "has no split 'dev', it has train, test: set split" in refusal(
        PromptSettings(source=lines.source, split="dev")
    )
    columns = as_parquet(table, tmp_path)
    assert "has no field 'question', it has prompt, answer, other: set prompt_field" in refusal(
        PromptSettings(source=columns.source, prompt_field="question")
    )


def test_sources_without_rows_are_refused(tmp_path: Path) -> None:
    columns = datasets.Features({"prompt": datasets.Value("string"), "answer": datasets.Value("string")})
    none = datasets.Dataset.from_dict({"prompt": [], "answer": []}, features=columns)
    (tmp_path / "folder").mkdir()
    for name in ("none.parquet", "folder/train.parquet"):
        parquet.write_table(none.data.table, tmp_path / name)
    none.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": none}).save_to_disk(tmp_path / "splits")
    for name in ("none.parquet", "folder", "saved", "splits"):
        assert f"{tmp_path / name} holds no prompts" in refusal(PromptSettings(source=str(tmp_path / name)))


def test_files_that_are_no_dataset_are_refused_and_nothing_else_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("datasets")
    log.addHandler(caplog.handler)
    for name in ("script", "nothing", "json"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    (tmp_path / "script/script.py").write_text("raise SystemExit('this code ran')")
    (tmp_path / "json/train.json").write_text('{"prompt": "1"}\n{oops')
    reasons = {"broken.parquet": "Parquet", "script": "script.py", "nothing": "data files", "json": "JSON parse error"}
    datasets.logging.set_verbosity_warning()
    datasets.enable_progress_bars()
    for name, reason in reasons.items():
        message = refusal(PromptSettings(source=str(tmp_path / name)))
        assert message.startswith(f"{tmp_path / name} cannot be read as a dataset (") and reason in message
    log.removeHandler(caplog.handler)
    assert caplog.text == "" and capfd.readouterr() == ("", "")
    assert datasets.logging.get_verbosity() == logging.WARNING and not datasets.are_progress_bars_disabled()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    settings = write_lines(tmp_path / "p.jsonl", *ROWS)
    (tmp_path / "p.jsonl").chmod(0)
    assert "cannot be read (Permission denied): change its permissions" in refusal(settings)


MIXED = {"chain_sum": {"min_terms": 2, "max_terms": 2}, "gcd": {"min_numbers": 2, "max_numbers": 2}}


def test_several_tasks_take_turns_each_by_its_own_settings_and_scorer() -> None:
    mixed = load(PromptSettings("reasoning_gym:chain_sum+gcd", size=5, seed=7, task_settings=MIXED))
    assert [prompt.task for prompt in mixed] == ["chain_sum", "gcd", "chain_sum", "gcd", "chain_sum"]
    for task, size in (("chain_sum", 3), ("gcd", 2)):
        alone = load(PromptSettings(f"reasoning_gym:{task}", size=size, seed=7, task_settings=MIXED[task]))
        assert [p.text for p in mixed if p.task == task] == [p.text for p in alone]
    assert [prompt.id for prompt in mixed] == [f"problem {i}" for i in range(5)]


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("chain_sum+gcd", {"gdc": {}}, "task_settings.gdc is not of one of the tasks .*did you mean gcd"),
        ("chain_sum+gcd", {"gcd": 3}, "task_settings.gcd must hold the settings of that task, not 3"),
        ("chain_sum+chain_sum", {}, "must name different tasks"),
        ("chain_sum+nothing", {}, "reasoning-gym has no task 'nothing'"),
        ("chain_sum+gcd", {"gcd": {"min_number": 2}}, "gcd has no setting 'min_number'"),
    ],
)
def test_bad_mixtures(source: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(PromptSettings(f"reasoning_gym:{source}", size=8, task_settings=settings))

"""Responses as lines of samples.jsonl."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_sgopd.monitor.samples import token_texts


@pytest.fixture(scope="module")
def byte_tokenizer() -> Any:
    """One token a byte, as byte-level tokenizers fall back to for rare characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("text", ["", "2 + 3", "né\n", "汉字 🤗!", "a</script>b", "👩‍🚀"])
def test_token_texts_join_to_the_text_and_no_character_is_torn(byte_tokenizer: Any, text: str) -> None:
    ids = byte_tokenizer.encode(text)
    texts = token_texts(byte_tokenizer, ids)
    assert len(texts) == len(ids) == len(text.encode())
    assert "".join(texts) == text
    assert all("\ufffd" not in part for part in texts)


def test_bytes_that_are_no_text_are_shown_and_cost_a_few_decodes_a_token(byte_tokenizer: Any) -> None:
    [lone] = byte_tokenizer.convert_tokens_to_ids([bytes_letter(0x80)])
    calls = []

    class Counting:
        def decode(self, ids: list[int]) -> str:
            calls.append(len(ids))
            return byte_tokenizer.decode(ids)

    ids = [lone] * 500 + byte_tokenizer.encode("end")
    texts = token_texts(Counting(), ids)
    assert "".join(texts) == byte_tokenizer.decode(ids) and "".join(texts).endswith("end")
    assert len(texts) == len(ids) and len(calls) == 2 * len(ids) and max(calls) <= 8


def test_a_space_that_the_decoder_drops_at_the_start_of_a_text_is_kept_within_it() -> None:
    vocabulary = [("▁two", 0.0), ("▁words", 0.0), ("<unk>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert token_texts(fast, [0, 1, 1]) == ["two", " words", " words"]


def bytes_letter(byte: int) -> str:
    """How byte-level tokenizers write a byte that is no printable character: the GPT-2 table."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    return chr(byte) if byte in printable else chr(256 + sum(b not in printable for b in range(byte)))

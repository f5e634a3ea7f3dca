"""The tokenizer in a model's folder."""

from __future__ import annotations

from typing import Any

from megatron_sgopd.errors import ConfigError


def load_tokenizer(path: str) -> Any:
    """The tokenizer in a model's folder.

    Raises:
        ConfigError: it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"the tokenizer in {path} cannot be read: {error}") from None

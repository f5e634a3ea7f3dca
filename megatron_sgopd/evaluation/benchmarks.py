"""Files of problems as benchmarks publish them: which columns hold the problem and its answer.

AIME24, AIME25    Problem, Answer · problem, answer · question, answer
AMC23, MATH-500   problem, answer
GSM8K             question, answer (worked, the number after ####)
OlympiadBench     question, final_answer (a list of one)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from megatron_sgopd.config import PromptSettings
from megatron_sgopd.errors import ConfigError

_PROMPTS = ("prompt", "problem", "Problem", "question")
_ANSWERS = ("final_answer", "answer", "Answer")


def benchmark_prompts(path: Path, chat_template: bool = True) -> PromptSettings:
    """How to read a .jsonl or .parquet file of problems.

    Raises:
        ConfigError: it cannot be read, or has no columns of the known names.
    """
    row = _first_row(path)
    prompt, answer = (next((name for name in names if name in row), None) for names in (_PROMPTS, _ANSWERS))
    if prompt is None or answer is None:
        raise ConfigError(
            f"{path} has the columns {', '.join(row) or 'none'}: one of {', '.join(_PROMPTS)} and one of "
            f"{', '.join(_ANSWERS)} are needed; rename them"
        )
    form: Literal["plain", "worked", "list"]
    form = "list" if isinstance(row[answer], list) else "worked" if "\n####" in str(row[answer]) else "plain"
    return PromptSettings(
        source=str(path), prompt_field=prompt, answer_field=answer, answer_form=form, chat_template=chat_template
    )


def _first_row(path: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            known = [name for name in file.schema_arrow.names if name in (*_PROMPTS, *_ANSWERS)]
            batches = file.iter_batches(batch_size=1, columns=known)
            first: dict[str, Any] = next((row for batch in batches for row in batch.to_pylist()), {})
            return dict.fromkeys(file.schema_arrow.names) | first
        with path.open(encoding="utf-8-sig") as file:
            row = json.loads(next((line for line in file if line.strip()), "{}"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as .jsonl or .parquet: {' '.join(str(error).split())}") from None
    return row if isinstance(row, dict) else {}

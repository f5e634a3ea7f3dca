"""Files of problems as benchmarks publish them: which columns hold the problem and its answer.

AIME24, AIME25    Problem, Answer · problem, answer · question, answer
AMC23, MATH-500   problem, answer
GSM8K             question, answer (worked, the number after ####)
OlympiadBench     question, final_answer (a list of one)
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_sgopd.config import PromptSettings
from megatron_sgopd.errors import ConfigError

_PROMPTS = ("prompt", "problem", "Problem", "question")
_ANSWERS = ("final_answer", "answer", "Answer")


def benchmark_prompts(path: Path, chat_template: bool = True) -> PromptSettings:
    """How to read a .jsonl or .parquet file of problems.

    Raises:
        ConfigError: it cannot be read, or has no columns of the known names.
    """
    columns = _columns(path)
    prompt, answer = (next((name for name in names if name in columns), None) for names in (_PROMPTS, _ANSWERS))
    if prompt is None or answer is None:
        raise ConfigError(
            f"{path} has the columns {', '.join(columns) or 'none'}: one of {', '.join(_PROMPTS)} and one of "
            f"{', '.join(_ANSWERS)} are needed; rename them"
        )
    return PromptSettings(source=str(path), prompt_field=prompt, answer_field=answer, chat_template=chat_template)


def _columns(path: Path) -> list[str]:
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            return list(pq.read_schema(path).names)
        with path.open(encoding="utf-8-sig") as file:
            first = next((line for line in file if line.strip()), "{}")
        row = json.loads(first)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as .jsonl or .parquet: {' '.join(str(error).split())}") from None
    return list(row) if isinstance(row, dict) else []

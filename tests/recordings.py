"""A recorded step with one response, as a run writes it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_sgopd.rollout.prompts import Prompt


def recorded_step(folder: Path, of: Prompt, **changes: Any) -> Path:
    """Write its .json into `folder`.

    Args:
        changes: fields of the response.
    """
    response = {"prompt": 0, "sample": 0, "token_ids": [3, 4], "behaviour": [-1.0, -1.0]}
    response |= {"truncated": False, "from_teacher": False} | changes
    content = {
        "step": 0,
        "prompts": [dataclasses.asdict(dataclasses.replace(of, id=f"epoch 0, {of.id}"))],
        "trajectories": [response],
        "taught": {"weight": 0.0, "approval": float("nan"), "shortfall": 0.0},
    }
    (folder / "step_000000.json").write_text(json.dumps(content))
    return folder

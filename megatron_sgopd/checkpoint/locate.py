"""Where a checkpoint is, and what it says of where it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_sgopd.checkpoint.completeness import TRACKER, step_folder
from megatron_sgopd.checkpoint.files import CONVERSION
from megatron_sgopd.checkpoint.restricted import METADATA
from megatron_sgopd.common.data_files import read_json, read_yaml
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.monitor.output import RESOLVED


def find_checkpoint(path: Path, step: int | None = None) -> Path:
    """The folder that holds the blocks: `path` itself, the newest complete one in it, or that of `step`.

    Args:
        path: an `iter_…` or `release` folder, a Megatron `--save` folder, or a run folder of this project.

    Raises:
        ConfigError: there is none.
    """
    for root in (path, path / "checkpoints"):
        if step is None and (root / METADATA).is_file():
            return root
        tracker = root / TRACKER
        if not tracker.is_file():
            continue
        newest = tracker.read_text().strip() if step is None else str(step)
        if newest != "release" and not newest.isdecimal():
            raise ConfigError(f"{tracker} holds {newest!r}, not an iteration: mend it, or give the iter_… folder")
        folder = root / newest if newest == "release" else step_folder(root, int(newest))
        if not (folder / METADATA).is_file():
            steps = sorted(found.name for found in root.iterdir() if (found / METADATA).is_file())
            raise ConfigError(f"{folder} is no complete checkpoint: {root} has {', '.join(steps) or 'none'}")
        return folder
    raise ConfigError(
        f"{path} is no torch_dist checkpoint: give a folder with {TRACKER}, an iter_… folder, or a run folder"
    )


def read_run(folder: Path) -> dict[str, Any]:
    """The resolved recipe of a run folder.

    Raises:
        ConfigError: it is not one.
    """
    path = folder / RESOLVED
    if not path.is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no {RESOLVED}")
    return read_yaml(path)


def source_of(checkpoint: Path) -> Path:
    """The Hugging Face folder that a checkpoint was made from."""
    record = checkpoint.parent / CONVERSION
    if record.is_file():
        return Path(str(read_json(record).get("source")))
    if (checkpoint.parent.parent / RESOLVED).is_file():
        return Path(read_run(checkpoint.parent.parent)["model"]["path"])
    raise ConfigError(
        f"{checkpoint} does not say what model it is of: give --like FOLDER, a Hugging Face folder with its "
        "config.json and tokenizer"
    )

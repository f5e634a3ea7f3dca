"""Which of a run's own checkpoints are whole: each has a manifest, written after everything else."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sgopd.checkpoint.files import sync_path, write_atomically
from megatron_sgopd.common.data_files import read_json
from megatron_sgopd.errors import ConfigError

MANIFEST = "manifest.json"
TRACKER = "latest_checkpointed_iteration.txt"
"""Where Megatron says which iteration is the newest one."""
BLOCKS = ".distcp"
"""Suffix of the files with tensors, of which digests are only taken where they are asked for: they may be terabytes."""
_BROKEN, _CHANGING = ".broken", ".changing"
_STEP = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written."""

    bytes: int
    digest: str | None
    """blake2b of the content; None where it was not taken."""


def steps_saved(checkpoints: Path) -> dict[int, Path]:
    """Folders of a run's checkpoints by step, newest first, whole or not."""
    found = {int(match[1]): path for path in checkpoints.glob("iter_*") if (match := _STEP.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


def step_folder(checkpoints: Path, step: int) -> Path:
    """Megatron's name for a checkpoint."""
    return checkpoints / f"iter_{step:07d}"


def steps_whole(checkpoints: Path) -> dict[int, Path]:
    """Those of them with a manifest."""
    return {step: path for step, path in steps_saved(checkpoints).items() if (path / MANIFEST).is_file()}


def newest_step(checkpoints: Path) -> int:
    """Of the newest checkpoint with a manifest; 0 if there is none."""
    return next(iter(steps_whole(checkpoints)), 0)


def record(path: Path, with_digest: bool) -> FileRecord:
    """What a manifest says of a file."""
    digest = None
    if with_digest or path.suffix != BLOCKS:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return FileRecord(path.stat().st_size, digest)


def write_manifest(checkpoint: Path, records: Mapping[str, FileRecord]) -> None:
    """Declare a checkpoint whole."""
    content = {"files": {name: vars(found) for name, found in sorted(records.items())}}
    write_atomically(checkpoint / MANIFEST, json.dumps(content, indent=1).encode())
    sync_path(checkpoint)


def check_complete(checkpoint: Path, with_digests: bool) -> None:
    """Compare a checkpoint with its manifest: names and sizes, and the digests of all files that load by unpickling.

    Args:
        with_digests: those of the tensors too, where the manifest has them; reads the whole checkpoint.

    Raises:
        ConfigError: there is no manifest, or naming the first file that is missing or another one.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise ConfigError(f"{checkpoint.name} has no {MANIFEST}")
    try:
        files = {name: FileRecord(**stored) for name, stored in read_json(path)["files"].items()}
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{checkpoint.name}/{MANIFEST} cannot be read ({error})") from None
    for name, expected in files.items():
        if not (checkpoint / name).is_file():
            raise ConfigError(f"{checkpoint.name}/{name} is missing")
        if (size := (checkpoint / name).stat().st_size) != expected.bytes:
            raise ConfigError(f"{checkpoint.name}/{name} has {size} bytes, and was written with {expected.bytes}")
        found = record(checkpoint / name, with_digests and expected.digest is not None)
        if found.digest is not None and found.digest != expected.digest:
            raise ConfigError(f"{checkpoint.name}/{name} has another digest than when it was written")


def choose_newest(checkpoints: Path, with_digests: bool) -> tuple[int, list[str]]:
    """Make the newest whole checkpoint the one that Megatron loads, and put the others after it out of the way.

    What an interrupted save or removal left is removed. A checkpoint that is broken, or that nobody here saved, is
    renamed to `iter_….broken`, and kept.

    Returns:
        Its step, 0 if the run has none yet, and why those after it were skipped.

    Raises:
        ConfigError: there are some, and none is whole: going on would begin anew.
    """
    skipped, chosen = remove_unfinished(checkpoints), 0
    for step, path in steps_saved(checkpoints).items():
        try:
            check_complete(path, with_digests)
        except ConfigError as error:
            skipped.append(f"{error}; kept as {path.name}{_BROKEN}")
            shutil.rmtree(path.with_name(path.name + _BROKEN), ignore_errors=True)
            path.rename(path.with_name(path.name + _BROKEN))
        else:
            chosen = step
            break
    if chosen:
        write_atomically(checkpoints / TRACKER, str(chosen).encode())
    elif any(checkpoints.glob(f"iter_*{_BROKEN}")):
        raise ConfigError(
            f"no checkpoint in {checkpoints} is whole ({'; '.join(skipped) or 'they were broken before'}): "
            "restore one of those that are kept as iter_….broken, or remove the folder to begin anew"
        )
    else:
        (checkpoints / TRACKER).unlink(missing_ok=True)
    return chosen, skipped


def begin_change(checkpoint: Path) -> None:
    """Note that a checkpoint is about to be written or removed."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    _mark(checkpoint).touch()


def end_change(checkpoint: Path) -> None:
    """Note that it has been."""
    _mark(checkpoint).unlink(missing_ok=True)


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a whole checkpoint; from the manifest on, which goes first, it counts as unfinished."""
    begin_change(checkpoint)
    (checkpoint / MANIFEST).unlink()
    shutil.rmtree(checkpoint)
    end_change(checkpoint)


def remove_unfinished(checkpoints: Path) -> list[str]:
    """Remove what interrupted saves and removals left; what to say of each."""
    said = []
    for mark in sorted(checkpoints.glob(f"iter_*{_CHANGING}"), reverse=True):
        checkpoint = mark.with_suffix("")
        if checkpoint.is_dir() and not (checkpoint / MANIFEST).is_file():
            shutil.rmtree(checkpoint)
            said.append(f"{checkpoint.name} has no {MANIFEST}: whoever saved or removed it was interrupted; removed")
        mark.unlink()
    return said


def _mark(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + _CHANGING)


def expired(steps: Sequence[int], keep_last: int | None, keep_every: int | None) -> list[int]:
    """Steps whose checkpoints may go: not among the last `keep_last`, and no multiple of `keep_every`.

    Args:
        steps: those with a manifest, newest first.
        keep_last: None keeps all.
        keep_every: None keeps none for this.
    """
    if keep_last is None:
        return []
    return [step for step in steps[keep_last:] if not (keep_every and step % keep_every == 0)]

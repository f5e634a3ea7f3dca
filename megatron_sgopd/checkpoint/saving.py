"""What the ranks do together around Megatron's own saving and loading of a run's checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sgopd.checkpoint.completeness import (
    MANIFEST,
    choose_newest,
    expired,
    record,
    step_folder,
    steps_whole,
    write_manifest,
)
from megatron_sgopd.config import CheckpointSettings
from megatron_sgopd.errors import ConfigError
from megatron_sgopd.monitor.output import console


class Saves:
    """The checkpoints of a run: all methods are called by every rank at the same points."""

    def __init__(self, settings: CheckpointSettings) -> None:
        self._settings = settings
        self._unsettled: list[Path] = []
        self.newest = 0
        """Steps in the checkpoint that was loaded or saved last."""

    def saved(self, checkpoints: Path, step: int) -> None:
        """Megatron has begun to save a checkpoint, and has ended unless it saves in the background."""
        self._unsettled.append(step_folder(checkpoints, step))
        self.newest = step

    def settle(self) -> int:
        """Write the manifests of checkpoints that Megatron has written, and remove those that are not kept.

        Returns:
            How many bytes they have.
        """
        total = 0
        for checkpoint in self._unsettled:
            names = _from_first(lambda checkpoint=checkpoint: sorted(path.name for path in checkpoint.iterdir()))
            mine = names[dist.get_rank() :: dist.get_world_size()]
            with_digest = self._settings.verify == "digests"
            records = {name: record(checkpoint / name, with_digest) for name in mine}
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, records)
            written = {name: found for part in gathered for name, found in part.items()}
            total += sum(found.bytes for found in written.values())
            if dist.get_rank() == 0:
                write_manifest(checkpoint, written)
                self._remove_expired(checkpoint.parent)
        if self._unsettled:
            dist.barrier()  # nobody goes on, or ends, before it is on disk
        self._unsettled.clear()
        return total

    def _remove_expired(self, checkpoints: Path) -> None:
        whole = steps_whole(checkpoints)
        for step in expired(list(whole), self._settings.keep_last, self._settings.keep_every):
            (whole[step] / MANIFEST).unlink()  # from here on it counts as unfinished
            shutil.rmtree(whole[step])

    def choose(self, checkpoints: Path) -> None:
        """Have Megatron load the newest checkpoint that is whole, and say which were skipped.

        Raises:
            ConfigError: there were whole ones, and none is any more.
        """

        def choose() -> tuple[int, list[str], str | None]:
            try:
                return *choose_newest(checkpoints, self._settings.verify == "digests"), None
            except ConfigError as error:
                return 0, [], str(error)

        self.newest, skipped, error = _from_first(choose)
        if error:
            raise ConfigError(error)
        if dist.get_rank() == 0:
            for reason in skipped:
                console().print(f"checkpoint skipped: {reason}", markup=False)


def _from_first(make: Any) -> Any:
    """What the first rank makes, on every rank."""
    found = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]

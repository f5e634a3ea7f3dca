"""What the ranks do together around Megatron's own saving and loading of a run's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sgopd.checkpoint.completeness import (
    begin_change,
    choose_newest,
    end_change,
    expired,
    record,
    remove_checkpoint,
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

    def begin(self, checkpoints: Path, step: int) -> None:
        """Megatron is about to save a checkpoint."""
        if dist.get_rank() == 0:
            begin_change(step_folder(checkpoints, step))

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
            mine = _share([path.name for path in checkpoint.iterdir()])
            with_digest = self._settings.verify == "digests"
            records = {name: record(checkpoint / name, with_digest) for name in mine}
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, records)
            written = {name: found for part in gathered for name, found in part.items()}
            total += sum(found.bytes for found in written.values())
            if dist.get_rank() == 0:
                write_manifest(checkpoint, written)
                end_change(checkpoint)
                self._remove_expired(checkpoint.parent)
        if self._unsettled:
            dist.barrier()  # nobody goes on, or ends, before it is on disk
        self._unsettled.clear()
        return total

    def _remove_expired(self, checkpoints: Path) -> None:
        whole = steps_whole(checkpoints)
        for step in expired(list(whole), self._settings.keep_last, self._settings.keep_every):
            remove_checkpoint(whole[step])

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
                console().print(f"checkpoint skipped: {reason}")


def _share(seen: list[str]) -> list[str]:
    """This rank's part of all files, each of which some rank sees: on network file systems others may not yet."""
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, seen)
    seers: dict[str, list[int]] = {}
    for rank, names in enumerate(by_rank):
        for name in names:
            seers.setdefault(name, []).append(rank)
    return [name for k, (name, ranks) in enumerate(sorted(seers.items())) if ranks[k % len(ranks)] == dist.get_rank()]


def _from_first(make: Any) -> Any:
    """What the first rank makes, on every rank."""
    found = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]

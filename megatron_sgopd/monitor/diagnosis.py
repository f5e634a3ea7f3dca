"""What ended an attempt: the first thing that went wrong, where, and in which stage."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_sgopd.monitor.heartbeat import Beat, read_beats, stack_file
from megatron_sgopd.monitor.output import LOGS, error_files

_LOST_PEER = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "EOFError"),
    "NCCL communicator was aborted",
)
"""In errors of ranks whose peer went away."""
_LONGEST_ERROR = 1 << 20
_NO_MEMORY = ("OutOfMemoryError", "MemoryError", "can't allocate memory")
_MEMORY_OF = {
    "generate": "rollout.memory_fraction (GPU), rollout.cache_gib (CPU)",
    "teacher": "train.rows_per_microbatch or train.row_tokens, or set teacher.offload=true",
    "reference": "train.rows_per_microbatch or train.row_tokens, or set teacher.offload=true",
    "train": "train.rows_per_microbatch, train.row_tokens or sgopd.logprob_chunk_tokens",
    "sync": "rollout.sync_bucket_mib or rollout.memory_fraction",
}
"""What to lower where a stage runs out of it."""


def diagnosis(run_dir: Path) -> str:
    """One message about the last attempt, once it has ended; empty if nothing went wrong, or nothing left a word."""
    beats = {beat.rank: beat for beat in read_beats(run_dir)}
    hung = [rank for rank in beats if (path := stack_file(run_dir, rank)).is_file() and path.stat().st_size]
    if hung:
        return _of_hung(run_dir, [beats[rank] for rank in hung])
    errors = sorted(error_files(run_dir).items(), key=lambda item: item[1].stat().st_mtime)
    texts = {rank: _end_of(path) for rank, path in errors}
    causes = [rank for rank, text in texts.items() if not any(words in text for words in _LOST_PEER)]
    silent = [beat for rank, beat in beats.items() if rank not in texts]
    if silent and not causes:
        others = [str(beat.rank) for beat in silent[1:]]
        return (
            f"{_place(silent[0])}: ended without a word"
            + (f", as did {', '.join(others)}; one of them was first" if others else "")
            + ". It was killed from outside, as by the kernel where memory runs out (see dmesg), or its node was lost; "
            "then the others were ended"
        )
    if not texts:
        return ""
    rank = next(iter([*causes, *texts]))  # by the files' times, which nodes may not agree on
    text = texts[rank]
    where = _place(beats[rank]) if rank in beats else f"rank {rank}"
    if text.startswith("Traceback"):
        text = f"{text.splitlines()[-1]} (traceback: {run_dir / LOGS}/rank-{rank}.error)"
    return f"{where}: {text}{_advice(run_dir, beats.get(rank), text)}"


def _end_of(path: Path) -> str:
    """The text of a file, of a very long one its end."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LONGEST_ERROR))
        return file.read().decode(errors="replace").strip()


def _of_hung(run_dir: Path, beats: list[Beat]) -> str:
    first = min(beats, key=lambda beat: beat.time)
    others = [str(beat.rank) for beat in beats if beat is not first]
    return (
        f"{_place(first)}: hung for more than {first.limit:.0f} s"
        + (f", and so did {', '.join(others)}" if others else "")
        + f". What each was doing is in {run_dir / LOGS}/rank-*.stack. If it only was slow, raise alarms.hang_seconds"
    )


def _place(beat: Beat) -> str:
    return f"rank {beat.rank} on {beat.host}, {beat.stage} of step {beat.step + 1}"


def _advice(run_dir: Path, beat: Beat | None, error: str) -> str:
    if beat is None:
        return ""
    if any(words in error for words in _NO_MEMORY):
        return f"\nOut of memory in {beat.stage}: lower {_MEMORY_OF.get(beat.stage, 'rollout.memory_fraction')}."
    if beat.stage == "save":
        free = shutil.disk_usage(run_dir).free / 2**30
        return f"\nThe file system of {run_dir} has {free:.1f} GiB free, of which a quota may leave less."
    return ""

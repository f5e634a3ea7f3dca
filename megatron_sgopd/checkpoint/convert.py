"""Conversion in both directions: parts, then a proof, then the output's name.

Parts are independent files. They are dealt out over the ranks that torchrun or srun started (one, if none
did), finished ones are skipped when a conversion is started again, and only the first rank does the rest.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sgopd import __version__, platform
from megatron_sgopd.checkpoint.files import CONVERSION, Staging, model_digest, write_atomically
from megatron_sgopd.checkpoint.locate import TRACKER, find_checkpoint
from megatron_sgopd.checkpoint.model_folder import (
    DTYPE_NAMES,
    ShardPlan,
    check_tokenizer,
    write_companions,
    write_shard,
)
from megatron_sgopd.checkpoint.proof import Proof, prove
from megatron_sgopd.checkpoint.torch_dist import CheckpointReader, CheckpointWriter
from megatron_sgopd.models.architecture import Architecture, read_architecture
from megatron_sgopd.models.huggingface import HuggingFaceWeights
from megatron_sgopd.models.provider import megatron_flags, padded_vocab_size
from megatron_sgopd.models.weight_map import Parameter, parameter_count
from megatron_sgopd.processes import rendezvous

FLAGS = "megatron_flags.txt"
"""The flags with which stock Megatron builds the model of a converted checkpoint."""
FULL_PROOF_BYTES = 20 << 30
"""Below this size the default proof is the full one."""


@dataclass(frozen=True)
class Options:
    """What a user may choose."""

    dtype: torch.dtype | None = None
    """Of the output; None: as in the input."""
    tensor: int = 1
    """The tensor parallel size that a Megatron checkpoint will mostly be loaded at."""
    part_bytes: int = 1 << 28
    """About the size of a file of a Megatron checkpoint."""
    max_shard_bytes: int = 1_000_000_000
    """Limit of a file of a Hugging Face folder."""
    verify: str | None = None
    """full, sample or off; None: full below `FULL_PROOF_BYTES`, else sample."""
    allow_no_tokenizer: bool = False


@dataclass(frozen=True)
class Ranks:
    """This process among those that convert together."""

    rank: int
    size: int

    @classmethod
    def from_environment(cls) -> Ranks:
        """As torchrun or srun say; with several, they are connected, so that they can wait for each other."""
        rank, size = (
            int(os.environ.get(name, os.environ.get(slurm, default)))
            for name, slurm, default in (("RANK", "SLURM_PROCID", "0"), ("WORLD_SIZE", "SLURM_NTASKS", "1"))
        )
        if size > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
            dist.init_process_group("gloo", store=rendezvous(), rank=rank, world_size=size)
        return cls(rank, size)

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Disconnect."""
        if self.size > 1:
            dist.destroy_process_group()


# ---- Hugging Face to Megatron ---------------------------------------------------------------------------


def to_megatron(source: Path, out: Path, options: Options, ranks: Ranks) -> Proof | None:
    """Convert a Hugging Face folder to a checkpoint that `megatron.training` loads with `--load`.

    Returns:
        The proof, on the first rank. Where it failed, the output stays at `OUT.partial`.

    Raises:
        ConfigError: the input is not what it should be, or the output cannot be written.
    """
    architecture = read_architecture(source)
    architecture.check_parallel(options.tensor, 1)
    rows = padded_vocab_size(architecture, options.tensor)
    with HuggingFaceWeights(architecture) as weights:

        def dtype_of(parameter: Parameter) -> torch.dtype:
            if options.dtype is not None:
                return options.dtype
            dtypes = [weights.dtype(piece) for piece in parameter.pieces]
            return dtypes[0] if len(set(dtypes)) == 1 else torch.float32

        staging = Staging(out)
        folder = staging.folder / "release"
        writer = CheckpointWriter(folder, architecture, dtype_of, rows, options.tensor, options.part_bytes)
        job = _job("to-megatron", source, model_digest(source), options)
        _start(staging, job, sum(writer.part_bytes), ranks)
        common_state = _common_state(architecture, rows)

        def write(part: int) -> Callable[[], None]:
            settle = writer.write(part, weights.fill, common_state)
            weights.release()
            return settle

        clock = time.monotonic()
        with staging.explaining():
            _write_parts(writer.part_bytes, writer.written, write, ranks)
            if ranks.rank > 0:
                return None
            writer.finish()
            write_atomically(staging.folder / TRACKER, b"release")
            flags = [*megatron_flags(architecture), "--padded-vocab-size", str(rows)]
            write_atomically(staging.folder / FLAGS, _flag_lines(flags).encode())
        seconds = time.monotonic() - clock
        reader = CheckpointReader(folder)
        return _conclude(staging, job, architecture, weights, reader, options, seconds)


def _flag_lines(flags: Sequence[str]) -> str:
    """A flag and its value on each line."""
    return "".join(f"\n{word}" if word.startswith("--") else f" {word}" for word in flags).lstrip() + "\n"


def _common_state(architecture: Architecture, rows: int) -> dict[str, Any]:
    """What Megatron keeps beside the weights: the arguments that `--use-checkpoint-args` takes over."""
    import argparse

    platform.select("cpu")  # before Megatron is imported, where the proof will want it
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    parsed = vars(parser.parse_args(megatron_flags(architecture)))
    chosen = {name: value for name, value in parsed.items() if value != parser.get_default(name)}
    return {
        "args": argparse.Namespace(**chosen, padded_vocab_size=rows),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False},
    }


# ---- Megatron to Hugging Face ---------------------------------------------------------------------------


def to_huggingface(
    checkpoint: Path, out: Path, like: Path, options: Options, ranks: Ranks, origin: Sequence[str] = ()
) -> Proof | None:
    """Convert a `torch_dist` checkpoint to a folder that transformers and vLLM open as it is.

    Args:
        checkpoint: anything that `find_checkpoint` takes; the optimizer's state in it is ignored.
        like: a Hugging Face folder with the model's config.json and tokenizer; its weights are not read.
        origin: lines for the model card that say where the weights come from.

    Returns:
        The proof, on the first rank. Where it failed, the output stays at `OUT.partial`.

    Raises:
        ConfigError: the input is not what it should be, or the output cannot be written.
    """
    architecture = read_architecture(like, with_weights=False)
    reader = CheckpointReader(find_checkpoint(checkpoint))
    reader.check(architecture)
    if not options.allow_no_tokenizer:
        check_tokenizer(like)
    plan = ShardPlan(architecture, lambda p: options.dtype or reader.dtype(p), options.max_shard_bytes)
    staging = Staging(out)
    job = _job("to-hf", reader.folder, reader.digest, options) | {"like": str(like.absolute())}
    _start(staging, job, sum(plan.nbytes), ranks)

    def tensors(shard: int) -> Iterator[torch.Tensor]:
        for parameter in plan.members[shard]:
            pieces = dict(reader.pieces(parameter))
            for piece in parameter.pieces:
                yield pieces[piece.name].to(plan.dtype_of(parameter))

    def write(shard: int) -> Callable[[], None]:
        settle = write_shard(staging.folder / plan.name(shard), plan.described(shard), tensors(shard))
        reader.release()
        return settle

    clock = time.monotonic()
    with staging.explaining():
        _write_parts(plan.nbytes, lambda shard: (staging.folder / plan.name(shard)).is_file(), write, ranks)
        if ranks.rank > 0:
            return None
        dtypes = [plan.dtype_of(parameter) for members in plan.members for parameter in members]
        card = _model_card(reader, like, origin)
        write_companions(staging.folder, plan, like, dtypes, card)
    seconds = time.monotonic() - clock
    written = read_architecture(staging.folder)
    with HuggingFaceWeights(written) as weights:
        return _conclude(staging, job, written, weights, reader, options, seconds)


def _model_card(reader: CheckpointReader, like: Path, origin: Sequence[str]) -> str:
    lines = [
        "# Converted model",
        "",
        *(origin or [f"- checkpoint: `{reader.folder.absolute()}`"]),
        f"- checkpoint metadata: sha256 `{reader.digest}`",
        f"- config and tokenizer: `{like.absolute()}`",
        f"- converted by: megatron-sgopd {__version__}; how it was proven, and a digest of each tensor: `{CONVERSION}`",
    ]
    return "\n".join(lines) + "\n"


# ---- Both directions ------------------------------------------------------------------------------------


def _job(direction: str, source: Path, digest: str, options: Options) -> dict[str, Any]:
    """What identifies a conversion: unfinished work of another one must not be gone on with."""
    settings = asdict(options) | {"dtype": DTYPE_NAMES.get(options.dtype) if options.dtype else None}
    del settings["verify"]
    return {"direction": direction, "source": str(source.absolute()), "source_digest": digest, **settings}


def _start(staging: Staging, job: dict[str, Any], nbytes: int, ranks: Ranks) -> None:
    staging.check(job, nbytes)
    ranks.wait()  # all have checked before one writes
    if ranks.rank == 0:
        with staging.explaining():
            staging.begin(job)
    ranks.wait()


def _write_parts(
    nbytes: Sequence[int],
    written: Callable[[int], bool],
    write: Callable[[int], Callable[[], None]],
    ranks: Ranks,
) -> None:
    """Write this rank's share of the parts that are not there yet, with progress, and wait for the others.

    What `write` returns makes a part last. It waits for the disk, so it runs beside the writing of the next part.
    """
    mine = [part for part in range(ranks.rank, len(nbytes), ranks.size) if not written(part)]
    total, done, started = sum(nbytes[part] for part in mine), 0, time.monotonic()
    skipped = len(range(ranks.rank, len(nbytes), ranks.size)) - len(mine)
    if skipped and ranks.rank == 0:
        _say(f"{skipped} files were finished before: going on after them")
    shown = started
    with ThreadPoolExecutor(1) as disk:
        settling = None
        for part in mine:
            settle = write(part)
            if settling is not None:
                settling.result()
            settling = disk.submit(settle)
            if part == mine[-1]:
                settling.result()
            done += nbytes[part]
            now = time.monotonic()
            if ranks.rank == 0 and (now - shown > 5 or part == mine[-1]):
                rate = done / (now - started)
                _say(
                    f"written {done / 2**30:.2f} of {total / 2**30:.2f} GiB"
                    + (f" on rank 0 of {ranks.size}" if ranks.size > 1 else "")
                    + f", {rate / 2**20:.0f} MiB/s, {(total - done) / rate:.0f} s left"
                )
                shown = now
    ranks.wait()
    ranks.leave()


def _conclude(
    staging: Staging,
    job: dict[str, Any],
    architecture: Architecture,
    weights: HuggingFaceWeights,
    reader: CheckpointReader,
    options: Options,
    seconds: float,
) -> Proof:
    """Prove the conversion, write that down, and give the output its name if it holds."""
    files = {
        str(path.relative_to(staging.folder)): path.stat().st_size
        for path in sorted(staging.folder.rglob("*"))
        if path.suffix in (".safetensors", ".distcp")
    }
    level = options.verify or ("full" if sum(files.values()) < FULL_PROOF_BYTES else "sample")
    clock = time.monotonic()
    from_megatron = job["direction"] == "to-hf"
    proof = prove(architecture, weights, reader, level, from_megatron, options.dtype, _say)
    record = job | {
        "versions": {
            name: version(name) for name in ("megatron-sgopd", "megatron-core", "torch", "transformers", "safetensors")
        },
        "architecture": architecture.model_type,
        "parameters": parameter_count(architecture),
        "padded_vocab_size": reader.padded_vocab_size(),
        "seconds": {"write": round(seconds, 3), "prove": round(time.monotonic() - clock, 3)},
        "proof": asdict(proof),
        "files": files,
    }
    with staging.explaining():
        write_atomically(staging.folder / CONVERSION, json.dumps(record, indent=1).encode())
        if proof.passed:
            staging.publish()
    return proof


def _say(message: str) -> None:
    print(f"convert: {message}", file=sys.stderr, flush=True)

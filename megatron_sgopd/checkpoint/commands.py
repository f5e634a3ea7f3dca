"""The command line of conversion and inspection."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_sgopd.checkpoint.convert import Options
    from megatron_sgopd.checkpoint.proof import Proof

NOT_PROVEN = 1


def add_commands(commands: Any) -> None:
    """Add `convert`, `export`, `inspect` and `diff` to the command line."""
    convert = commands.add_parser(
        "convert",
        help="turn a Hugging Face folder into a Megatron checkpoint, or back",
        description="Convert, then prove that both are the same model. Under torchrun or srun the ranks share the "
        "files. A conversion that was cut off goes on when it is started again with the same arguments. The output is "
        "meant for others: it has the permissions that your umask gives.",
        epilog="Exit codes: 0 converted and proven, 1 the proof failed (the output stays at OUT.partial), 2 bad input.",
    )
    directions = convert.add_subparsers(metavar="DIRECTION", required=True)
    forward = directions.add_parser(
        "to-megatron",
        help="Hugging Face folder -> torch_dist checkpoint",
        description="Write a checkpoint that megatron.training loads with --load OUT, at any tensor, pipeline and "
        "expert parallel size. (Training by a recipe needs none: it reads Hugging Face folders.)",
        epilog="Example: megatron-sgopd convert to-megatron models/Qwen3-4B checkpoints/qwen3-4b",
    )
    forward.add_argument("source", type=Path, metavar="FOLDER", help="Hugging Face folder with safetensors")
    forward.add_argument("out", type=Path, metavar="OUT", help="new folder, for --load")
    forward.add_argument(
        "--tensor-parallel",
        type=_positive,
        default=1,
        metavar="N",
        help="size at which it will mostly be loaded: each rank then reads its own bytes only (1)",
    )
    forward.add_argument(
        "--part-size", type=_size, default=1 << 28, metavar="SIZE", help="about the size of a file (256MiB)"
    )
    _add_common(forward)
    forward.set_defaults(run=_to_megatron)

    backward = directions.add_parser(
        "to-hf",
        help="torch_dist checkpoint -> Hugging Face folder",
        description="Write a folder that transformers and vLLM open as it is. Optimizer state is ignored.",
        epilog="Example: megatron-sgopd convert to-hf checkpoints/qwen3-4b out --like models/Qwen3-4B",
    )
    _add_hugging_face(backward, "CHECKPOINT", "a Megatron --save folder, or one iter_… folder in it")
    backward.set_defaults(run=_to_hf)

    export = commands.add_parser(
        "export",
        help="turn a run's checkpoint into a Hugging Face folder",
        description="Like convert to-hf, with config and tokenizer of the run's model. The output is meant for others: "
        "it has the permissions that your umask gives, also where the run is private.",
        epilog="Example: megatron-sgopd export runs/demo out --step 72",
    )
    _add_hugging_face(export, "RUN", "run folder")
    export.set_defaults(run=_export)

    inspect = commands.add_parser(
        "inspect",
        help="say what is in a model folder, a checkpoint or a run folder",
        description="Parameters, dtypes, vocabulary, step, and what is missing or superfluous.",
        epilog="Example: megatron-sgopd inspect runs/demo --json",
    )
    inspect.add_argument("path", type=Path, metavar="PATH")
    inspect.add_argument("--step", type=int, metavar="N", help="step of a checkpoint (the newest)")
    inspect.add_argument("--like", type=Path, metavar="FOLDER", help="Hugging Face folder of a checkpoint's model")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(run=_inspect)

    diff = commands.add_parser(
        "diff",
        help="say which tensors of two models differ, and by how much",
        description="Compare two of: Hugging Face folder, checkpoint, run folder. Exit code 1 if they differ.",
        epilog="Example: megatron-sgopd diff models/Qwen3-4B checkpoints/qwen3-4b",
    )
    diff.add_argument("one", type=Path, metavar="A")
    diff.add_argument("other", type=Path, metavar="B")
    diff.add_argument("--like", type=Path, metavar="FOLDER", help="Hugging Face folder, where neither is one")
    diff.add_argument("--json", action="store_true", help="print one JSON object")
    diff.set_defaults(run=_diff)


def _add_hugging_face(parser: argparse.ArgumentParser, source: str, source_help: str) -> None:
    """Arguments of what writes a Hugging Face folder from a checkpoint in `source`."""
    parser.add_argument("source", type=Path, metavar=source, help=source_help)
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder")
    parser.add_argument("--step", type=int, metavar="N", help="step to take (the newest)")
    parser.add_argument(
        "--like",
        type=Path,
        metavar="FOLDER",
        help="Hugging Face folder with the model's config.json and tokenizer (the one that the checkpoint or the run "
        "names)",
    )
    parser.add_argument(
        "--max-shard-size", type=_size, default=1_000_000_000, metavar="SIZE", help="limit of a file (1GB)"
    )
    parser.add_argument("--allow-no-tokenizer", action="store_true", help="write a folder without a tokenizer")
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the output (as in the input)")
    parser.add_argument(
        "--verify",
        choices=["full", "sample", "off"],
        help="every tensor is compared; full also runs both models, sample their first layers (full below 20 GiB)",
    )


_UNITS = {"": 1, "B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _UNITS |= {f"{_prefix}B": 1000**_power, f"{_prefix}IB": 1024**_power}


def _size(text: str) -> int:
    """`5GB`, `512MiB` or a number of bytes."""
    number = text.rstrip("BbIiKkMmGgTt ")
    unit = text[len(number) :].strip().upper()
    if not number.isdecimal() or unit not in _UNITS or int(number) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give, for instance, 5GB or 512MiB")
    return int(number) * _UNITS[unit]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _options(arguments: argparse.Namespace, **more: Any) -> Options:
    import torch

    from megatron_sgopd.checkpoint.convert import Options

    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    return Options(dtype=dtype, verify=arguments.verify, **more)


def _to_megatron(arguments: argparse.Namespace) -> int:
    from megatron_sgopd.checkpoint.convert import FLAGS, Ranks, to_megatron
    from megatron_sgopd.models.architecture import read_architecture

    options = _options(arguments, tensor=arguments.tensor_parallel, part_bytes=arguments.part_size)
    out = arguments.out
    proof = to_megatron(arguments.source, out, options, Ranks.from_environment())
    code = _report(proof, out)
    if proof is not None and code == 0:
        print(f"Load it with: --load {out} $(cat {out / FLAGS})")
        if (rope := read_architecture(arguments.source).rope_type) != "default":
            print(
                f"Its rope ({rope}) has no flags in Megatron: after building the model, call "
                "megatron_sgopd.models.provider.set_rotary_frequencies(model, read_architecture(FOLDER)). "
                "A recipe of megatron-sgopd does so by itself."
            )
    return code


def _to_hf(arguments: argparse.Namespace) -> int:
    from megatron_sgopd.checkpoint.locate import find_checkpoint, source_of

    checkpoint = find_checkpoint(arguments.source, arguments.step)
    code = _to_hugging_face(arguments, checkpoint, arguments.like or source_of(checkpoint))
    if code == 0 and arguments.like is None:
        print(f"Its config and tokenizer are those of {source_of(checkpoint)}, which the checkpoint names.")
    return code


def _export(arguments: argparse.Namespace) -> int:
    from megatron_sgopd.checkpoint.locate import find_checkpoint, read_run

    run = read_run(arguments.source)
    checkpoint = find_checkpoint(arguments.source / "checkpoints", arguments.step)
    origin = [
        f"- run: `{arguments.source.absolute()}`",
        f"- step: {int(checkpoint.name.removeprefix('iter_'))}",
        f"- method: {run['sgopd']['method']}",
        f"- student: `{run['model']['path']}`",
        f"- teacher: `{run['teacher']['path']}`",
    ]
    return _to_hugging_face(arguments, checkpoint, arguments.like or Path(run["model"]["path"]), origin)


def _to_hugging_face(
    arguments: argparse.Namespace, checkpoint: Path, like: Path, origin: list[str] | None = None
) -> int:
    from megatron_sgopd.checkpoint.convert import Ranks, to_huggingface

    options = _options(
        arguments, max_shard_bytes=arguments.max_shard_size, allow_no_tokenizer=arguments.allow_no_tokenizer
    )
    proof = to_huggingface(checkpoint, arguments.out, like, options, Ranks.from_environment(), origin or ())
    return _report(proof, arguments.out)


def _report(proof: Proof | None, out: Path) -> int:
    """Say how it ended, on the first rank."""
    if proof is None:
        return 0
    if not proof.passed:
        print(
            f"megatron-sgopd: the proof failed: {proof.fault}. The output is kept in {out}.partial; this is a fault "
            "of the conversion, not of your model: please report it",
            file=sys.stderr,
        )
        return NOT_PROVEN
    if proof.level == "off":
        print(f"{out}: written, not proven (--verify off)")
        return 0
    print(
        f"{out}: proven ({proof.level}): {len(proof.digests)} tensors equal bit by bit; log-probs of "
        f"{proof.layers_run} layers on {proof.sequences} sequences within {proof.max_logprob_gap:.1e} of "
        f"transformers; {proof.greedy_tokens} greedy tokens equal"
    )
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from megatron_sgopd.checkpoint.inspection import as_text, inspect

    report = inspect(arguments.path, arguments.step, arguments.like)
    print(json.dumps(report, indent=1) if arguments.json else as_text(report))
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from megatron_sgopd.checkpoint.inspection import diff, diff_as_text

    report = diff(arguments.one, arguments.other, arguments.like)
    print(json.dumps(report, indent=1) if arguments.json else diff_as_text(report))
    return 1 if report["different"] or report["only_in_a"] or report["only_in_b"] else 0

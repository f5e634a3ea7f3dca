""".venv/bin/python tools/bench/convert.py [--gib 2] [--scratch DIR]

Speed and memory of checkpoint conversion on this machine.

Speed: bytes per second of each direction, against `cp` of the same bytes on the same disk, both synced, taken
in turn. Memory: peak resident memory of two ranks for a model of --gib GiB and for one of twice the layers.
A share of a rank's own of the weights is allowed for; what conversion takes beyond should not grow.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_sgopd.checkpoint.convert import Options, Ranks, to_huggingface, to_megatron
from megatron_sgopd.checkpoint.files import sync_path
from megatron_sgopd.models.architecture import read_architecture
from megatron_sgopd.models.weight_map import owned_parameters, parameter_count

WIDTH, FFN, VOCABULARY = 2048, 8192, 32000
_RANK = """
import json, re, sys
from megatron_sgopd.cli import main
code = main(sys.argv[2:])
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
json.dump([code, peak], open(sys.argv[1], "w"))
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=2.0, help="size of the smaller model, BF16 (2)")
    parser.add_argument("--repeats", type=int, default=5, help="of each timing, after one that does not count (5)")
    parser.add_argument("--scratch", type=Path, help="where to write; the disk that is measured (a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        scratch = Path(folder)
        small, large = scratch / "small", scratch / "large"
        layers = max(1, round((arguments.gib * 2**30 / 2 - 2 * VOCABULARY * WIDTH) / _layer_weights()))
        make_model(small, layers)
        report = speed(small, scratch, arguments.repeats)
        make_model(large, 2 * layers)
        report |= memory({"small": small, "large": large}, scratch)
    print(json.dumps(report, indent=1))
    fast = all(report[f"{direction} / cp"] >= 0.5 for direction in ("to-megatron", "to-hf"))
    flat = all(report[f"{direction} growth beyond the share"] <= 0.10 for direction in ("to-megatron", "to-hf"))
    print(
        f"at least half the speed of cp: {'yes' if fast else 'no'}; memory flat within 10 %: {'yes' if flat else 'no'}"
    )
    return 0 if fast and flat else 1


def _layer_weights() -> int:
    return 4 * WIDTH * WIDTH - 2 * WIDTH * (WIDTH - WIDTH // 4) + 3 * WIDTH * FFN + 2 * WIDTH


def make_model(folder: Path, layers: int) -> None:
    """A Llama of random BF16 weights in shards of about 1 GB."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    architecture = read_architecture(folder, with_weights=False)
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}

    def flush() -> None:
        name = f"{len(set(weight_map.values())):03d}.safetensors"
        save_file(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for parameter in owned_parameters(architecture):
        for piece in parameter.pieces:
            shard[piece.name] = torch.randn(piece.shape, generator=generator, dtype=torch.bfloat16)
        if sum(tensor.nbytes for tensor in shard.values()) > 1_000_000_000:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    print(f"made a model of {parameter_count(architecture) * 2 / 2**30:.2f} GiB", file=sys.stderr)


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def _command(direction: str, source: Path, out: Path, like: Path) -> list[str]:
    words = ["convert", direction, str(source), str(out), "--verify", "off"]
    return words if direction == "to-megatron" else [*words, "--like", str(like), "--allow-no-tokenizer"]


def speed(model: Path, scratch: Path, repeats: int) -> dict[str, float]:
    """Of each direction and of cp, in turn, from the page cache to the disk.

    Before each, twice as many bytes are written and removed again, so that none runs out of memory that was used
    just before: a virtual machine gives free memory back, and then fetches it slowly, which would count for
    whoever needs most of it beside the files' own pages.
    """
    nbytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    megatron, out = scratch / "megatron", scratch / "out"
    warms = scratch / "warm0", scratch / "warm1"
    options, alone = Options(verify="off", allow_no_tokenizer=True), Ranks(0, 1)

    def copy(to: Path = out) -> None:
        to.mkdir()
        for path in model.glob("*.safetensors"):
            subprocess.run(["cp", str(path), str(to)], check=True)
            sync_path(to / path.name)

    to_megatron(model, megatron, options, alone)
    work = {
        "cp": copy,
        "to-megatron": lambda: to_megatron(model, out, options, alone),
        "to-hf": lambda: to_huggingface(megatron, out, model, options, alone),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, run in work.items():
            for warm in warms:
                copy(warm)
            for warm in warms:
                shutil.rmtree(warm)
            started = time.monotonic()
            run()
            seconds[name].append(time.monotonic() - started)
            shutil.rmtree(out)
        print(
            f"round {repeat}: { ({name: round(times[-1], 2) for name, times in seconds.items()}) } s", file=sys.stderr
        )
        if repeat == 0:  # first uses of memory and disk are slow
            for times in seconds.values():
                times.clear()
    rates = {name: nbytes / statistics.median(times) for name, times in seconds.items()}
    report = {f"{name} MiB/s": round(rate / 2**20, 1) for name, rate in rates.items()}
    return report | {f"{name} / cp": round(rates[name] / rates["cp"], 3) for name in ("to-megatron", "to-hf")}


def memory(models: dict[str, Path], scratch: Path) -> dict[str, float]:
    """Peak resident memory of the larger of two ranks, and its growth beyond the growth of a rank's share."""
    report: dict[str, float] = {}
    for direction in ("to-megatron", "to-hf"):
        peaks, shares = {}, {}
        for name, model in models.items():
            source = model if direction == "to-megatron" else scratch / f"{name}-megatron"
            out = scratch / f"{name}-{'megatron' if direction == 'to-megatron' else 'back'}"
            peaks[name] = _peak(_command(direction, source, out, model), scratch)
            shares[name] = sum(path.stat().st_size for path in model.glob("*.safetensors")) / 2
            report[f"{direction} peak MiB, {name}"] = round(peaks[name] / 2**20)
        beyond = (peaks["large"] - peaks["small"]) / peaks["small"]
        report[f"{direction} growth"] = round(beyond, 3)
        allowed = max(0.0, peaks["large"] - peaks["small"] - (shares["large"] - shares["small"]))
        report[f"{direction} growth beyond the share"] = round(allowed / peaks["small"], 3)
    return report


def _peak(command: list[str], scratch: Path) -> int:
    """Bytes, of the larger of two ranks."""
    results = [scratch / f"rank{rank}.json" for rank in range(2)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(results[rank]), *command],
            env=_environment(
                RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT="29876"
            ),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        rank.wait()
    ends = [json.loads(path.read_text()) for path in results]
    assert all(code == 0 for code, _ in ends), ends
    return max(kib for _, kib in ends) * 1024


if __name__ == "__main__":
    sys.exit(main())

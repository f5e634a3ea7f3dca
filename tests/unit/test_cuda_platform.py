"""What the CUDA platform does before a GPU is touched, and the Megatron flags without which a run cannot work there."""

import subprocess
import sys

import pytest
import torch

from megatron_sgopd.errors import ConfigError
from megatron_sgopd.platform.cuda import CudaPlatform
from megatron_sgopd.processes import launched_ranks, local_rank

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("launched", "number", "ranks"),
    [
        ({}, 0, 1),
        (
            {"SLURM_LOCALID": "3", "SLURM_PROCID": "11", "SLURM_NTASKS": "16"},
            3,
            16,
        ),  # srun
        ({"LOCAL_RANK": "2", "RANK": "2", "WORLD_SIZE": "4", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}, 2, 4),
    ],
)
def test_each_rank_takes_its_own_gpu_whoever_started_it(
    launched: dict[str, str], number: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert (local_rank(), launched_ranks()) == (number, ranks)
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    CudaPlatform().install()
    assert taken == [number]


def test_a_rank_that_sees_one_gpu_of_many_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_LOCALID", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"rank 3 of this node sees 1 GPU: .* \(--gpus-per-node, not --gpus-per-task"):
        CudaPlatform().install()


SAVES = """
import sys
from megatron_sgopd.platform import select
select("cpu")
flags = "--num-layers=1 --hidden-size=64 --num-attention-heads=1 --seq-length=64 --max-position-embeddings=64"
flags += " --micro-batch-size=1 --use-cpu-initialization --transformer-impl=local --tokenizer-type=NullTokenizer"
flags += " --vocab-size=64 --no-gradient-accumulation-fusion --no-persist-layer-norm --no-rope-fusion"
flags += " --save=x --save-interval=1 --async-save --use-persistent-ckpt-worker"
from megatron.core.dist_checkpointing.strategies.torch import get_async_strategy
from megatron.training.arguments import parse_args, validate_args
for more in ([], sys.argv[1:]):
    sys.argv[1:] = flags.split() + more
    args = parse_args()
    validate_args(args)
    try:
        strategy, parts = get_async_strategy(args.async_strategy)
        print("saves by", strategy, parts["AsyncCallsQueue"].__module__)
    except ModuleNotFoundError as error:
        print("left to Megatron:", error)
"""


def test_saves_in_the_background_need_no_package_that_is_not_pinned() -> None:
    flags = [flag for flag in CudaPlatform.megatron_flags if "async" in flag]
    words = [sys.executable, "-c", SAVES, *flags]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert "saves by mcore megatron.core.dist_checkpointing" in done.stdout, done.stderr
    assert "left to Megatron: A compatible `nvidia-resiliency-ext` installation is required" in done.stdout

"""Weights of real sizes on their way to the engine, on the meta device with groups that send nothing: what each rank
would be sent, and the memory that it would take."""

import contextlib
import math
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

EXAMPLES = Path(__file__).parents[2] / "examples"
MEMORY = 256 << 20
LAYOUTS = {
    "llama31_70b_to_8b/configs/teacher": [(1, 1, 1), (8, 1, 1), (8, 4, 1), (2, 2, 1), (1, 8, 1)],
    "llama31_70b_to_8b/configs/student": [(1, 1, 1), (8, 1, 1), (4, 2, 1), (1, 4, 1)],
    "qwen3_30b_a3b_to_1p7b/configs/teacher": [(1, 1, 8), (2, 2, 2)],
}
"""Tensor, pipeline and expert parallel sizes."""


@pytest.mark.long
def test_no_byte_is_sent_twice_and_memory_is_bounded() -> None:
    run_ranks(1, _check, timeout=280)


def _check() -> None:
    from megatron_sgopd import platform

    platform.select("cpu")
    from megatron_sgopd.models.architecture import read_architecture

    checked = 0
    for folder, layouts in LAYOUTS.items():
        architecture = read_architecture(EXAMPLES / folder, with_weights=False)
        for tensor, pipeline, expert in layouts:
            world = tensor * pipeline * expert
            for rank in {0, world - 1}:
                with _pretended_groups(rank, world, tensor, pipeline, expert) as groups:
                    _check_rank(architecture, groups)
                checked += 1
    assert checked == 20


def _check_rank(architecture: Any, groups: Any) -> None:
    from megatron_sgopd.models.provider import padded_vocab_size
    from megatron_sgopd.models.transfers import Source, carry_out, plan_transfers
    from megatron_sgopd.models.weight_map import ParallelLayout, owned_parameters

    layout = ParallelLayout(groups.tp.size(), groups.pp.size(), 1, groups.ep.size())
    vocabulary, meta = padded_vocab_size(architecture, layout.tensor), torch.device("meta")
    sources, held, whole = [], {}, {}
    for parameter in owned_parameters(architecture):
        owner = parameter.owner(layout)
        sources.append((parameter, Source(owner.pipeline, owner.expert or 0, torch.bfloat16)))
        group = groups.tp if parameter.expert is None else groups.expt_tp
        shard = torch.empty(parameter.shard_shape(group.size(), vocabulary), dtype=torch.bfloat16, device=meta)
        whole[parameter] = group.size() * shard.nbytes
        if owner.pipeline == groups.pp.rank() and owner.expert in (None, groups.ep.rank()):
            held[parameter] = shard
    transfers = plan_transfers(sources, layout.tensor, groups.expt_tp.size(), vocabulary, MEMORY)
    assert [parameter for transfer in transfers for parameter in transfer.members] == [p for p, _ in sources]

    with _sent() as received, Allocated() as allocated:
        arrived = 0
        for transfer in transfers:
            for _name, tensor in carry_out(transfer, held, groups, meta):
                arrived += tensor.nbytes
    assert arrived == sum(_bytes(parameter) for parameter in whole)
    assert sum(received) == sum(whole.values()) - sum(shard.nbytes for shard in held.values())
    # A receiver that holds a tensor of the transfer before: one memory and one tensor.
    assert allocated.peak <= MEMORY + max(whole.values()), (layout, allocated.peak / 2**20)


def _bytes(parameter: Any) -> int:
    return sum(2 * math.prod(piece.shape) for piece in parameter.pieces)


@contextlib.contextmanager
def _pretended_groups(rank: int, world: int, tensor: int, pipeline: int, expert: int) -> Iterator[Any]:
    """Megatron's own groups of one rank of many, that send and receive nothing."""
    from megatron.core import parallel_state
    from megatron_models import process_groups
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    parallel_state.initialize_model_parallel(
        tensor, pipeline, expert_model_parallel_size=expert, create_gloo_process_groups=False
    )
    yield process_groups()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@contextlib.contextmanager
def _sent() -> Iterator[list[int]]:
    """The bytes that each collective brings to this rank."""
    sizes: list[int] = []

    def broadcast(tensor: torch.Tensor, *, group: dist.ProcessGroup, group_src: int) -> None:
        sizes.append(0 if group.rank() == group_src else tensor.nbytes)

    def all_gather(output: torch.Tensor, own: torch.Tensor, *, group: dist.ProcessGroup) -> None:
        assert output.nbytes == group.size() * own.nbytes
        sizes.append(output.nbytes - own.nbytes)

    with (
        unittest.mock.patch.object(dist, "broadcast", broadcast),
        unittest.mock.patch.object(dist, "all_gather_into_tensor", all_gather),
    ):
        yield sizes


class Allocated(TorchDispatchMode):
    """The most bytes of storage that were alive at once, of what was made within."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._alive = 0, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {StorageWeakRef(a.untyped_storage()).cdata for a in args if isinstance(a, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            reference = StorageWeakRef(tensor.untyped_storage())
            if reference.cdata not in known:
                self._alive[reference.cdata] = (reference, tensor.untyped_storage().nbytes())
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._alive.values()))
        return out

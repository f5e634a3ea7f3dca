"""Digests of tensors that can be added up over the ranks that hold their parts."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

_CHUNK = 1 << 17
"""Elements at a time on a CPU: their products stay in a core's cache."""
_GPU_CHUNK = 1 << 22
"""Enough to be worth a kernel's start."""
_ROWS, _COLUMNS = 1, 2
"""Summands that keep their numbers apart: twice an index and the first is odd, with the second even, and never 0."""
_SMALL = 1 << 16
"""Elements of tensors that are always read whole."""


@dataclass(frozen=True)
class Rows:
    """The rows that a digest reads: every `step`-th from `first` on, counted along a tensor's first axis."""

    step: int = 1
    first: int = 0

    def skipped(self, number: int) -> int:
        """Rows to pass over before the next one that is read, from row `number` on."""
        return (self.first - number) % self.step


ALL_ROWS = Rows()


def tensor_digest(tensor: torch.Tensor, rows: Rows = ALL_ROWS) -> int:
    """A 64-bit digest of a tensor's bits and their order: equal tensors of one dtype have equal digests.

    With x_ij a number made of the bits of row i and column j (all axes but the first),

        half_k = sum_i a_ki sum_j b_kj (x_ij + 1)  mod 2^32,   k = 1, 2

    where a and b are odd pseudo-random numbers, from SplitMix64's finalizer (Steele, Lea and Flood, 2014) of 2 i + 1
    and 2 j + 2, and x are 16 bits as they are, or u xor (u >> 16) for 32 bits u, since a linear form mod 2^32 hardly
    sees the highest bits. A change of one element always shows, since its product with odd numbers is not 0. Random
    changes of several are missed with a chance of about 2^-64, pairs of flipped signs with 2^-32, and only pairs that
    change nothing but the highest bit of x always. Sums over parts are the whole's.

    Args:
        rows: those that are read of a tensor of more than 65,536 elements; i counts the others too.
    """
    return digest_of(digest_halves(tensor, rows).tolist())


def digest_halves(tensor: torch.Tensor, rows: Rows = ALL_ROWS) -> torch.Tensor:
    """The halves of `tensor_digest`, left where the tensor is: int64 [2]."""
    return grouped_digest(tensor[None], tuple(tensor.shape), axis=0, start=0, rows=rows)


def digest_of(halves: Iterable[int]) -> int:
    """The digest whose halves these are, or sums of such halves over parts of a tensor."""
    first, second = (half & 0xFFFFFFFF for half in halves)
    return first << 32 | second


def grouped_digest(
    grouped: torch.Tensor, shape: Sequence[int], axis: int, start: int, rows: Rows = ALL_ROWS
) -> torch.Tensor:
    """What a slab, seen as [groups, rows, *rest], adds to the halves of its tensor's digest: int64 [2] on its device.

    Args:
        shape: of the whole tensor.
        axis: 0 or 1, along which the slab begins at `start`.
    """
    assert len(shape) < 3 or axis == 0, "columns are counted over all axes but the first"
    first_row, first_column = (start, 0) if axis == 0 else (0, start)
    device, (groups, height) = grouped.device, grouped.shape[:2]
    halves_2 = torch.zeros(2, dtype=torch.int64, device=device)
    if not grouped.numel():
        return halves_2
    read = rows if math.prod(shape) > _SMALL else ALL_ROWS
    matrix_GHC = grouped.detach().reshape(groups, height, -1)
    width = matrix_GHC.shape[2]
    columns_2C, ones_2 = _column_factors(first_column, width, device)
    count = (_CHUNK if device.type == "cpu" else _GPU_CHUNK) // width or 1
    for begin in range(read.skipped(first_row), groups * height, count * read.step):
        bits_RC = _bits(_rows(matrix_GHC, slice(begin, begin + count * read.step, read.step)))
        rows_2R = _odd_numbers(_ROWS, first_row + begin, len(bits_RC), device, read.step)
        sums_2R = _products(columns_2C, bits_RC).add_(ones_2)
        halves_2 += sums_2R.mul_(rows_2R).sum(1, dtype=torch.int32)
    return halves_2


def _rows(matrix_GHC: torch.Tensor, chosen: slice) -> torch.Tensor:
    """These rows, counted on from group to group: [R, C]."""
    groups, height = matrix_GHC.shape[:2]
    if groups == 1:
        return matrix_GHC[0, chosen]
    index_R = torch.arange(*chosen.indices(groups * height), device=matrix_GHC.device)
    return matrix_GHC[index_R // height, index_R % height]


def _products(factors_2C: torch.Tensor, bits_RC: torch.Tensor) -> torch.Tensor:
    """Sums over columns modulo 2^32: int32 [2, R]."""
    if bits_RC.device.type == "cpu":
        return torch.mm(factors_2C, bits_RC.t())
    return (factors_2C[:, None] * bits_RC).sum(2, dtype=torch.int32)  # no integer matmul on CUDA


def _bits(values: torch.Tensor) -> torch.Tensor:
    """x of 16- or 32-bit numbers: int32."""
    if values.dtype.itemsize == 4:
        bits = values.view(torch.int32)
        return (bits >> 16).bitwise_and_(0xFFFF).bitwise_xor_(bits)
    return values.view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)


def _odd_numbers(kind: int, first: int, count: int, device: torch.device, step: int = 1) -> torch.Tensor:
    """Two pseudo-random odd numbers for each `step`-th index of a kind from `first` on, int32 [2, count]."""
    end = first + count * step
    return _odd_table(kind, 1 << end.bit_length(), device)[:, first:end:step]


@functools.cache
def _column_factors(first: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns' numbers, int32 [2, width], and their sums, int32 [2, 1]."""
    columns_2C = _odd_numbers(_COLUMNS, first, width, device)
    return columns_2C, columns_2C.sum(1, keepdim=True, dtype=torch.int32)


@functools.cache
def _odd_table(kind: int, size: int, device: torch.device) -> torch.Tensor:
    mixed = _mix((torch.arange(size, dtype=torch.int64, device=device) << 1) + kind)
    return torch.stack([mixed, mixed >> 32]).to(torch.int32).bitwise_or_(1)


def _mix(numbers: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer, in place on int64; products wrap modulo 2^64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        shifted = numbers >> shift
        numbers ^= shifted.bitwise_and_((1 << (64 - shift)) - 1)  # int64 shifts copy the sign bit
        if factor != 1:
            numbers *= factor - (1 << 64)
    return numbers

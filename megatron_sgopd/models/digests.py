"""Digests of tensors that can be added up over the ranks that hold their parts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_CHUNK = 1 << 20  # elements hashed at a time: 8 MiB of int64 for each of two temporaries
DIGEST_MASK = (1 << 64) - 1


def tensor_digest(tensor: torch.Tensor) -> int:
    """A 64-bit digest of a tensor's bits and their order: equal tensors of one dtype have equal digests,
    and others the same one with a chance of about 2^-64.

    digest = sum over i of mix((i + 1) 2^32 + bits_i) mod 2^64, mix being the bijective finalizer of
    SplitMix64 (Steele, Lea and Flood, 2014), i the flat index: a sum over parts is the digest of the whole.
    """
    return slab_digest(tensor, tuple(tensor.shape), axis=0, start=0)


def slab_digest(slab: torch.Tensor, shape: Sequence[int], axis: int, start: int) -> int:
    """The part of `tensor_digest` that belongs to `tensor[start:...]` along `axis` (0 or 1), where `tensor`
    has shape `shape`: modulo 2^64, the digests of slabs that tile a tensor add up to its own."""
    return int(grouped_digest(slab[None], shape, axis, start)) & DIGEST_MASK


def grouped_digest(grouped: torch.Tensor, shape: Sequence[int], axis: int, start: int) -> torch.Tensor:
    """Digest of a slab seen as [groups, rows, *rest], int64 scalar on the slab's device."""
    assert math.prod(shape) < 1 << 32, "indices of larger tensors do not fit the digest"
    width = math.prod(shape[1:])
    first_row, first_column = (start, 0) if axis == 0 else (0, start)
    total = torch.zeros((), dtype=torch.int64, device=grouped.device)
    for group, rows in enumerate(grouped.detach()):
        if not rows.numel():
            continue
        matrix = rows.reshape(rows.shape[0], -1)
        columns = torch.arange(matrix.shape[1], device=grouped.device) + (first_column + 1)
        step = max(1, _CHUNK // matrix.shape[1])
        for begin in range(0, matrix.shape[0], step):
            chunk = matrix[begin : begin + step]
            numbers = torch.arange(begin, begin + chunk.shape[0], device=grouped.device)
            numbers += first_row + group * matrix.shape[0]
            hashes = (numbers[:, None] * width + columns) << 32
            hashes |= _bits(chunk)
            total += _mix(hashes).sum()
    return total


def _bits(values: torch.Tensor) -> torch.Tensor:
    """The bit patterns of 16- or 32-bit numbers as int64 in [0, 2^32)."""
    signed = {2: torch.int16, 4: torch.int32}[values.dtype.itemsize]
    return values.view(signed).to(torch.int64).bitwise_and_((1 << 8 * values.dtype.itemsize) - 1)


def _mix(numbers: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer, in place on int64; products wrap modulo 2^64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        shifted = numbers >> shift
        numbers ^= shifted.bitwise_and_((1 << (64 - shift)) - 1)  # int64 shifts copy the sign bit
        if factor != 1:
            numbers *= factor - (1 << 64)
    return numbers

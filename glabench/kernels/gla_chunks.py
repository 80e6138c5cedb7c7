"""Where the chunks of a call lie, and how its rows are cut up for a device."""

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from glabench.kernels import ahead
from glabench.kernels.arguments import check_bounds

SEGMENT = 4096  # tokens: shorter segments cost more than they save
WIDE_BYTES = 210 << 10  # of shared memory, which wide_kernel's tiles may take: 209 in chunks of 128


class Chunks(NamedTuple):
    """Where chunks of `size` lie: `table` [total, 2] of start and length, `offsets` [rows + 1], if packed."""

    size: int
    rows: int
    each: int
    total: int
    table: Tensor | None = None
    offsets: Tensor | None = None


def chunks_of(B: int, T: int, cu_seqlens: Tensor | None, size: int) -> Chunks:
    """The chunks of equal rows by arithmetic, of packed ones by table. Raises ShapeError."""
    if cu_seqlens is None:
        each = -(-T // size)
        return Chunks(size, B, each, B * each)
    return packed_chunks(cu_seqlens, T, size)


_last_packed: list[tuple[Tensor, int | None, int, Chunks]] = []


def packed_chunks(cu_seqlens: Tensor, T: int, size: int, on_cpu: Tensor | None = None) -> Chunks:
    """The chunks of packed rows; `on_cpu` has the same bounds. Raises ShapeError.

    Reading the bounds waits for the device, so those of the last tensor, if unchanged, are kept.
    """
    # tensors of inference mode do not tell of changes
    now = None if cu_seqlens.is_inference() else cu_seqlens._version
    for tensor, version, length, chunks in _last_packed:
        if tensor is cu_seqlens and now is not None and (version, length, chunks.size) == (now, T, size):
            return chunks
    bounds = (cu_seqlens if on_cpu is None else on_cpu).tolist()
    check_bounds(bounds, T)
    table, offsets = [], [0]
    for low, high in itertools.pairwise(bounds):
        table += [(start, min(size, high - start)) for start in range(low, high, size)]
        offsets.append(len(table))
    like = {"dtype": torch.int64, "device": cu_seqlens.device}
    chunks = Chunks(
        size,
        len(bounds) - 1,
        0,
        len(table),
        torch.tensor(table, **like).reshape(-1, 2),
        torch.tensor(offsets, **like),
    )
    _last_packed[:] = [(cu_seqlens, now, T, chunks)]
    return chunks


def row_table(cu_seqlens, chunks, segments) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Bounds, chunk offsets, number of rows and segments a row, as the sequential kernels take them."""
    if segments is None:
        return cu_seqlens, chunks.offsets, chunks.rows, 1
    return segments.table, segments.offsets, segments.rows, segments.each


def segments_of(programs: int, chunks: Chunks, device: torch.device) -> int:
    """How many segments of a row are carried over side by side: two programs a multiprocessor, or so."""
    if chunks.table is not None or chunks.each * chunks.size < 2 * SEGMENT:
        return 1
    return max(1, min(chunks.each * chunks.size // SEGMENT, 2 * multiprocessors(device) // programs))


@functools.cache
def segments_in(B: int, T: int, G: int, size: int, device: torch.device) -> Chunks:
    """G segments of whole chunks in each of B rows, as if they were packed: bounds and chunk offsets."""
    each = -(-T // size)
    firsts = [each * i // G for i in range(G)]
    offsets = [row * each + first for row in range(B) for first in firsts] + [B * each]
    bounds = [row * T + first * size for row in range(B) for first in firsts] + [B * T]
    like = {"dtype": torch.int64, "device": device}
    return Chunks(size, B * G, G, 0, torch.tensor(bounds, **like), torch.tensor(offsets, **like))


def shared_memory(device: torch.device) -> int:
    """Bytes a program may have of it; without a GPU, as on Hopper."""
    return _shared_memory(ahead.device_of(device))


@functools.cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return WIDE_BYTES
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def multiprocessors(device: torch.device) -> int:
    """Of the device that launches are for."""
    return _multiprocessors(ahead.device_of(device))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 64

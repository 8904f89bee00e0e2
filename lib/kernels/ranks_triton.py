"""Triton kernel of `centre_ranks`: from sorted rows to ranks in one pass.

Each sorted value looks for the ends of its run of equals by bisection, so that nothing
is counted, gathered or waited for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # values of a program


def rank_rows(rows: Tensor, out: Tensor) -> None:
    """2 rank - (N + 1) within each row of rows [R, N], written to out [R, N]."""
    keys, order = rows.sort(1)
    total, n = keys.numel(), keys.shape[1]
    with torch.cuda.device_of(rows):
        _scatter_ranks[(triton.cdiv(total, BLOCK),)](
            keys, order, out, n, total, STEPS=(n - 1).bit_length(), B=BLOCK
        )


@triton.jit
def _find_first(row, value, low, high, inside, STEPS: tl.constexpr):
    """Place of the first key of a row, low to high, that is not below the value."""
    for _ in range(STEPS):
        middle = (low + high) // 2
        below = tl.load(row + middle, mask=inside, other=0.0) < value
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def _find_last(row, value, low, high, inside, STEPS: tl.constexpr):
    """Place of the last key of a row, low to high, that is not above the value."""
    for _ in range(STEPS):
        middle = (low + high + 1) // 2
        above = tl.load(row + middle, mask=inside, other=0.0) > value
        low = tl.where(above, low, middle)
        high = tl.where(above, middle - 1, high)
    return low


@triton.jit
def _scatter_ranks(keys, order, out, n, total, STEPS: tl.constexpr, B: tl.constexpr):
    """first + last + 1 - N of each sorted value, written to where it came from."""
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = at < total
    start = at // n * n
    place, zero = at - start, tl.full([B], 0, tl.int64)
    value = tl.load(keys + at, mask=inside, other=0.0)
    first = _find_first(keys + start, value, zero, place, inside, STEPS)
    last = _find_last(keys + start, value, place, zero + n - 1, inside, STEPS)
    target = start + tl.load(order + at, mask=inside, other=0)
    centred = first + last + 1 - n
    tl.store(out + target, centred.to(out.dtype.element_ty), mask=inside)

"""Triton kernel of `abs_matmul`: each weight is loaded once, in its own type.

A program has N columns and a span of rows of the weights, K at a time; partial sums of
the spans are added up afterwards, so that repeated runs agree to the bit. One row of
scores is multiplied and added element by element, which is as fast as the weights can
be read; more rows are a product of tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.standard import _sum_combine

COLUMNS = 128  # of the weights in a tile
DEPTH = 32  # rows of the weights in a tile
ROWS = 16  # of the scores in a tile, where there are several
PROGRAMS = 1024  # about as many as partial sums are made by


def multiply(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [M, O] |weight [O, I]|, float64 [M, I]; rows in float64, nothing empty."""
    (count, depth), width = rows.shape, weight.shape[1]
    sizes = _plan_tiles(count, width)
    tiles = triton.cdiv(count, sizes["M"]) * triton.cdiv(width, sizes["N"])
    steps = triton.cdiv(depth, DEPTH)
    splits = min(steps, max(1, PROGRAMS // tiles))
    span = triton.cdiv(steps, splits) * DEPTH
    splits = triton.cdiv(depth, span)
    parts = rows.new_empty(splits, count, width)
    with torch.cuda.device_of(rows):
        _multiply_span[(tiles, splits)](
            rows.contiguous(), weight, parts, count, depth, width, span,
            *weight.stride(), K=DEPTH, **sizes,
        )  # fmt: skip
    return parts.sum(0)


def _plan_tiles(count: int, width: int) -> dict:
    """Rows of scores (M) and columns (N) of a tile."""
    if count == 1:
        return {"M": 1, "N": min(COLUMNS, triton.next_power_of_2(width))}
    return {"M": ROWS, "N": max(16, COLUMNS // 2)}


@triton.jit
def _multiply_span(
    rows, weight, parts, count, depth, width, span, down, across, K: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Partial sums [M, N] over span rows of the weights, in float64."""
    blocks = (width + N - 1) // N
    split = tl.program_id(1).to(tl.int64)
    m = (tl.program_id(0) // blocks).to(tl.int64) * M + tl.arange(0, M)[:, None]
    n = (tl.program_id(0) % blocks).to(tl.int64) * N + tl.arange(0, N)[None, :]
    if M == 1:
        total = tl.full([K, N], 0, tl.float64)
    else:
        total = tl.full([M, N], 0, tl.float64)
    first = split * span
    for step in range(0, span, K):
        k = first + step + tl.arange(0, K)
        at = weight + k[:, None] * down + n * across
        w = tl.load(at, mask=(k[:, None] < depth) & (n < width), other=0.0)
        w = tl.abs(w.to(tl.float64))
        if M == 1:
            s = tl.load(rows + k[:, None], mask=k[:, None] < depth, other=0.0)
            total += s * w
        else:
            inside = (m < count) & (k[None, :] < depth)
            s = tl.load(rows + m * depth + k[None, :], mask=inside, other=0.0)
            total = tl.dot(s, w, total, input_precision="ieee", out_dtype=tl.float64)
    if M == 1:
        total = tl.reduce(total, 0, _sum_combine, keep_dims=True)
    at = parts + (split * count + m) * width + n
    tl.store(at, total, mask=(m < count) & (n < width))

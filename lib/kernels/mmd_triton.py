"""Triton kernel of `mmd2`'s forward pass: tiles of the kernel matrix, summed up."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.standard import _sum_combine  # tl.sum cannot always be interpreted

BLOCK = 64  # rows and columns of a tile
DEPTH = 32  # features of one step
WARPS = 8  # with 4, float64 spills registers


def sum_kernel(
    z: Tensor, n: int, pairs: tuple, rates: tuple, *, diagonal: bool
) -> Tensor:
    """Weighted sum of the kernel matrix of z [N, d], whose first n rows are x; float64.

    pairs: weights within x, within y and across; rates: 1 / (2 s^2) of each bandwidth;
    diagonal: whether k(a, a) counts. One number a tile is stored.
    """
    facts = torch.stack([z.new_full((), fact) for fact in (*pairs, *rates)])
    tiles = triton.cdiv(len(z), BLOCK)  # facts are filled there: a copy would wait
    sums = z.new_zeros(tiles, tiles)
    acc = tl.float64 if z.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(z):
        _sum_tiles[(tiles, tiles)](
            z, z.square().sum(1), facts, sums, n, len(z), z.shape[1],
            DIAGONAL=diagonal, COUNT=len(rates), ACC=acc, B=BLOCK, K=DEPTH,
            num_warps=WARPS,
        )  # fmt: skip
    return sums.sum(dtype=torch.float64)


@triton.jit
def _measure_tile(
    z, norms, rows, columns, total, D, ACC: tl.constexpr, B: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """Squared distances [B, B], zero on the diagonal; 0 norms past the end."""
    products = tl.full([B, B], 0, ACC)
    down, across = rows.to(tl.int64)[:, None] * D, columns.to(tl.int64)[None, :] * D
    for step in range(0, D, K):
        k = step + tl.arange(0, K)
        left = (rows[:, None] < total) & (k[None, :] < D)
        right = (columns[None, :] < total) & (k[:, None] < D)
        a = tl.load(z + down + k[None, :], mask=left, other=0.0)
        b = tl.load(z + across + k[:, None], mask=right, other=0.0)
        # not TF32: its 10 bits would be subtracted from the norms
        products = tl.dot(a, b, products, input_precision="ieee", out_dtype=ACC)
    squares = tl.load(norms + rows, mask=rows < total, other=0.0)[:, None]
    squares += tl.load(norms + columns, mask=columns < total, other=0.0)[None, :]
    squares = tl.maximum(squares - 2 * products, 0.0)
    return tl.where(rows[:, None] == columns[None, :], 0.0, squares)


@triton.jit
def _weigh_tile(rows, columns, facts, n, total):
    """Weights of pairs [B, B]: x with x, y with y, across; 0 past the end."""
    left, right = rows[:, None] < n, columns[None, :] < n
    within = tl.where(left, tl.load(facts), tl.load(facts + 1))
    weights = tl.where(left == right, within, tl.load(facts + 2))
    inside = (rows[:, None] < total) & (columns[None, :] < total)
    return tl.where(inside, weights, 0.0)


@triton.jit
def _sum_tiles(
    z, norms, facts, sums, n, total, D, DIAGONAL: tl.constexpr, COUNT: tl.constexpr,
    ACC: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Weighted sum of the kernel over each tile on and above the diagonal."""
    down, across = tl.program_id(0), tl.program_id(1)
    if across >= down:
        rows, columns = down * B + tl.arange(0, B), across * B + tl.arange(0, B)
        squares = _measure_tile(z, norms, rows, columns, total, D, ACC, B, K)
        kernel = tl.full([B, B], 0, ACC)
        for i in tl.static_range(COUNT):
            kernel += tl.exp(-tl.load(facts + 3 + i) * squares)
        kernel *= _weigh_tile(rows, columns, facts, n, total)
        if not DIAGONAL:
            kernel = tl.where(rows[:, None] == columns[None, :], 0.0, kernel)
        part = tl.reduce(tl.reduce(kernel, 1, _sum_combine), 0, _sum_combine)
        part *= tl.where(across > down, 2.0, 1.0)
        tl.store(sums + down * tl.num_programs(1) + across, part)

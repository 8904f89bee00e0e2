"""Triton kernels of `mmd2`: tiles of the kernel matrix, in float32 throughout.

Forward keeps one number a tile. Backward keeps `STRIP` rows of weights at a time, made
by one kernel and multiplied with the samples by another, so that no tile of gradients
is written by two programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.language.standard import _sum_combine

from lib.kernels.mmd import pool_samples, weigh_pairs

BLOCK = 64  # rows and columns of a tile
DEPTH = 32  # features of one step
WARPS = 8  # with 4, float64 spills registers
STRIP = 1024  # rows of the matrix held at a time in backward


class FusedMMD(torch.autograd.Function):
    """Triton implementation, upper triangle forward, strips of rows backward."""

    @staticmethod
    def forward(ctx, x, y, rates, unbiased):
        """Scalar; keeps the samples only."""
        ctx.save_for_backward(x, y)
        ctx.rates, ctx.unbiased = rates, unbiased
        z, n, facts = _prepare(x, y, rates, unbiased)
        tiles = triton.cdiv(len(z), BLOCK)
        sums = z.new_zeros(tiles, tiles)
        with torch.cuda.device_of(z):
            _sum_tiles[(tiles, tiles)](
                z, z.square().sum(1), facts, sums, n, len(z), DIAGONAL=not unbiased,
                **_sizes(z, rates),
            )  # fmt: skip
        return sums.sum(dtype=torch.float64).to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Gradients [n, d] and [m, d], where they are needed."""
        x, y = ctx.saved_tensors
        z, n, facts = _prepare(x, y, ctx.rates, ctx.unbiased)
        to_x, to_y = ctx.needs_input_grad[:2]
        first, last = 0 if to_x else n, len(z) if to_y else n
        with torch.cuda.device_of(z):
            pull = _pull_rows(z, n, first, last, facts, ctx.rates).mul_(grad)
        dx = pull[:n].to(x.dtype) if to_x else None
        dy = pull[n - first :].to(y.dtype) if to_y else None
        return dx, dy, None, None


def _prepare(x: Tensor, y: Tensor, rates, unbiased: bool) -> tuple[Tensor, int, Tensor]:
    """Pooled samples, size of the first, and [3 weights of pairs, rates]."""
    z, n = pool_samples(x, y), len(x)
    pairs = weigh_pairs(n, len(y), unbiased=unbiased)
    facts = torch.stack([z.new_full((), fact) for fact in (*pairs, *rates)])
    return z, n, facts  # filled on the device: a copy to it would wait


def _sizes(z: Tensor, rates=()) -> dict:
    acc = tl.float64 if z.dtype == torch.float64 else tl.float32
    sizes = {"D": z.shape[1], "ACC": acc, "B": BLOCK, "K": DEPTH, "num_warps": WARPS}
    return {**sizes, "COUNT": len(rates)} if rates else sizes


def _pull_rows(z: Tensor, n: int, first: int, last: int, facts, rates) -> Tensor:
    """Gradient to rows first to last of z, through a strip of weights."""
    norms, pull = z.square().sum(1), z.new_empty(last - first, z.shape[1])
    strip = z.new_empty(min(STRIP, last - first), len(z))
    sizes, across = _sizes(z, rates), triton.cdiv(len(z), BLOCK)
    for start in range(first, last, STRIP):
        stop = min(start + STRIP, last)
        down = triton.cdiv(stop - start, BLOCK)
        _weigh_strip[(down, across)](
            z, norms, facts, strip, n, len(z), start, stop, **sizes
        )
        _pull_strip[(down, triton.cdiv(z.shape[1], BLOCK))](
            z, strip, pull[start - first :], len(z), start, stop, **_sizes(z)
        )
    return pull


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


@triton.jit
def _weigh_strip(
    z, norms, facts, strip, n, total, start, stop, D, COUNT: tl.constexpr,
    ACC: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Slopes of rows start to stop: pulls of all samples on these, [rows, total]."""
    local = tl.program_id(0) * B + tl.arange(0, B)
    rows, columns = start + local, tl.program_id(1) * B + tl.arange(0, B)
    squares = _measure_tile(z, norms, rows, columns, total, D, ACC, B, K)
    slopes = tl.full([B, B], 0, ACC)
    for i in tl.static_range(COUNT):
        rate = tl.load(facts + 3 + i)
        slopes += 4 * rate * tl.exp(-rate * squares)
    slopes *= _weigh_tile(rows, columns, facts, n, total)
    at = strip + local.to(tl.int64)[:, None] * total + columns[None, :]
    inside = (rows[:, None] < stop) & (columns[None, :] < total)
    tl.store(at, slopes, mask=inside)


@triton.jit
def _pull_strip(
    z, strip, pull, total, start, stop, D, ACC: tl.constexpr, B: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """sum_j slope_ij (z_j - z_i) for rows start to stop and B features."""
    local = tl.program_id(0) * B + tl.arange(0, B)
    f = tl.program_id(1) * B + tl.arange(0, B)
    down = local.to(tl.int64)[:, None]
    inside = (start + local[:, None] < stop) & (f[None, :] < D)
    heads, slope = tl.full([B, B], 0, ACC), tl.full([B], 0, ACC)
    for step in range(0, total, K):
        j = step + tl.arange(0, K)
        left = (start + local[:, None] < stop) & (j[None, :] < total)
        right = (j[:, None] < total) & (f[None, :] < D)
        s = tl.load(strip + down * total + j[None, :], mask=left, other=0.0)
        at = z + j.to(tl.int64)[:, None] * D + f[None, :]
        b = tl.load(at, mask=right, other=0.0)
        heads = tl.dot(s, b, heads, input_precision="ieee", out_dtype=ACC)
        slope += tl.reduce(s, 1, _sum_combine)
    own = tl.load(z + (start + down) * D + f[None, :], mask=inside, other=0.0)
    tl.store(pull + down * D + f[None, :], heads - slope[:, None] * own, mask=inside)

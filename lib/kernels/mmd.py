"""Squared maximum mean discrepancy of two samples, without an n x n matrix."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lib.kernels.dispatch import choose_backend

ROWS = 256  # of the kernel matrix held at a time
ROWS_ON_GPU = 2048  # where small steps would be all launches


def mmd2(
    x: Tensor,
    y: Tensor,
    bandwidths: Sequence[float],
    *,
    unbiased: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Squared MMD under a sum of Gaussian kernels.

    x [n, d] and y [m, d], floating point. k(a, b) sums exp(-|a - b|^2 / (2 s^2)) over s
    in `bandwidths`, which are in units of x. unbiased: the U-statistic, which leaves
    out k(a, a) and can be negative; otherwise the V-statistic. Returns a scalar,
    float64 for float64 and else float32, with gradients to x and y. backend: "triton",
    "torch", or None for the fitting one. Raises `ValueError` for shapes that do not
    match, too few rows and bandwidths that are not positive.
    Source: Gretton et al. 2012, eq. 3 and 5; the sum: Romano, Sesia and Candes 2020.
    """
    _check_samples(x, y, least=2 if unbiased else 1)
    widths = [float(width) for width in bandwidths]
    if not widths or not all(0 < width < math.inf for width in widths):
        raise ValueError(f"bandwidths must be positive numbers, got {widths}")
    rates = tuple(0.5 / width**2 for width in widths)
    return TiledMMD.apply(x, y, rates, unbiased, choose_backend(x, backend))


def _check_samples(x: Tensor, y: Tensor, *, least: int) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or x.shape[1] == 0:
        raise ValueError(
            "samples must be [n, d] and [m, d], got "
            f"{list(x.shape)} and {list(y.shape)}"
        )
    if min(len(x), len(y)) < least:
        raise ValueError(
            f"samples need {least} or more rows, got {len(x)} and {len(y)}"
        )
    if x.dtype != y.dtype or not x.is_floating_point() or x.device != y.device:
        raise ValueError(
            "samples must share a floating point type and a device, got "
            f"{x.dtype} on {x.device} and {y.dtype} on {y.device}"
        )


class TiledMMD(torch.autograd.Function):
    """Works through the upper triangle by blocks of rows, forward and again backward.

    Autograd of the plain formula would keep several n x n matrices for each bandwidth
    (tests/benchmarks/mmd.csv). The forward pass has a Triton kernel; the backward pass
    is products of matrices, which torch does well on any device.
    """

    @staticmethod
    def forward(ctx, x, y, rates, unbiased, backend):
        """Scalar; keeps the samples only."""
        ctx.save_for_backward(x, y)
        ctx.rates, ctx.unbiased = rates, unbiased
        z, n = _pool_samples(x, y), len(x)
        pairs = _weigh_pairs(n, len(y), unbiased=unbiased)
        if backend == "triton":
            from lib.kernels.mmd_triton import sum_kernel

            return sum_kernel(z, n, pairs, rates, diagonal=not unbiased).to(z.dtype)
        # n^2 terms nearly cancel: what is left drowns in float32's rounding of the sum.
        total = z.new_zeros((), dtype=torch.float64)
        for _, _, squares, weights in _walk_tiles(z, n, len(z), pairs):
            kernel = _sum_exps(squares, [(rate, 1.0) for rate in rates])
            if unbiased:
                kernel.diagonal().zero_()
            total += kernel.sum(0).double() @ weights.double()
        return total.to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Gradients [n, d] and [m, d], where they are needed.

        A pair (i, j) pulls z_i towards z_j and z_j towards z_i by the same slope, so
        that a block of rows serves its own rows and, transposed, those of its columns.
        """
        x, y = ctx.saved_tensors
        z, n = _pool_samples(x, y), len(x)
        pairs = _weigh_pairs(n, len(y), unbiased=ctx.unbiased)
        last = len(z) if ctx.needs_input_grad[1] else n
        pull = torch.zeros_like(z)
        for start, stop, squares, weights in _walk_tiles(z, n, last, pairs):
            slopes = _sum_exps(squares, [(rate, 2 * rate) for rate in ctx.rates])
            slopes *= weights
            _add_pull(pull[start:stop], slopes, z[start:stop], z[start:])
            _add_pull(pull[start:], slopes.T, z[start:], z[start:stop])
        halves = zip((x, y), (pull * grad).split([n, len(y)]), strict=True)
        grads = [part.to(sample.dtype) for sample, part in halves]
        needed = zip(grads, ctx.needs_input_grad[:2], strict=True)
        return *(part if wanted else None for part, wanted in needed), None, None, None


def _pool_samples(x: Tensor, y: Tensor) -> Tensor:
    """Both samples [n + m, d] around their common mean, where distances lose least.

    float64 for float64, else float32.
    """
    pooled = torch.cat([x, y]).to(torch.promote_types(x.dtype, torch.float32))
    return pooled.sub_(pooled.mean(dim=0))


def _weigh_pairs(n: int, m: int, *, unbiased: bool) -> tuple[float, float, float]:
    """Weights of ordered pairs within x, within y and across, either way round."""
    less = 1 if unbiased else 0
    return 1 / (n * (n - less)), 1 / (m * (m - less)), -1 / (n * m)


def _walk_tiles(
    z: Tensor, n: int, last: int, pairs: tuple[float, float, float]
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(start, stop, squared distances of those rows to rows from start on, weights).

    No block has rows of both samples; rows from `last` on are left out. A weight is
    that of a column's pairs; columns past stop stand for two pairs.
    """
    within_x, within_y, across = pairs
    norms, step = z.square().sum(1), ROWS_ON_GPU if z.is_cuda else ROWS
    for start in [*range(0, n, step), *range(n, last, step)]:
        stop = min(start + step, n if start < n else len(z))
        squares = torch.addmm(norms[start:], z[start:stop], z[start:].T, alpha=-2)
        # |a|^2 + |b|^2 - 2ab can round to below 0, and to above it for equal rows.
        squares.add_(norms[start:stop, None]).clamp_(min=0).diagonal().zero_()
        weights = z.new_full((len(z) - start,), within_y if start >= n else within_x)
        if start < n:
            weights[n - start :] = across
        weights[stop - start :] *= 2
        yield start, stop, squares, weights


def _sum_exps(squares: Tensor, terms: list[tuple[float, float]]) -> Tensor:
    """Sum of factor * exp(-rate * squares) over the terms (rate, factor)."""
    total, term = torch.zeros_like(squares), torch.empty_like(squares)
    for rate, factor in terms:
        torch.mul(squares, -rate, out=term).exp_()
        total.add_(term, alpha=factor)
    return total


def _add_pull(out: Tensor, slopes: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Adds sum_j slopes_ij (columns_j - rows_i) to out_i."""
    out.addmm_(slopes, columns)
    out.addcmul_(slopes.sum(1, keepdim=True), rows, value=-1)

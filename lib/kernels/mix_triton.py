"""Triton kernels of `mix_norm_relu`: the mixed features are never stored.

Memory is read as rows of C channels, first those of real images, then as many of their
knockoffs. A tile has R rows, each with its knockoff's, and W channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.language.standard import _sum_combine

TILE = 1024  # rows x channels of one step
WIDTH = 64  # most channels of a tile
PROGRAMS = 1024  # about as many as partial sums are made by


class MixNormRelu(torch.autograd.Function):
    """Saves x and two numbers a channel; mixing and the mask are done again.

    Each sum over rows is made in two stages, parts in a kernel and the rest in torch,
    rather than by atomic additions: their order changes from run to run, and with it
    the last bits.
    """

    @staticmethod
    def forward(ctx, x, beta, weight, bias, eps, relu):
        """y [2B, C, *positions] like x."""
        given, x, channels = x, _to_last(x), x.shape[1]
        weight = beta.new_ones(channels) if weight is None else weight.contiguous()
        bias = beta.new_zeros(channels) if bias is None else bias.contiguous()
        beta, y = beta.contiguous(), torch.empty_like(x)
        sizes, parts = plan_launch(x)
        with torch.cuda.device_of(x):
            mean, rstd = _measure(x, beta, sizes, parts, eps)
            operands = x, beta, weight, bias, mean, rstd
            _write_output[_count_tiles(sizes)](*operands, y, RELU=relu, **sizes)
        ctx.save_for_backward(*operands)
        ctx.plan = sizes, parts, relu
        return y if given is x else torch.empty_like(given).copy_(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Gradients to x, beta, weight and bias, where they are needed.

        With n the normalised values, N of them a channel, and g what arrives behind the
        ReLU, a mixed value gets w rstd (g - sum g / N - n sum g n / N): the sums are
        what comes back through mean and variance. Its gradient to beta is the sum of
        that times (real - knockoff), which splits into sums over one pass.
        """
        operands, (sizes, parts, relu) = ctx.saved_tensors, ctx.plan
        x, beta, weight, bias, _, rstd = operands
        operands = *operands, _to_last(grad)
        blocks, count = triton.cdiv(sizes["C"], sizes["W"]), 2 * sizes["pairs"]
        found = _new_parts(x, 5, parts["splits"], sizes["C"])
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        with torch.cuda.device_of(x):
            grid = (blocks * parts["splits"],)
            _collect_grads[grid](*operands, found, RELU=relu, **parts, **sizes)
            plain, along, steep, level, slant = sums = found.sum(1)
            if dx is not None:
                tiles = _count_tiles(sizes)
                _write_grad[tiles](*operands, sums / count, dx, RELU=relu, **sizes)
        shared = (plain * level + along * slant) / count
        d_beta = weight * rstd * (steep - shared)
        rest = zip((d_beta, along, plain), (beta, weight, bias), strict=True)
        rest = [found.to(vector.dtype) for found, vector in rest]
        needed = zip(rest, ctx.needs_input_grad[1:4], strict=True)
        return dx, *(found if wanted else None for found, wanted in needed), None, None


# -- on the host -----------------------------------------------------------------------


def plan_launch(x: Tensor) -> tuple[dict, dict]:
    """Arguments of every kernel for x, and those of the partial sums.

    C channels, pairs of values a channel, tiles of R rows and W channels, ACC: type of
    sums; splits: partial sums a channel, of span rows each.
    """
    channels = x.shape[1]
    pairs = x.numel() // channels // 2
    width = min(WIDTH, triton.next_power_of_2(channels))
    rows = min(TILE // width, triton.next_power_of_2(pairs))
    blocks = triton.cdiv(pairs, rows)
    splits = min(blocks, max(1, PROGRAMS // triton.cdiv(channels, width)), 512)
    span = triton.cdiv(blocks, splits) * rows
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    sizes = {"C": channels, "pairs": pairs, "ACC": acc, "R": rows, "W": width}
    return sizes, {"splits": triton.cdiv(pairs, span), "span": span}


def _to_last(x: Tensor) -> Tensor:
    """x itself where channels are adjacent in memory, as in training on a GPU."""
    rows = x.movedim(1, -1)
    return x if rows.is_contiguous() else rows.contiguous().movedim(-1, 1)


def _count_tiles(sizes: dict) -> tuple[int]:
    blocks = triton.cdiv(sizes["C"], sizes["W"])
    return (blocks * triton.cdiv(sizes["pairs"], sizes["R"]),)


def _new_parts(x: Tensor, *shape: int) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty(shape, dtype=dtype, device=x.device)


def _measure(x: Tensor, beta: Tensor, sizes: dict, parts: dict, eps: float):
    """Mean and 1 / standard deviation of each channel after mixing, [C] each."""
    splits, blocks = parts["splits"], triton.cdiv(sizes["C"], sizes["W"])
    found = _new_parts(x, 2, splits, sizes["C"])
    _collect_moments[(blocks * splits,)](x, beta, found, **parts, **sizes)
    means, spreads = found
    starts = parts["span"] * torch.arange(splits, device=x.device)
    counts = (sizes["pairs"] - starts).clamp(max=parts["span"]).to(means)[:, None]
    mean = (means * counts).sum(0) / sizes["pairs"]
    spread = (spreads + 2 * counts * (means - mean).square()).sum(0)
    return mean, (spread / (2 * sizes["pairs"]) + eps).rsqrt()


# -- on the device ---------------------------------------------------------------------


@triton.jit
def _sum_rows(tile):
    """tl.sum cannot be interpreted where triton was imported for compiling."""
    return tl.reduce(tile, 0, _sum_combine, keep_dims=True)


@triton.jit
def _find_tile(step, C, R: tl.constexpr, W: tl.constexpr):
    """Rows [R, 1] and channels [1, W] of this program, and its place among the rows.

    Programs of one place and different channels are neighbours. Rows are counted in 64
    bits: row times C passes 2^31 for large batches.
    """
    blocks = (C + W - 1) // W
    place = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * W + tl.arange(0, W)[None, :]
    return place * step + tl.arange(0, R)[:, None], c, place


@triton.jit
def _read_rows(values, r, c, C, pairs, ACC: tl.constexpr):
    """Real values and their knockoffs, [R, W] each, zero past the ends."""
    mask = (r < pairs) & (c < C)
    real = tl.load(values + r * C + c, mask=mask, other=0.0)
    knock = tl.load(values + (r + pairs) * C + c, mask=mask, other=0.0)
    return real.to(ACC), knock.to(ACC)


@triton.jit
def _write_rows(values, real, knock, r, c, C, pairs):
    mask = (r < pairs) & (c < C)
    tl.store(values + r * C + c, real.to(values.dtype.element_ty), mask=mask)
    below = values + (r + pairs) * C + c
    tl.store(below, knock.to(values.dtype.element_ty), mask=mask)


@triton.jit
def _read_channels(vector, c, C, ACC: tl.constexpr):
    return tl.load(vector + c, mask=c < C, other=0.0).to(ACC)


@triton.jit
def _collect_moments(
    x, beta, parts, splits, span, C, pairs, ACC: tl.constexpr, R: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviations of each part, [2, splits, C].

    Welford's update with two values at a time, then one merge over the rows of the
    tile: the difference of large sums of squares would lose a small variance.
    """
    first, c, place = _find_tile(span, C, R, W)
    b = _read_channels(beta, c, C, ACC)
    count = tl.full([R, 1], 0, ACC)
    mean = tl.full([R, W], 0, ACC)
    spread = tl.full([R, W], 0, ACC)
    for step in range(0, span, R):
        r = first + step
        real, knock = _read_rows(x, r, c, C, pairs, ACC)
        mixed = b * real + (1 - b) * knock
        here = (r < pairs).to(ACC)
        share = here / tl.maximum(count + here, 1.0)
        off = 0.5 * (mixed + knock) - mean
        gap = mixed - knock
        mean += off * share
        spread += here * 0.5 * gap * gap + 2 * count * share * off * off
        count += here
    centre = _sum_rows(mean * count) / _sum_rows(count)
    spread += 2 * count * (mean - centre) * (mean - centre)
    at = parts + place * C + c
    tl.store(at, centre, mask=c < C)
    tl.store(at + splits * C, _sum_rows(spread), mask=c < C)


@triton.jit
def _write_output(
    x, beta, weight, bias, mean, rstd, y, C, pairs, RELU: tl.constexpr,
    ACC: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    r, c, _ = _find_tile(R, C, R, W)
    real, knock = _read_rows(x, r, c, C, pairs, ACC)
    b = _read_channels(beta, c, C, ACC)
    w, shift = _read_channels(weight, c, C, ACC), _read_channels(bias, c, C, ACC)
    centre, scale = _read_channels(mean, c, C, ACC), _read_channels(rstd, c, C, ACC)
    above = (b * real + (1 - b) * knock - centre) * scale * w + shift
    below = (knock - centre) * scale * w + shift
    if RELU:
        above = tl.where(above < 0, 0.0, above)  # keeps NaN, as torch does
        below = tl.where(below < 0, 0.0, below)
    _write_rows(y, above, below, r, c, C, pairs)


@triton.jit
def _read_slopes(
    x, beta, weight, bias, mean, rstd, grad, r, c, C, pairs, RELU: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Normalised values, their gradients behind the ReLU, and real minus knockoff."""
    real, knock = _read_rows(x, r, c, C, pairs, ACC)
    g_above, g_below = _read_rows(grad, r, c, C, pairs, ACC)
    b = _read_channels(beta, c, C, ACC)
    w, shift = _read_channels(weight, c, C, ACC), _read_channels(bias, c, C, ACC)
    centre, scale = _read_channels(mean, c, C, ACC), _read_channels(rstd, c, C, ACC)
    above = (b * real + (1 - b) * knock - centre) * scale
    below = (knock - centre) * scale
    if RELU:  # the mask is cheaper to find again than to have stored
        g_above = tl.where(above * w + shift > 0, g_above, 0.0)
        g_below = tl.where(below * w + shift > 0, g_below, 0.0)
    return above, below, g_above, g_below, real - knock


@triton.jit
def _collect_grads(
    x, beta, weight, bias, mean, rstd, grad, parts, splits, span, C, pairs,
    RELU: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Sums of g and g n; of g, 1 and n times (real - knockoff): [5, splits, C]."""
    first, c, place = _find_tile(span, C, R, W)
    plain = tl.full([R, W], 0, ACC)
    along = tl.full([R, W], 0, ACC)
    steep = tl.full([R, W], 0, ACC)
    level = tl.full([R, W], 0, ACC)
    slant = tl.full([R, W], 0, ACC)
    for step in range(0, span, R):
        above, below, g_above, g_below, gap = _read_slopes(
            x, beta, weight, bias, mean, rstd, grad, first + step, c, C, pairs, RELU,
            ACC,
        )  # fmt: skip
        plain += g_above + g_below
        along += g_above * above + g_below * below
        steep += g_above * gap
        level += gap
        slant += above * gap
    at, size = parts + place * C + c, splits * C
    tl.store(at, _sum_rows(plain), mask=c < C)
    tl.store(at + size, _sum_rows(along), mask=c < C)
    tl.store(at + 2 * size, _sum_rows(steep), mask=c < C)
    tl.store(at + 3 * size, _sum_rows(level), mask=c < C)
    tl.store(at + 4 * size, _sum_rows(slant), mask=c < C)


@triton.jit
def _write_grad(
    x, beta, weight, bias, mean, rstd, grad, means, dx, C, pairs, RELU: tl.constexpr,
    ACC: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Gradient to x; means: of g and of g n, the first two rows of [5, C]."""
    r, c, _ = _find_tile(R, C, R, W)
    above, below, g_above, g_below, _ = _read_slopes(
        x, beta, weight, bias, mean, rstd, grad, r, c, C, pairs, RELU, ACC
    )
    plain = _read_channels(means, c, C, ACC)
    along = _read_channels(means + C, c, C, ACC)
    slope = _read_channels(weight, c, C, ACC) * _read_channels(rstd, c, C, ACC)
    above = slope * (g_above - plain - above * along)
    below = slope * (g_below - plain - below * along)
    b = _read_channels(beta, c, C, ACC)
    _write_rows(dx, b * above, below + (1 - b) * above, r, c, C, pairs)

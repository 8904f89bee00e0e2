"""Triton kernels of `mix_norm_relu`: the mixed features are never stored.

A tile has R rows, each a real value and its knockoff at one image and position, and W
channels. Sums over rows go through partial results in a fixed order, without atomics,
so that repeated runs agree to the bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.language.standard import _sum_combine

TILE = 1024  # rows x channels of one step
WIDTH = 64  # channels of a tile, where channels are adjacent in memory
PROGRAMS = 1024  # about as many as partial sums are made by


def plan_launch(x: Tensor) -> tuple[dict, dict]:
    """Arguments of every kernel for x, and those of the partial sums.

    They follow from shape, type and layout alone. C channels, S positions (1 where
    channels are adjacent in memory: LAST), pairs of values a channel, half: elements
    before the first knockoff, WIDE: offsets of 64 bits, ACC: type of sums, tiles of R
    rows and W channels; splits: partial sums a channel, of span rows each.
    """
    channels, last = x.shape[1], _is_channels_last(x)
    pairs = x.numel() // channels // 2
    width = min(WIDTH, triton.next_power_of_2(channels)) if last else 1
    rows = min(TILE // width, triton.next_power_of_2(pairs))
    blocks = triton.cdiv(pairs, rows)
    splits = min(blocks, max(1, PROGRAMS // triton.cdiv(channels, width)), 512)
    span = triton.cdiv(blocks, splits) * rows
    sizes = {
        "C": channels,
        "S": 1 if last else x[0, 0].numel(),
        "pairs": pairs,
        "half": x.numel() // 2,
        "LAST": last,
        "WIDE": x.numel() >= 2**31,
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "R": rows,
        "W": width,
    }
    return sizes, {"splits": triton.cdiv(pairs, span), "span": span}


class MixNormRelu(torch.autograd.Function):
    """Saves x and two numbers a channel; mixing and the mask are done again."""

    @staticmethod
    def forward(ctx, x, beta, weight, bias, eps, relu):
        """y [2B, C, *positions] like x."""
        dense = x.is_contiguous() or _is_channels_last(x)
        x = x if dense else x.contiguous()
        beta, weight, bias = (v if v is None else v.contiguous()
                              for v in (beta, weight, bias))  # fmt: skip
        sizes, parts = plan_launch(x)
        flags = {"SCALED": weight is not None, "MOVED": bias is not None, "RELU": relu}
        y = torch.empty_like(x)
        with torch.cuda.device_of(x):
            mean, rstd = _measure(x, beta, sizes, parts, eps)
            operands = x, *_fill(x, beta, weight, bias), mean, rstd
            _write_output[_count_tiles(sizes)](*operands, y, **sizes, **flags)
        ctx.save_for_backward(x, beta, weight, bias, mean, rstd)
        ctx.plan = sizes, parts, flags
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Gradients to x, beta, weight and bias, where they are needed."""
        x, beta, weight, bias, mean, rstd = ctx.saved_tensors
        sizes, parts, flags = ctx.plan
        to_x, to_beta, to_weight, to_bias = ctx.needs_input_grad[:4]
        fits = _is_channels_last(grad) if sizes["LAST"] else grad.is_contiguous()
        grad = grad if fits else torch.empty_like(x).copy_(grad)
        operands = x, *_fill(x, beta, weight, bias), mean, rstd, grad
        dx = torch.empty_like(x) if to_x else None
        with torch.cuda.device_of(x):
            sums = _sum_grads(operands, sizes, parts, flags, to_beta)
            if to_x:
                tiles = _count_tiles(sizes)
                _write_grad[tiles](*operands, sums, dx, **sizes, **flags)
        wanted = (to_beta, beta, 2), (to_weight, weight, 1), (to_bias, bias, 0)
        rest = [sums[k].to(v.dtype) if needed else None for needed, v, k in wanted]
        return dx, *rest, None, None


# -- on the host -----------------------------------------------------------------------


def _is_channels_last(x: Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()


def _fill(x: Tensor, *vectors: Tensor | None) -> list[Tensor]:
    """x stands in for a vector that is None; it is not read there."""
    return [x if vector is None else vector for vector in vectors]


def _count_tiles(sizes: dict) -> tuple[int]:
    blocks = triton.cdiv(sizes["C"], sizes["W"])
    return (blocks * triton.cdiv(sizes["pairs"], sizes["R"]),)


def _new_parts(x: Tensor, *shape: int) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty(shape, dtype=dtype, device=x.device)


def _plan_finish(sizes: dict, splits: int) -> tuple[tuple[int], dict]:
    """Grid and arguments of the kernels that add up partial sums."""
    rows = triton.next_power_of_2(splits)
    width = min(triton.next_power_of_2(sizes["C"]), max(1, 4096 // rows), 32)
    shared = {name: sizes[name] for name in ("C", "pairs", "ACC")}
    grid = (triton.cdiv(sizes["C"], width),)
    return grid, {**shared, "splits": splits, "P": rows, "W": width}


def _measure(x: Tensor, beta: Tensor, sizes: dict, parts: dict, eps: float):
    """Mean and 1 / standard deviation of each channel after mixing, [C] each."""
    splits, blocks = parts["splits"], triton.cdiv(sizes["C"], sizes["W"])
    moments = _new_parts(x, 2, splits, sizes["C"])
    mean, rstd = _new_parts(x, 2, sizes["C"])
    _collect_moments[(blocks * splits,)](x, beta, moments, **parts, **sizes)
    grid, rest = _plan_finish(sizes, splits)
    wide, span = sizes["WIDE"], parts["span"]
    _finish_moments[grid](moments, mean, rstd, span=span, EPS=eps, WIDE=wide, **rest)
    return mean, rstd


def _sum_grads(operands, sizes: dict, parts: dict, flags: dict, to_beta: bool):
    """Gradients to bias, weight and beta, [3, C]; the last only if wanted."""
    x, _, weight, _, _, rstd, _ = operands
    splits, blocks = parts["splits"], triton.cdiv(sizes["C"], sizes["W"])
    found = _new_parts(x, 5 if to_beta else 2, splits, sizes["C"])
    sums = _new_parts(x, 3, sizes["C"])
    _collect_grads[(blocks * splits,)](
        *operands, found, BETA=to_beta, **parts, **sizes, **flags
    )
    grid, rest = _plan_finish(sizes, splits)
    scaled = flags["SCALED"]
    _finish_grads[grid](found, weight, rstd, sums, BETA=to_beta, SCALED=scaled, **rest)
    return sums


# -- on the device ---------------------------------------------------------------------


@triton.jit
def _sum_rows(tile):
    return tl.reduce(tile, 0, _sum_combine, keep_dims=True)


@triton.jit
def _load_vector(
    vector, c, C, GIVEN: tl.constexpr, default, ACC: tl.constexpr, W: tl.constexpr
):
    if GIVEN:
        return tl.load(vector + c, mask=c < C, other=0.0).to(ACC)
    return tl.full([1, W], default, ACC)


@triton.jit
def _find_channels(C, W: tl.constexpr):
    """Channels [1, W] of this program and its number among those that share them."""
    blocks = (C + W - 1) // W
    c = (tl.program_id(0) % blocks) * W + tl.arange(0, W)[None, :]
    return c, tl.program_id(0) // blocks


@triton.jit
def _find_rows(start, step, WIDE: tl.constexpr, R: tl.constexpr):
    """Rows [R, 1] from start + step on; start is counted in blocks of step rows."""
    if WIDE:
        start = start.to(tl.int64)
    return start * step + tl.arange(0, R)[:, None]


@triton.jit
def _place(r, c, C, S: tl.constexpr, LAST: tl.constexpr):
    """Offsets [R, W] of real values."""
    if LAST:
        return r * C + c
    return (r // S) * (C * S) + c * S + r % S


@triton.jit
def _collect_moments(
    x, beta, parts, C, pairs, half, span, splits, S: tl.constexpr,
    LAST: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """Welford's update with two values at a time, then one merge over the rows."""
    c, split = _find_channels(C, W)
    b = _load_vector(beta, c, C, True, 0.0, ACC, W)
    count = tl.full([R, 1], 0, ACC)
    mean = tl.full([R, W], 0, ACC)
    spread = tl.full([R, W], 0, ACC)
    first = _find_rows(split, span, WIDE, R)
    for step in range(0, span, R):
        r = first + step
        at, mask = _place(r, c, C, S, LAST), (r < pairs) & (c < C)
        real = tl.load(x + at, mask=mask, other=0.0).to(ACC)
        knock = tl.load(x + half + at, mask=mask, other=0.0).to(ACC)
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
    at = parts + split * C + c
    tl.store(at, centre, mask=c < C)
    tl.store(at + splits * C, _sum_rows(spread), mask=c < C)


@triton.jit
def _finish_moments(
    parts, mean, rstd, C, splits, pairs, span, EPS: tl.constexpr,
    WIDE: tl.constexpr, ACC: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * W + tl.arange(0, W)[None, :]
    s = tl.arange(0, P)[:, None]
    at, mask = parts + s * C + c, (s < splits) & (c < C)
    if WIDE:
        s = s.to(tl.int64)
    count = tl.maximum(tl.minimum(pairs - s * span, span), 0).to(ACC)
    means = tl.load(at, mask=mask, other=0.0)
    spread = tl.load(at + splits * C, mask=mask, other=0.0)
    total = _sum_rows(count)
    centre = _sum_rows(means * count) / total
    spread += 2 * count * (means - centre) * (means - centre)
    variance = _sum_rows(spread) / (2 * total)
    tl.store(mean + c, centre, mask=c < C)
    tl.store(rstd + c, 1.0 / tl.sqrt(variance + EPS), mask=c < C)


@triton.jit
def _load_channels(
    beta, weight, bias, mean, rstd, c, C, SCALED: tl.constexpr, MOVED: tl.constexpr,
    ACC: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """beta, gamma, shift, mean and one over the s.d. of a block of channels."""
    b = _load_vector(beta, c, C, True, 0.0, ACC, W)
    w = _load_vector(weight, c, C, SCALED, 1.0, ACC, W)
    shift = _load_vector(bias, c, C, MOVED, 0.0, ACC, W)
    centre = _load_vector(mean, c, C, True, 0.0, ACC, W)
    scale = _load_vector(rstd, c, C, True, 0.0, ACC, W)
    return b, w, shift, centre, scale


@triton.jit
def _write_output(
    x, beta, weight, bias, mean, rstd, y, C, pairs, half, S: tl.constexpr,
    SCALED: tl.constexpr, MOVED: tl.constexpr, RELU: tl.constexpr,
    LAST: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    c, block = _find_channels(C, W)
    r = _find_rows(block, R, WIDE, R)
    at, mask = _place(r, c, C, S, LAST), (r < pairs) & (c < C)
    b, w, shift, centre, scale = _load_channels(
        beta, weight, bias, mean, rstd, c, C, SCALED, MOVED, ACC, W
    )
    real = tl.load(x + at, mask=mask, other=0.0).to(ACC)
    knock = tl.load(x + half + at, mask=mask, other=0.0).to(ACC)
    mixed = b * real + (1 - b) * knock
    above = (mixed - centre) * scale * w + shift
    below = (knock - centre) * scale * w + shift
    if RELU:
        above = tl.where(above < 0, 0.0, above)  # keeps NaN, as torch does
        below = tl.where(below < 0, 0.0, below)
    tl.store(y + at, above.to(y.dtype.element_ty), mask=mask)
    tl.store(y + half + at, below.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _load_normal(
    x, grad, half, at, mask, b, w, shift, centre, scale, RELU: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Normalised values, their gradients behind the ReLU, and real minus knockoff."""
    real = tl.load(x + at, mask=mask, other=0.0).to(ACC)
    knock = tl.load(x + half + at, mask=mask, other=0.0).to(ACC)
    above = (b * real + (1 - b) * knock - centre) * scale
    below = (knock - centre) * scale
    g_above = tl.load(grad + at, mask=mask, other=0.0).to(ACC)
    g_below = tl.load(grad + half + at, mask=mask, other=0.0).to(ACC)
    if RELU:
        g_above = tl.where(above * w + shift > 0, g_above, 0.0)
        g_below = tl.where(below * w + shift > 0, g_below, 0.0)
    return above, below, g_above, g_below, real - knock


@triton.jit
def _collect_grads(
    x, beta, weight, bias, mean, rstd, grad, parts, C, pairs, half, span, splits,
    S: tl.constexpr, BETA: tl.constexpr, SCALED: tl.constexpr, MOVED: tl.constexpr,
    RELU: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Sums of g and g * normal; for beta of g, 1 and normal, times (real - knock)."""
    c, split = _find_channels(C, W)
    b, w, shift, centre, scale = _load_channels(
        beta, weight, bias, mean, rstd, c, C, SCALED, MOVED, ACC, W
    )
    plain = tl.full([R, W], 0, ACC)
    along = tl.full([R, W], 0, ACC)
    if BETA:
        steep = tl.full([R, W], 0, ACC)
        level = tl.full([R, W], 0, ACC)
        slant = tl.full([R, W], 0, ACC)
    first = _find_rows(split, span, WIDE, R)
    for step in range(0, span, R):
        r = first + step
        at, mask = _place(r, c, C, S, LAST), (r < pairs) & (c < C)
        above, below, g_above, g_below, gap = _load_normal(
            x, grad, half, at, mask, b, w, shift, centre, scale, RELU, ACC
        )
        plain += g_above + g_below
        along += g_above * above + g_below * below
        if BETA:
            steep += g_above * gap
            level += gap
            slant += above * gap
    at = parts + split * C + c
    tl.store(at, _sum_rows(plain), mask=c < C)
    tl.store(at + splits * C, _sum_rows(along), mask=c < C)
    if BETA:
        tl.store(at + 2 * splits * C, _sum_rows(steep), mask=c < C)
        tl.store(at + 3 * splits * C, _sum_rows(level), mask=c < C)
        tl.store(at + 4 * splits * C, _sum_rows(slant), mask=c < C)


@triton.jit
def _finish_grads(
    parts, weight, rstd, sums, C, splits, pairs, BETA: tl.constexpr,
    SCALED: tl.constexpr, ACC: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * W + tl.arange(0, W)[None, :]
    s = tl.arange(0, P)[:, None]
    at, mask, size = parts + s * C + c, (s < splits) & (c < C), splits * C
    plain = _sum_rows(tl.load(at, mask=mask, other=0.0))
    along = _sum_rows(tl.load(at + size, mask=mask, other=0.0))
    tl.store(sums + c, plain, mask=c < C)
    tl.store(sums + C + c, along, mask=c < C)
    if BETA:
        steep = _sum_rows(tl.load(at + 2 * size, mask=mask, other=0.0))
        level = _sum_rows(tl.load(at + 3 * size, mask=mask, other=0.0))
        slant = _sum_rows(tl.load(at + 4 * size, mask=mask, other=0.0))
        w = _load_vector(weight, c, C, SCALED, 1.0, ACC, W)
        scale = w * _load_vector(rstd, c, C, True, 0.0, ACC, W)
        shared = (plain * level + along * slant) / (2 * pairs)
        tl.store(sums + 2 * C + c, scale * (steep - shared), mask=c < C)


@triton.jit
def _write_grad(
    x, beta, weight, bias, mean, rstd, grad, sums, dx, C, pairs, half,
    S: tl.constexpr, SCALED: tl.constexpr, MOVED: tl.constexpr, RELU: tl.constexpr,
    LAST: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    c, block = _find_channels(C, W)
    r = _find_rows(block, R, WIDE, R)
    at, mask = _place(r, c, C, S, LAST), (r < pairs) & (c < C)
    b, w, shift, centre, scale = _load_channels(
        beta, weight, bias, mean, rstd, c, C, SCALED, MOVED, ACC, W
    )
    plain = _load_vector(sums, c, C, True, 0.0, ACC, W) / (2 * pairs)
    along = _load_vector(sums + C, c, C, True, 0.0, ACC, W) / (2 * pairs)
    above, below, g_above, g_below, _ = _load_normal(
        x, grad, half, at, mask, b, w, shift, centre, scale, RELU, ACC
    )
    above = scale * w * (g_above - plain - above * along)
    below = scale * w * (g_below - plain - below * along)
    tl.store(dx + at, (b * above).to(dx.dtype.element_ty), mask=mask)
    below += (1 - b) * above
    tl.store(dx + half + at, below.to(dx.dtype.element_ty), mask=mask)

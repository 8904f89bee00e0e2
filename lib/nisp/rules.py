"""How each operation hands importance scores back, from its outputs to its inputs.

Every rule is the transpose of the operation's absolute Jacobian bound: |W| for what has
weights, 1 for what only bounds a change (a maximum over a window, activations but the
steep ones), the true weights for averages. None of them looks at data. Scores are
float64, of the shape of the value they belong to; a first dimension of 1 stands for
"the same for each image of the traced batch".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from lib.graph import tags
from lib.graph.tags import REDUCTIONS
from lib.graph.trace import Node
from lib.kernels import abs_matmul

Shape = tuple[int, ...]

ACTIVATIONS = set(
    "relu relu_ relu6 hardtanh hardtanh_ hardswish hardswish_ hardsigmoid hardsigmoid_ "
    "sigmoid sigmoid_ silu silu_ mish mish_ gelu tanh tanh_ elu elu_ selu selu_ celu "
    "celu_ softplus leaky_relu leaky_relu_ threshold threshold_ clamp clamp_ clamp_min "
    "clamp_min_ clamp_max clamp_max_ abs neg native_dropout dropout _to_copy to clone "
    "detach alias contiguous lift_fresh".split()
)
SLOPES = {  # the largest, rounded up, where it exceeds 1
    "gelu": 1.1291, "silu": 1.0999, "mish": 1.0885, "hardswish": 1.5, "selu": 1.7581,
}  # fmt: skip
SUMS = {"add", "add_", "sub", "sub_"}
FACTORS = {"mul", "mul_", "div", "div_"}
WINDOWS = set(
    "max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d".split()
)
ADAPTIVE = set(
    "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d"
    "".split()
)
MOVES = tags.MOVES - {"index"} | {"repeat"}
CONSTANTS = {"zeros_like", "ones_like", "empty_like", "new_zeros", "new_ones"}
IN_PLACE = {n for n in ACTIVATIONS | SUMS | FACTORS if n.endswith("_")} | {
    "as_strided_"
}
ADVICE = (
    "rules exist for linear, convolution, pooling, BatchNorm, response normalisation, "
    "element-wise activations, additions, concatenations and moves; replace it by one "
    "of these, or name an `frl` in front of it"
)


@dataclass(frozen=True)
class Step:
    """One operation: its node, the module it ran in, the shapes it read and made."""

    node: Node
    module: nn.Module
    inputs: list[Shape]
    outputs: list[Shape]

    def read(self, place: int, name: str, default=None):
        """An argument of the operation by place or keyword."""
        if len(self.node.args) > place:
            return self.node.args[place]
        return self.node.kwargs.get(name, default)

    def refuse(self, why: str = "has no propagation rule") -> ValueError:
        """The error that names the operation, where it is, and what to do."""
        where = f"in '{self.node.module}'" if self.node.module else "in the forward"
        kind = type(self.module).__name__
        return ValueError(f"'{self.node.op}' {where} ({kind}) {why}; {ADVICE}")


def pull(step: Step, scores: list[Tensor | None]) -> list[Tensor]:
    """Scores of the inputs of one operation from those of its outputs.

    `scores` holds one float64 tensor per output, None where nothing reads it; the
    result one per input. Raises `ValueError` naming an operation without a rule.
    Source: Yu et al. 2018, sec. 3 (linear maps); the rest follows from its bound.
    """
    name, first = step.node.op, scores[0]
    if name in MOVES and len(step.inputs) == 1:
        return [pull_move(step, scores)]
    if name in CONSTANTS or first is None:
        return [torch.zeros(1).double().expand(1, *s[1:]) for s in step.inputs]
    if name in SUMS:
        return pull_sum(step, first)
    if name == "cat":
        return pull_cat(step, first)
    if len(step.inputs) != 1:
        raise step.refuse("joins features in a way that has no propagation rule")
    return [pull_one(step, first)]


def pull_one(step: Step, s: Tensor) -> Tensor:
    """The rules for operations with one input and one output that matters."""
    name, module = step.node.op, step.module
    if name == type(module).__name__:
        return pull_leaf(step, s)
    if name in ACTIVATIONS:
        slope = bound_slope(step)
        return s if slope == 1 else s * slope
    if is_restriding(step):
        return s
    if name in FACTORS:
        return pull_factor(step, s)
    if name in WINDOWS:
        return pull_axes(s, window_axes(step, s))
    if name in ADAPTIVE:
        return pull_axes(s, adaptive_axes(step, s))
    if name in REDUCTIONS:
        return pull_reduction(step, s)
    if name in {"prelu", "_prelu_kernel"} and isinstance(module, nn.PReLU):
        return scale_channels(s, slope_bound(module))
    raise step.refuse()


def bound_slope(step: Step) -> float:
    """Largest |slope| of an activation, 1 where it is smaller: |f(a) - f(b)| / |a - b|.

    The same for every neuron, so it decides nothing but in sums of branches.
    """
    name = step.node.op.removesuffix("_")
    if name == "leaky_relu":
        return max(1.0, abs(step.read(1, "negative_slope", 0.01)))
    if name == "elu":
        alpha, scale = step.read(1, "alpha", 1.0), step.read(2, "scale", 1.0)
        return max(1.0, abs(scale), abs(alpha * scale * step.read(3, "input_scale", 1)))
    if name == "threshold" and step.read(1, "threshold") != step.read(2, "value"):
        raise step.refuse("jumps at its threshold, which no factor bounds")
    return SLOPES.get(name, 1.0)


def is_restriding(step: Step) -> bool:
    """What global pooling does to a map of one pixel in channels-last memory."""
    shapes = {*step.inputs, *step.outputs}
    return (
        step.node.op == "as_strided_"
        and len(shapes) == 1
        and math.prod(step.inputs[0][2:]) == 1
    )


def pull_leaf(step: Step, s: Tensor) -> Tensor:
    """The rules for modules with weights, and for the two that pass scores through."""
    module = step.module
    if isinstance(module, nn.Linear):
        return abs_matmul(s, module.weight)
    if isinstance(module, _ConvNd):
        return pull_conv(step, s)
    if isinstance(module, _BatchNorm):
        return scale_channels(s, norm_scale(step))
    if isinstance(module, nn.PReLU):
        return scale_channels(s, slope_bound(module))
    if isinstance(module, (nn.LocalResponseNorm, _DropoutNd)):
        return s
    raise step.refuse()


# -- weights -----------------------------------------------------------------------


def absolute(weight: Tensor) -> Tensor:
    """|W| in float64, outside autograd."""
    return weight.detach().double().abs()


def scale_channels(s: Tensor, scale: Tensor) -> Tensor:
    """Scores [N, C, ...] times one factor per channel (or one for all)."""
    return s * scale.view([1, -1] + [1] * (s.ndim - 2))


def slope_bound(module: nn.PReLU) -> Tensor:
    """Largest slope of a PReLU per channel: a slope below 1 bounds nothing better."""
    return absolute(module.weight).clamp_min(1)


def norm_scale(step: Step) -> Tensor:
    """|gamma| / sqrt(running_var + eps) of a BatchNorm in evaluation, float64 [C]."""
    norm = step.module
    if norm.running_var is None:
        raise step.refuse(
            "keeps no running variance, so its scale depends on the batch; recalibrate "
            "it with track_running_stats=True"
        )
    sigma = (norm.running_var.detach().double() + norm.eps).sqrt()
    return sigma.reciprocal() if norm.weight is None else absolute(norm.weight) / sigma


def pull_conv(step: Step, s: Tensor) -> Tensor:
    """Transposed convolution with |W|, cut to the true input size."""
    conv = step.module
    if conv.padding_mode != "zeros":
        raise step.refuse(f"pads with padding_mode='{conv.padding_mode}', not zeros")
    sizes, before, after = step.inputs[0][2:], *padding_of(conv)
    spans = [n + b + a for n, b, a in zip(sizes, before, after, strict=True)]
    weight = absolute(conv.weight)
    rest = [
        span - ((n - 1) * stride + dilation * (k - 1) + 1)
        for span, n, stride, dilation, k in zip(
            spans, s.shape[2:], conv.stride, conv.dilation, weight.shape[2:],
            strict=True,
        )
    ]  # fmt: skip
    transpose = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    s = transpose[len(sizes) - 1](
        s, weight, stride=conv.stride, dilation=conv.dilation, groups=conv.groups,
        output_padding=rest,
    )  # fmt: skip
    for dim, (n, first) in enumerate(zip(sizes, before, strict=True), start=2):
        s = s.narrow(dim, first, n)
    return s


def padding_of(conv: _ConvNd) -> tuple[list[int], list[int]]:
    """Zeros before and after each axis; an even kernel under "same" has one more."""
    pairs = conv._reversed_padding_repeated_twice
    return list(pairs[::2][::-1]), list(pairs[1::2][::-1])


# -- pooling: one 0/1 or weight matrix per axis, [positions out, positions in] -----


def pull_axes(s: Tensor, axes: list[Tensor]) -> Tensor:
    """Apply the transpose of one small matrix along each spatial axis."""
    for dim, matrix in enumerate(axes, start=s.ndim - len(axes)):
        s = (s.movedim(dim, -1) @ matrix).movedim(-1, dim)
    return s


def window_axes(step: Step, s: Tensor) -> list[Tensor]:
    """Windows of max pooling (weights 1) and average pooling (its true weights)."""
    average = step.node.op.startswith("avg")
    count = int(step.node.op[step.node.op.index("pool") + 4])
    kernel = spread(step.read(1, "kernel_size"), count)
    stride = spread(step.read(2, "stride") or kernel, count)
    padding = spread(step.read(3, "padding", 0), count)
    dilation = spread(1 if average else step.read(4, "dilation", 1), count)
    shapes = list(zip(step.inputs[0][-count:], s.shape[-count:], strict=True))
    axes = [
        window_axis(shape, *rest).to(s.device)
        for shape, *rest in zip(shapes, kernel, stride, padding, dilation, strict=True)
    ]
    if not average:
        return axes
    divisor = step.read(6, "divisor_override")
    if divisor is not None:
        return [*axes[:-1], axes[-1] / divisor]
    padded = step.read(5, "count_include_pad", True)
    return [
        axis / window_sizes(axis, k, d, p, padded)
        for axis, k, d, p in zip(axes, kernel, stride, padding, strict=True)
    ]


def window_axis(
    shape: tuple[int, int], kernel: int, stride: int, padding: int, dilation: int
) -> Tensor:
    """Which of `shape[0]` inputs each of `shape[1]` windows covers, float64 0/1."""
    size, count = shape
    starts = torch.arange(count) * stride - padding
    taps = starts[:, None] + torch.arange(kernel) * dilation
    return (taps[:, :, None] == torch.arange(size)).any(1).double()


def window_sizes(
    axis: Tensor, kernel: int, stride: int, padding: int, padded: bool
) -> Tensor:
    """The divisors of average windows [count, 1]: those over the edge are shorter."""
    if not padded:
        return axis.sum(1, keepdim=True)
    starts = torch.arange(len(axis), device=axis.device) * stride - padding
    ends = (starts + kernel).clamp_max(axis.shape[1] + padding)
    return (ends - starts)[:, None].double()


def adaptive_axes(step: Step, s: Tensor) -> list[Tensor]:
    """Windows from floor(i * n / m) to ceil((i + 1) * n / m), as torch cuts them."""
    count = int(step.node.op[step.node.op.index("pool") + 4])
    axes = []
    for n, m in zip(step.inputs[0][-count:], s.shape[-count:], strict=True):
        i, x = torch.arange(m)[:, None], torch.arange(n)
        axis = ((x >= i * n // m) & (x < -((-(i + 1) * n) // m))).double()
        if "avg" in step.node.op:
            axis /= axis.sum(1, keepdim=True)
        axes.append(axis.to(s.device))
    return axes


def spread(value: int | Sequence[int], count: int) -> list[int]:
    """One number per axis."""
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


# -- sums, factors, moves ----------------------------------------------------------


def pull_sum(step: Step, s: Tensor) -> list[Tensor]:
    """Both operands get the score; a broadcast one gets the sum over its copies."""
    alpha = abs(step.node.kwargs.get("alpha", 1))
    if alpha != 1 and len(step.inputs) == 1 and step.read(1, "other") is None:
        raise step.refuse("scales a feature or a constant, and which cannot be told")
    pulled = []
    for place, shape in enumerate(step.inputs):
        part = s
        if shape != step.outputs[0]:
            part = s.expand(step.outputs[0]).sum_to_size(shape)
        pulled.append(part * alpha if place and alpha != 1 else part)
    return pulled


def pull_factor(step: Step, s: Tensor) -> Tensor:
    """A product with a plain number; a learned or computed factor has no rule."""
    factor = step.read(1, "other")
    if not isinstance(factor, (int, float)) or step.inputs[0] != step.outputs[0]:
        raise step.refuse("multiplies with a tensor, which has no propagation rule")
    factor = abs(float(factor))
    return s / factor if step.node.op.startswith("div") else s * factor


def pull_reduction(step: Step, s: Tensor) -> Tensor:
    """Mean, sum or maximum over positions: every position gets its weight's share."""
    shape, dims = step.inputs[0], step.read(1, "dim")
    dims = [dims] if isinstance(dims, int) else dims
    dims = sorted({d % len(shape) for d in dims or range(len(shape))})
    if 0 in dims:
        raise step.refuse("runs over the batch, which has no propagation rule")
    if s.ndim < len(shape):
        for d in dims:
            s = s.unsqueeze(d)
    if step.node.op == "mean":
        s = s / math.prod(shape[d] for d in dims)
    return s.expand(-1, *shape[1:])


def pull_cat(step: Step, s: Tensor) -> list[Tensor]:
    """Each operand gets its own slice of the scores."""
    dim = step.read(1, "dim", 0) % s.ndim
    sizes = [shape[dim] for shape in step.inputs]
    s = s.expand(step.outputs[0]) if dim == 0 else s
    if sum(sizes) != s.shape[dim]:
        raise step.refuse("joins features with a constant; use torch.nn.functional.pad")
    return list(s.split(sizes, dim))


def pull_move(step: Step, scores: list[Tensor | None]) -> Tensor:
    """Scores go back to where the numbers came from; padding takes its own along.

    The operation itself moves a tensor of positions, which says where that is.
    """
    shape = step.inputs[0]
    device = next(s.device for s in scores if s is not None)
    places = torch.arange(math.prod(shape), device=device).view(shape)
    moved = run_move(step, places)
    moved = list(moved) if isinstance(moved, (list, tuple)) else [moved]
    total = torch.zeros(places.numel() + 1, dtype=torch.float64, device=device)
    for s, source in zip(scores, moved, strict=True):
        if s is not None:  # the last place takes what belongs to padding
            index = torch.where(source < 0, places.numel(), source).flatten()
            total.index_add_(0, index, s.expand(source.shape).flatten())
    return total[:-1].view(shape)


def run_move(step: Step, places: Tensor):
    """The traced operation on another tensor of the same shape."""
    name, rest = step.node.op, list(step.node.args[1:])
    if name == "constant_pad_nd":
        return F.pad(places, rest[0], value=-1)
    if name == "index_select":
        return places.index_select(rest[0], find_index(step, rest[0]).to(places.device))
    if name in {"_unsafe_view", "_reshape_alias", "view"}:
        return places.reshape(rest[0])
    return getattr(torch.ops.aten, name)(places, *rest, **step.node.kwargs)


def find_index(step: Step, dim: int) -> Tensor:
    """The index of an index_select: the buffer of its module with that many entries."""
    size = step.outputs[0][dim]
    found = [
        buffer
        for buffer in step.module.buffers(recurse=False)
        if not buffer.is_floating_point() and tuple(buffer.shape) == (size,)
    ]
    if not found or any(not torch.equal(found[0], other) for other in found):
        raise step.refuse(
            "picks by an index that is not the one integer buffer of that size in its "
            "module; keep the index there"
        )
    return found[0]

"""The selection layer in plain torch: one autograd step with few passes over memory.

Written out because with library calls a step of the selection takes 13 % longer on a
CPU (`bench_selection.py`): a factor per channel broadcasts over the 16 to 64 channels
of a channels_last tensor in an inner loop that is too short to vectorise, and autograd
of `lerp` makes passes of its own.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_norm_backward = torch.ops.aten.native_batch_norm_backward
_relu_backward = torch.ops.aten.threshold_backward


class MixNormRelu(torch.autograd.Function):
    """See `lib.kernels.mix_norm_relu`; beta is rounded to the dtype of x."""

    @staticmethod
    def forward(ctx, x, beta, weight, bias, eps: float, relu: bool) -> Tensor:
        """Mix into a fresh tensor, normalise it, rectify in place."""
        x = _settle(x)
        real, knock = x.chunk(2)
        share = beta.to(x.dtype)
        mixed, delta = torch.empty_like(x), real - knock
        mixed_real, mixed_knock = mixed.chunk(2)
        mixed_knock.copy_(knock)
        torch.addcmul(
            _rows(knock), _rows(delta), _spread(share, x), out=_rows(mixed_real)
        )
        y, mean, rstd = torch.native_batch_norm(
            mixed, weight, bias, None, None, True, 0.0, eps
        )
        y = y.relu_() if relu else y  # in place: of y only the sign is needed again
        ctx.save_for_backward(
            mixed, delta, share, weight, mean, rstd, y if relu else None
        )
        ctx.eps, ctx.beta_dtype = eps, beta.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        """d beta = sum d mixed (real - knock); the rest is shared out by beta."""
        mixed, delta, share, weight, mean, rstd, y = ctx.saved_tensors
        grad = grad if y is None else _relu_backward(grad, y, 0)
        grad, d_weight, d_bias = _norm_backward(
            grad, mixed, weight, None, None, mean, rstd, True, ctx.eps,
            [True, *ctx.needs_input_grad[2:4]],
        )  # fmt: skip
        # In place, as nobody else holds this gradient: the knockoffs' half collects
        # what mixed images pass on, (1 - beta) g = g - beta g, without a third copy.
        grad = _settle(grad)
        real, knock = grad.chunk(2)
        others = [i for i in range(grad.ndim) if i != 1]
        d_beta = (real * delta).sum(others, dtype=mean.dtype)
        knock.add_(real)
        _rows(real).mul_(_spread(share, grad))
        knock.sub_(real)
        return grad, d_beta.to(ctx.beta_dtype), d_weight, d_bias, None, None


def _is_channels_last(x: Tensor) -> bool:
    """Channels lie next to one another, and a view by rows is possible."""
    return x.ndim == 4 and x.permute(0, 2, 3, 1).is_contiguous()


def _settle(x: Tensor) -> Tensor:
    """x where it can be viewed by rows, else a contiguous copy."""
    return x if _is_channels_last(x) else x.contiguous()


def _rows(x: Tensor) -> Tensor:
    """A view to multiply by `_spread`: rows of pixels, or a channel's positions."""
    if _is_channels_last(x):
        count, channels, height, width = x.shape
        return x.permute(0, 2, 3, 1).view(count * height, width * channels)
    return x.view(*x.shape[:2], -1)


def _spread(vector: Tensor, x: Tensor) -> Tensor:
    """[C] as a row of pixels, or as a column beside positions; see `_rows`."""
    if _is_channels_last(x):
        return vector.repeat(x.shape[3])
    return vector.view(-1, 1)

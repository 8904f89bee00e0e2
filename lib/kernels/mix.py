"""SCOP's selection layer: mix features with their knockoffs, normalise, rectify.

In plain torch it is one autograd step with few passes over memory. With library calls a
step of the selection takes 13 % longer on a CPU (`bench_selection.py`): a factor per
channel broadcasts over the 16 to 64 channels of a channels_last tensor in an inner loop
that is too short to vectorise, and autograd of `lerp` makes passes of its own.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lib.kernels.dispatch import choose_backend


def mix_norm_relu(
    x: Tensor,
    beta: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    relu: bool = True,
    backend: str | None = None,
) -> Tensor:
    """ReLU(BatchNorm([beta * real + (1 - beta) * knockoff, knockoff])).

    x [2B, C, *positions], floating point: features of B real images, then those of
    their knockoffs. beta [C]: share of the real ones. weight, bias [C] or None.
    BatchNorm takes mean and biased variance over all 2B images and their positions, in
    float32 (float64 for float64), and keeps no running statistics. Returns shape, dtype
    and memory format of x. backend: "triton", "torch", or None for the fitting one.
    Raises `ValueError` for an odd or empty batch and for vectors that are not [C].
    Source: Tang et al. 2020 (SCOP), section 3.2; mixing stands before BatchNorm.
    """
    _check_batch(x)
    for name, vector in {"beta": beta, "weight": weight, "bias": bias}.items():
        if vector is not None:
            _check_vector(name, vector, x)
    if choose_backend(x, backend) == "torch":
        folded = x if x.ndim in {2, 4} else x.flatten(2).unsqueeze(2)
        y = MixNormRelu.apply(folded, beta, weight, bias, eps, relu)
        return y.view(x.shape)
    from lib.kernels import mix_triton

    return mix_triton.MixNormRelu.apply(x, beta, weight, bias, eps, relu)


def _check_batch(x: Tensor) -> None:
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(
            f"x must be floating point [2B, C, ...], got {x.dtype} {tuple(x.shape)}"
        )
    if x.shape[0] % 2:
        raise ValueError(f"half the batch must be knockoffs, got {x.shape[0]} images")
    if x.numel() == 0:
        raise ValueError(f"x must have 2 or more values a channel, got {x.shape}")


def _check_vector(name: str, vector: Tensor, x: Tensor) -> None:
    if vector.shape != x.shape[1:2]:
        raise ValueError(f"{name} must be [{x.shape[1]}], got {list(vector.shape)}")
    if vector.device != x.device:
        raise ValueError(f"x is on {x.device}, but {name} on {vector.device}")


class MixNormRelu(torch.autograd.Function):
    """Of x [2B, C] or [2B, C, H, W]; beta is rounded to the dtype of x."""

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
        kept = mixed, delta, share, weight, mean, rstd, y if relu else None
        ctx.save_for_backward(*kept)
        ctx.eps, ctx.beta_dtype = eps, beta.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        """d beta = sum d mixed (real - knock); the rest is shared out by beta."""
        mixed, delta, share, weight, mean, rstd, y = ctx.saved_tensors
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        grad, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
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
    return vector.repeat(x.shape[3]) if _is_channels_last(x) else vector.view(-1, 1)

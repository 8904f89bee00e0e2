"""SCOP's selection layer: mix features with their knockoffs, normalise, rectify."""

from torch import Tensor

from lib.kernels import mix_torch
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
        _check_vector(name, vector, x)
    if choose_backend(x, backend) == "torch":
        folded = x if x.ndim in {2, 4} else x.flatten(2).unsqueeze(2)
        y = mix_torch.MixNormRelu.apply(folded, beta, weight, bias, eps, relu)
        return y.view(x.shape)
    from lib.kernels.mix_triton import MixNormRelu

    return MixNormRelu.apply(x, beta, weight, bias, eps, relu)


def _check_batch(x: Tensor) -> None:
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(
            f"x must be floating point [2B, C, ...], got {x.dtype} {tuple(x.shape)}"
        )
    if x.shape[0] % 2:
        raise ValueError(f"half the batch must be knockoffs, got {x.shape[0]} images")
    if x.numel() == 0:
        raise ValueError(f"x must have 2 or more values a channel, got {x.shape}")


def _check_vector(name: str, vector: Tensor | None, x: Tensor) -> None:
    if vector is None and name != "beta":
        return
    if vector.shape != x.shape[1:2]:
        raise ValueError(f"{name} must be [{x.shape[1]}], got {list(vector.shape)}")
    if vector.device != x.device:
        raise ValueError(f"x is on {x.device}, but {name} on {vector.device}")

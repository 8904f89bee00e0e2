"""Scores times absolute weights, without a second copy of the weights."""

import math

from torch import Tensor

from lib.kernels.dispatch import choose_backend

TILE = 2**17  # weights held in float64 at a time: 1 MiB, which stays in the cache


def abs_matmul(s: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """s |weight|: what a linear layer hands back to its inputs.

    s [..., O] and weight [O, I] (as in `torch.nn.Linear`), each of any floating type.
    Returns [..., I] in the dtype of s, outside autograd. Every weight is read once, in
    its own type, and summed in float64 in a fixed order; neither |weight| nor a float64
    copy of it is made as a whole. backend: "triton", "torch", or None for the fitting
    one. Raises `ValueError` for shapes that do not match, types that are not floating
    point and tensors on different devices.
    Source: Yu et al. 2018 (NISP), section 3.
    """
    _check_operands(s, weight)
    rows = s.detach().reshape(math.prod(s.shape[:-1]), len(weight)).double()
    weight = weight.detach()
    out = rows.new_zeros(len(rows), weight.shape[1])
    implementation = choose_backend(s, backend)
    if rows.numel() and out.numel():
        if implementation == "torch":
            _add_tiles(out, rows, weight)
        else:
            from lib.kernels.absolute_triton import multiply

            out = multiply(rows, weight)
    return out.to(s.dtype).view(*s.shape[:-1], weight.shape[1])


def _check_operands(s: Tensor, weight: Tensor) -> None:
    if weight.ndim != 2 or s.ndim == 0 or s.shape[-1] != len(weight):
        raise ValueError(
            "expected s [..., O] and weight [O, I], got "
            f"{list(s.shape)} and {list(weight.shape)}"
        )
    if not (s.is_floating_point() and weight.is_floating_point()):
        raise ValueError(
            f"s and weight must be floating point, got {s.dtype} and {weight.dtype}"
        )
    if s.device != weight.device:
        raise ValueError(f"s is on {s.device}, but weight on {weight.device}")


def _add_tiles(out: Tensor, rows: Tensor, weight: Tensor) -> None:
    """out [M, I] += rows [M, O] |weight [O, I]|, some rows of the weights at a time."""
    step = max(1, TILE // weight.shape[1])
    scratch = rows.new_empty(min(step, len(weight)), weight.shape[1])
    for part, block in zip(rows.split(step, 1), weight.split(step), strict=True):
        tile = scratch[: len(block)].copy_(block).abs_()
        out.addmm_(part, tile)

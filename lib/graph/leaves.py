"""Leaf modules: those that a rule knows by their type, and what shape they make."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd

LAYERS = (_ConvNd, nn.Linear)
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.PReLU)
FORWARDS = {k.forward for k in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, *NORMS)}
LEAVES = (*LAYERS, _BatchNorm, nn.LocalResponseNorm, nn.PReLU, _DropoutNd)


def is_leaf(module: nn.Module) -> bool:
    """Does it run as torch defines it, so that a rule knows it by its type?"""
    if not isinstance(module, LEAVES) or isinstance(module, _ConvTransposeNd):
        return False
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return False  # one slope for all channels is an element-wise operation
    if isinstance(module, (nn.LocalResponseNorm, _DropoutNd)):
        return True
    if type(module).forward not in FORWARDS or "forward" in vars(module):
        return False  # it runs in a way of its own
    return isinstance(module, _BatchNorm) or "weight" in module._parameters


def guess_output(module: nn.Module, x: Tensor) -> Tensor | None:
    """What the leaf makes of `x`, or None where its own forward had better say.

    Only what is plain is guessed. In doubt (a layout, a type, a size that does not
    fit) torch's meta kernel decides, and words the error.
    """
    if not x.is_meta:
        return None
    with torch._C._DisableTorchDispatch():  # nobody need see how the shape is made
        if isinstance(module, _BatchNorm):
            return x.detach() if _norm_fits(module, x) else None
        if not isinstance(module, LAYERS) or not _is_plain(module, x):
            return None
        shape = (
            _shape_of_linear(module, x)
            if isinstance(module, nn.Linear)
            else _shape_of_convolution(module, x)
        )
        if shape is None:
            return None
        return torch.empty(shape, dtype=x.dtype, device="meta")


def _is_plain(module: _ConvNd | nn.Linear, x: Tensor) -> bool:
    weight, bias = module.weight, module.bias
    whole = x.is_contiguous() and weight.is_contiguous() and x.dtype == weight.dtype
    return whole and (bias is None or bias.shape == weight.shape[:1])


def _norm_fits(module: _BatchNorm, x: Tensor) -> bool:
    module._check_input_dim(x)  # type: ignore[no-untyped-call]
    enough, width = not module.training or x.numel() > x.shape[1], x.shape[1:2]
    rows = (*module._parameters.values(), *module._buffers.values())
    return enough and all(r is None or r.ndim == 0 or r.shape == width for r in rows)


def _shape_of_linear(module: nn.Linear, x: Tensor) -> tuple[int, ...] | None:
    out, inputs = module.weight.shape
    return (*x.shape[:-1], out) if x.shape[-1] == inputs else None


def _shape_of_convolution(module: _ConvNd, x: Tensor) -> tuple[int, ...] | None:
    out, inputs, *kernel = module.weight.shape
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None
    if x.ndim != len(kernel) + 2 or x.shape[1] != inputs * module.groups:
        return None
    steps = zip(
        x.shape[2:], kernel, module.stride, module.padding, module.dilation, strict=True
    )
    sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in steps]
    if out % module.groups or min(sizes) < 1:
        return None
    return (x.shape[0], out, *sizes)

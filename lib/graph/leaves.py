"""Leaf modules: those that a rule knows by their type, and what shape they make."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd

LAYERS = (_ConvNd, nn.Linear)
LEAVES = (*LAYERS, _BatchNorm, nn.PReLU, _DropoutNd)

# What a subclass may have of its own: nothing of it decides what the module computes.
HARMLESS = set(
    "extra_repr reset_parameters reset_running_stats _get_name train eval "
    "T_destination dump_patches call_super_init".split()
)
SIZES = set(  # numbers that follow from the tensors of a leaf, or do not matter
    "in_channels out_channels in_features out_features num_features num_parameters "
    "groups".split()
)


def is_leaf(module: nn.Module) -> bool:
    """Does it run as torch defines it, so that a rule knows it by its type?

    Nothing of it may be overridden, by its class or in the instance, and its tensors
    must be its own: not computed by a parametrization or a hook.
    """
    if not isinstance(module, LEAVES):
        return False
    if isinstance(module, _ConvTransposeNd) and module.groups > 1:
        return False  # a group's filters lie in blocks of the weight's first axis
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return False  # one slope for all channels is an element-wise operation
    return not is_overridden(module)


def is_overridden(module: nn.Module) -> bool:
    """Has it, or its class, something of its own that the class of torch's runs?"""
    kind, own = type(module), vars(module)
    base = next(k for k in kind.__mro__ if k.__module__.startswith("torch.nn.modules."))
    tensors = module._parameters.keys() | module._buffers.keys()
    if any(hasattr(module, n) and n not in tensors for n in ("weight", "bias")):
        return True  # a parametrization or a hook computes it
    names = _names_of(base)
    if not own.keys().isdisjoint(tensors) or not own.keys().isdisjoint(names):
        return True
    # What a forward of torch's calls changes between versions, so that a list of what
    # matters would grow old: every name that torch has counts, but for the harmless.
    inherited = kind.__mro__[: kind.__mro__.index(base)]
    return any(
        name not in HARMLESS and (name in names or name in own or name in tensors)
        for each in inherited
        for name in vars(each)
        if not name.startswith("__") or name in {"__call__", "__getattr__"}
    )


@cache
def _names_of(base: type) -> frozenset[str]:
    """What a class of torch's has."""
    return frozenset(dir(base))


def names_of_numbers(module: nn.Module) -> list[str]:
    """What a leaf computes with beside its tensors, such as its stride or its eps."""
    listed = (vars(kind).get("__constants__", ()) for kind in type(module).__mro__)
    return sorted({name for names in listed for name in names if name not in SIZES})


def filters_of(module: _ConvNd | nn.Linear, weight: Tensor | None = None) -> Tensor:
    """The weight with the channels that are made first: [C_out, C_in per group, ...].

    A view of the parameter; a copy for a transposed convolution in groups. `weight`
    stands for a tensor of the same shape, such as its gradient.
    """
    weight = module.weight if weight is None else weight
    if not isinstance(module, _ConvTransposeNd):
        return weight
    parts = [part.transpose(0, 1) for part in weight.chunk(module.groups)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


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
        shape = _guess_shape(module, x)
        if shape is None:
            return None
        return torch.empty(shape, dtype=x.dtype, device="meta")


def _norm_fits(module: _BatchNorm, x: Tensor) -> bool:
    module._check_input_dim(x)  # type: ignore[no-untyped-call]
    enough, width = not module.training or x.numel() > x.shape[1], x.shape[1:2]
    rows = (*module._parameters.values(), *module._buffers.values())
    return enough and all(r is None or r.ndim == 0 or r.shape == width for r in rows)


def _guess_shape(module: nn.Module, x: Tensor) -> tuple[int, ...] | None:
    """The shape behind a linear layer, or a convolution with zeros around the image."""
    if not isinstance(module, LAYERS) or isinstance(module, _ConvTransposeNd):
        return None
    weight, bias = module.weight, module.bias
    whole = x.is_contiguous() and weight.is_contiguous() and x.dtype == weight.dtype
    if not whole or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    out, inputs, *kernel = weight.shape
    if isinstance(module, nn.Linear):
        return (*x.shape[:-1], out) if x.shape[-1] == inputs else None
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

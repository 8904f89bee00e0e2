"""Handling a model without a trace: on the meta device, modes put back, digests."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lib.labels import SHAPE_KEEPING


def meta_state(model: nn.Module):
    """Parameters and buffers as meta tensors; integer buffers keep their values.

    One entry for each attribute of each module, and one meta tensor for each tensor:
    for `functional_call(..., tie_weights=False)`, which would otherwise put back a
    module that has two names wrongly.
    """
    made: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            if id(tensor) not in made and tensor.is_floating_point():
                made[id(tensor)] = torch.empty_like(tensor, device="meta")
            elif id(tensor) not in made:
                made[id(tensor)] = tensor.detach().clone()
            yield f"{path}.{key}" if path else key, made[id(tensor)]


def dtype_of(model: nn.Module) -> torch.dtype:
    """The floating type of the model's parameters."""
    for tensor in model.parameters():
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.get_default_dtype()


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put every module back into its own train/eval mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def digest_tensors(text: str, *tensors: Tensor) -> str:
    """A short hash of a text and of tensors, their shapes included."""
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def to_meta(tree):
    """The same nest of arguments with every tensor on the meta device."""
    return tree_map_only(Tensor, lambda t: t.to("meta"), tree)


def tensors_in(items) -> list[Tensor]:
    """The tensors among `items` and in the lists among them (quicker than a pytree)."""
    found = []
    for item in items:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            found.extend(tensors_in(item))
    return found


def run_operation(name: str, func, args: tuple, kwargs: dict, tensors: list[Tensor]):
    """The operation on the meta device, or its shape alone where that is plain.

    Real tensors (constants, indices) are moved there; meta kernels of element-wise
    operations are slow Python, so equal shapes skip them; a view of the input stands in
    for the output.
    """
    if any(t.device.type != "meta" for t in tensors):
        if all(t.device.type != "meta" for t in tensors):
            return func(*args, **kwargs)
        args, kwargs = to_meta(args), to_meta(kwargs)
    elif name in SHAPE_KEEPING:
        x = tensors[0]
        if all(t.shape == x.shape and t.dtype == x.dtype for t in tensors):
            return x if name.endswith("_") else x.detach()
    return func(*args, **kwargs)


def run_leaf(name: str, func, args: tuple, kwargs: dict):
    """Inside a leaf module only the output's shape matters; a norm's is its input's."""
    if "batch_norm" in name:
        made = [args[0].detach() for _ in func._schema.returns]
        return tuple(made) if len(made) > 1 else made[0]
    return func(*args, **kwargs)

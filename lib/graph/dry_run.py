"""Running a model on shapes alone: its state and its operations on the meta device."""

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lib.graph.tags import SHAPE_KEEPING


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

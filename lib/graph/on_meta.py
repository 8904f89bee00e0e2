"""Tensors without contents: stand-ins on the meta device, operations on them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from lib.graph.holders import contents_kept
from lib.graph.tags import SHAPE_KEEPING

Function = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
SCRIPT = torch.jit.ScriptModule  # keeps its tensors where Python cannot swap them
META = torch.device("meta")


@contextmanager
def meta_tensors(modules: dict[str, nn.Module]) -> Iterator[dict[int, str]]:
    """All tensors of a model's modules on the meta device while inside; names by id.

    Buffers of integers keep their values, on the CPU: a network moves channels by them.
    Whatever a pass does to the attributes of a module, modes and cached constants
    among them, is taken back afterwards.
    """
    own = {n: m for n, m in modules.items() if not isinstance(m, SCRIPT)}
    made: dict[int, Tensor] = {}
    names: dict[int, str] = {}
    with contents_kept(list(own.values())):
        for path, module in own.items():
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for store in stores:
                for key, tensor in store.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        made[id(tensor)] = _stand_in(tensor)
                    store[key] = made[id(tensor)]
                    name = f"{path}.{key}" if path else key
                    names.setdefault(id(store[key]), name)
        yield names


def own_tensors(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a module itself; a script's cannot be swapped."""
    if isinstance(module, SCRIPT):
        return []
    found = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in found if tensor is not None]


class KeepNumbers(TorchFunctionMode):
    """Constants that a forward makes from Python's numbers keep them, on the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        """`torch.tensor(3, device="meta")` would be a shape without its 3."""
        kwargs = kwargs or {}
        if func is Tensor.new_tensor:
            func, kwargs = torch.tensor, {"dtype": args[0].dtype, **kwargs}
            args = args[1:]
        if func in MAKERS:
            kwargs = {k: v for k, v in kwargs.items() if k != "device"}
        return func(*args, **kwargs)


MAKERS = {torch.tensor, torch.as_tensor, torch.asarray}


def _stand_in(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() or tensor.is_meta:
        return torch.empty_like(tensor, device=META, requires_grad=False)
    return tensor.detach().to("cpu", copy=True)


def run_operation(name: str, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """The operation on the meta device, or its shape alone where that is plain.

    Real tensors (constants, indices) are moved there, or, where they are by themselves
    and on several devices, to the CPU. Meta kernels of element-wise operations are slow
    Python, so equal shapes skip them: a view of the input stands in for the output.
    """
    tensors = tensors_in((*args, *kwargs.values()))
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        place = "meta" if any(t.is_meta for t in tensors) else "cpu"
        args, kwargs = move_all(args, place), move_all(kwargs, place)
    elif name in SHAPE_KEEPING and tensors[0].is_meta:
        x = tensors[0]
        if all(t.shape == x.shape and t.dtype == x.dtype for t in tensors):
            return x if name.endswith("_") else x.detach()
    return func(*args, **kwargs)


def move_all(tree: Any, device: str) -> Any:
    """The same nest of arguments with every tensor on `device`."""
    return tree_map_only(Tensor, lambda t: t.to(device), tree)


def tensors_in(items: Iterable[Any]) -> list[Tensor]:
    """The tensors among `items` and in the lists among them (quicker than a pytree)."""
    found: list[Tensor] = []
    for item in items:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            found.extend(tensors_in(item))
    return found


def without_tensors(args: Iterable[Any]) -> list[Any]:
    """The same nest of arguments, lists all through, with None for every tensor."""
    kept: list[Any] = []
    for item in args:
        nested = isinstance(item, (list, tuple))
        plain = None if isinstance(item, Tensor) else item
        kept.append(without_tensors(item) if nested else plain)
    return kept

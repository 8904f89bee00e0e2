"""Tensors without contents in the place of a model's, and what holds tensors."""

import operator
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

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
    made: dict[int, Tensor] = {}  # a shared tensor has one stand-in: it stays shared
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


def run_operation(
    name: str, func: Function, args: Args, kwargs: Kwargs, tensors: list[Tensor]
) -> Any:
    """The operation on the meta device, or its shape alone where that is plain.

    `tensors` are those among the arguments. Real ones (constants, indices) are moved
    there, or, where they are by themselves and on several devices, to the CPU. Meta
    kernels of element-wise operations are slow Python, so equal shapes skip them: a
    view of the input stands in for the output.
    """
    # No kernel takes tensors of two devices: shapes alone go to meta, but an operation
    # on constants must keep their numbers, by which channels may be picked later.
    if len({t.device for t in tensors}) > 1:
        place = "meta" if any(t.is_meta for t in tensors) else "cpu"
        args, kwargs = tree_map_only(Tensor, lambda t: t.to(place), (args, kwargs))
    elif name in SHAPE_KEEPING and tensors[0].is_meta:
        x = tensors[0]
        if all(t.shape == x.shape and t.dtype == x.dtype for t in tensors):
            return x if name.endswith("_") else x.detach()
    return func(*args, **kwargs)


def tensors_in(items: Iterable[Any]) -> list[Tensor]:
    """The tensors among `items` and in the lists among them (quicker than a pytree)."""
    found: list[Tensor] = []
    for item in items:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            found.extend(tensors_in(item))
    return found


# -- things that hold tensors ----------------------------------------------------------


PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, range, Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
OPAQUE = (nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType)
EMPTY = object()
INTERNAL = set(vars(nn.Module()))
HOOKS = [name for name in INTERNAL if name.endswith("hooks")]


def find_tensors(output: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """All tensors in what a forward returned, in containers and objects of any kind.

    Raises `ValueError` for what cannot be looked into (a generator, a function).
    """
    seen = set() if seen is None else seen
    if isinstance(output, Tensor):
        yield output
        return
    if isinstance(output, PLAIN) or id(output) in seen:
        return
    seen.add(id(output))
    for item in _list_items(output):
        yield from find_tensors(item, seen)


def _list_items(output: Any) -> list[Any]:
    slots = [
        getattr(output, name, None)
        for kind in type(output).__mro__
        for name in _slots_of(kind)
    ]
    held = [*getattr(output, "__dict__", {}).values(), *slots]
    if isinstance(output, Mapping):
        return [*output.keys(), *output.values(), *held]
    if isinstance(output, (tuple, list, set, frozenset, deque)):
        return [*output, *held]
    if isinstance(output, OPAQUE) or not (hasattr(output, "__dict__") or slots):
        raise ValueError(
            f"the forward returns a {type(output).__name__}, which cannot be searched "
            "for outputs; return tensors, or a tuple, list, dict or object of them"
        )
    return held


def _slots_of(kind: type) -> list[str]:
    names = vars(kind).get("__slots__", ())
    names = [names] if isinstance(names, str) else names
    return [n for n in names if n not in {"__dict__", "__weakref__"}]


@contextmanager
def contents_kept(modules: list[nn.Module]) -> Iterator[None]:
    """Take back whatever is put into attributes of modules while inside.

    Also into lists, dictionaries and objects that these hold, at any depth, and into
    those that the hooks of a module see.
    """
    # A copy of the model would not do in its place: hooks and closures would go on
    # writing into the objects of the original, and not every model can be copied.
    kept: list[tuple[Any, Any]] = []
    seen: set[int] = set()
    for module in modules:
        state = module.__dict__
        for held in (state, module._parameters, module._buffers, module._modules):
            kept.append((held, dict(held)))
        hooked = [name for name in HOOKS if state.get(name)]
        for name in (*(state.keys() - INTERNAL), *hooked):
            _keep(state[name], kept, seen)
    try:
        yield
    finally:
        for holder, content in kept:
            _put_back(holder, content)


QUICK = {int, float, bool, str, type(None)}


def _keep(
    value: Any, kept: list[tuple[Any, Any]], seen: set[int], depth: int = 8
) -> None:
    """Copy what `value` holds, if it can change, and what that holds in its turn."""
    if value.__class__ in QUICK or id(value) in seen or not depth:
        return
    if isinstance(value, (*PLAIN, Tensor, nn.Module, type, types.ModuleType)):
        return
    seen.add(id(value))
    if isinstance(value, types.MethodType):
        return _keep(value.__self__, kept, seen, depth - 1)
    inner: list[Any] = []
    if isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            content = getattr(cell, "cell_contents", EMPTY)
            kept.append((cell, content))
            inner.append(content)
    elif isinstance(value, (dict, list, set, deque)):
        kept.append((value, value.copy()))
        inner.extend(value.values() if isinstance(value, dict) else value)
    elif isinstance(value, (tuple, frozenset)):
        inner.extend(value)
    state = getattr(value, "__dict__", None)
    if isinstance(state, dict):
        kept.append((state, dict(state)))
        inner.extend(state.values())
    for item in inner:
        _keep(item, kept, seen, depth - 1)


def _put_back(holder: Any, content: Any) -> None:
    if isinstance(holder, types.CellType):
        if content is not EMPTY:
            holder.cell_contents = content
    # Untouched holders are left alone: one of a class of its own may not be cleared.
    elif not _are_same(holder, content):
        holder.clear()
        if isinstance(holder, (list, deque)):
            holder.extend(content)
        else:
            holder.update(content)


def _are_same(holder: Any, content: Any) -> bool:
    """Do they hold the very same things, in the same order?"""
    if len(holder) != len(content) or not all(map(operator.is_, holder, content)):
        return False
    if isinstance(holder, dict):
        return all(map(operator.is_, holder.values(), content.values()))
    return True

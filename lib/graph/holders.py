"""Things that hold tensors: what a forward returns, what a pass leaves in a module."""

import operator
import types
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, range, Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
OPAQUE = (nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType)
EMPTY = object()
INTERNAL = set(vars(nn.Module()))


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
    kept: list[tuple[Any, Any]] = []
    seen: set[int] = set()
    for module in modules:
        state = module.__dict__
        kept.append((state, dict(state)))
        for name in ("_parameters", "_buffers", "_modules"):
            kept.append((state[name], dict(state[name])))
        for name, value in state.items():
            if name not in INTERNAL or (value and name.endswith("hooks")):
                _keep(value, kept, seen)
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
    elif len(holder) != len(content) or not _are_same(holder, content):
        holder.clear()
        if isinstance(holder, (list, deque)):
            holder.extend(content)
        else:
            holder.update(content)


def _are_same(holder: Any, content: Any) -> bool:
    if isinstance(holder, dict):
        return all(holder.get(key, EMPTY) is value for key, value in content.items())
    return all(map(operator.is_, holder, content))

"""A deep copy of a model in which some tensors are replaced on the way."""

import copy
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

PLAIN = {int, float, bool, str, type(None)}


def copy_model(model: nn.Module, instead: dict[int, Tensor] | None = None) -> nn.Module:
    """`copy.deepcopy(model)` with the tensors `instead`, by the id of the original.

    Most of what `deepcopy` does for a network is to copy the dozen empty dictionaries
    of hooks and the numbers in each module one by one. Modules that bring no copying of
    their own are therefore copied here; everything else is left to `deepcopy`.
    """
    memo: dict[int, Any] = {**(instead or {})}
    twins: list[tuple[Any, nn.Module]] = []
    for module in model.modules():
        if _copies_plainly(type(module)):
            twin = memo[id(module)] = object.__new__(type(module))
            twins.append((module, twin))
    # All twins are known before any is filled: modules may refer to one another.
    for module, twin in twins:
        state: dict[str, Any] = module.__getstate__()
        for key, value in state.items():
            twin.__dict__[key] = _copy_value(value, memo)
    copied: nn.Module = copy.deepcopy(model, memo)
    return copied


def _copies_plainly(kind: type) -> bool:
    """Would `deepcopy` make an empty instance and fill its `__dict__`?"""
    if hasattr(kind, "__deepcopy__"):
        return False
    state = getattr(kind, "__setstate__", None)  # torch's fill in what old files lack
    return getattr(state, "__module__", "").startswith("torch.nn.") and all(
        getattr(kind, name, None) is getattr(nn.Module, name, None)
        for name in ("__reduce__", "__reduce_ex__", "__getstate__", "__new__")
    )


def _copy_value(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in PLAIN or (kind is tuple and PLAIN.issuperset(map(type, value))):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind in {OrderedDict, set} and not value:
        return kind()
    if kind is dict:  # of parameters, buffers, children
        copied = memo[id(value)] = {}
        for key, item in value.items():
            copied[key] = _copy_value(item, memo)
        return copied
    if kind is Tensor and value.ndim == 0 and not value.requires_grad:
        memo[id(value)] = value.clone()  # a counter, e.g. of batches
    return copy.deepcopy(value, memo)

"""Watching a model without changing it: precision, modes put back, what layers make."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


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


@contextmanager
def recorded(
    model: nn.Module,
    names: Iterable[str],
    *,
    inputs: bool = False,
    keep: Callable[[str, Tensor], Tensor] | None = None,
) -> Iterator[dict[str, list[Tensor]]]:
    """What the modules named make (or read, with `inputs`) while inside, call by call.

    `keep(name, tensor)` says what is kept of each, for what is large or written over
    later. The lists grow with every call; empty them between batches. Only first
    positional inputs and plain tensors are recorded. The hooks are gone afterwards.
    """
    modules = dict(model.named_modules())
    calls: dict[str, list[Tensor]] = {name: [] for name in names}

    def make_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen = args[0] if inputs else output
            calls[name].append(keep(name, seen) if keep else seen)

        return hook

    handles = [modules[n].register_forward_hook(make_hook(n)) for n in calls]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()

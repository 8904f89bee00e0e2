"""A GPU that is not there: tensors that say they lie on it and meet no CPU tensor.

A `CardTensor` has its numbers on the CPU. It refuses, as a real card does, every
operation with a tensor of more than one number that lies elsewhere, but for an index on
the CPU and a copy from one place to the other. Inside `FakeCard()` tensors can be made
on the card and moved to it. What it cannot show: kernels, streams, timing.
"""

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

backend_registration._setup_privateuseone_for_python_backend("card")
DEVICE = torch.device("card:0")
INDEXED = {"index", "index_put_", "index_put", "_index_put_impl_"}
COPIES = {"copy_", "_to_copy", "_copy_from"}


class CardTensor(Tensor):
    """Numbers on the CPU under the name of another device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: Tensor):
        made = Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            dtype=numbers.dtype,
            device=DEVICE,
        )
        made.numbers = numbers.detach()
        return made

    def __repr__(self):
        return f"CardTensor({self.numbers})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Run on the numbers; refuse to mix devices."""
        return run(func, args, kwargs or {})


class FakeCard(TorchDispatchMode):
    """Lets tensors be made on the card."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """What names the card as its device runs on the CPU and is wrapped."""
        return run(func, args, kwargs or {})


def run(func, args: tuple, kwargs: dict):
    """An operation on the card, between places, or not concerning the card at all."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    on_card = any(isinstance(t, CardTensor) for t in tensors)
    wanted = kwargs.get("device")
    if not on_card and not is_card(wanted):
        return func(*args, **kwargs)
    name = func._schema.name.removeprefix("aten::")
    if on_card:
        refuse_mixed(name, args, tensors)
    plain = tree_map_only(CardTensor, lambda t: t.numbers, (args, kwargs))
    made_on_card = wanted is None or is_card(wanted)
    if is_card(wanted):
        plain[1]["device"] = torch.device("cpu")
    result = func(*plain[0], **plain[1])
    if name.endswith("_") and not name.startswith("__"):
        return args[0]
    if not made_on_card or (name == "copy_" and not isinstance(args[0], CardTensor)):
        return result
    return tree_map_only(Tensor, CardTensor, result)


def is_card(device) -> bool:
    """Does an argument name the card?"""
    return device is not None and torch.device(device).type == DEVICE.type


def refuse_mixed(name: str, args: tuple, tensors: list[Tensor]) -> None:
    """As on a real card: CPU and card do not compute together."""
    if name in COPIES:
        return
    if name in INDEXED and isinstance(args[0], CardTensor):
        tensors = [args[0], *(t for t in args[2:] if isinstance(t, Tensor))]
    elsewhere = [t for t in tensors if not isinstance(t, CardTensor) and t.ndim > 0]
    if elsewhere:
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, found {DEVICE} "
            f"and {elsewhere[0].device}"
        )


def put(model: nn.Module) -> nn.Module:
    """Move a model onto the card, in place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = nn.Parameter(CardTensor(parameter.detach()))
                module._parameters[name] = moved
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = CardTensor(buffer)
    return model


def fetch(tensor: Tensor) -> Tensor:
    """The numbers of a tensor on the card."""
    assert isinstance(tensor, CardTensor), "the result left the card"
    return tensor.numbers
